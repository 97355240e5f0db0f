"""What rollouts are compared with: items (episode, start, seed) and the recorded frames that belong to them.

Shape legend: L rows of an interaction (row 0 the current frame), S interactions, F = S (L-1) new frames, V cameras,
C latent channels, h, w latent, H, W pixels. Row k of interaction i is frame ``start + (L-1) i + k`` of the recording.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persistworld_cli.data.clips.store import Annotation, EpisodeStore
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.rollout.engine import recorded_poses, row_ids


@dataclass(frozen=True, order=True)
class Item:
    """One rollout to make: an episode, the frame it starts from, the seed of its noise."""

    episode: str
    start: int
    seed: int

    @property
    def name(self) -> str:
        """For file names."""
        return f"{self.episode}_{self.start}_{self.seed}"


@dataclass(frozen=True)
class Recording:
    """The recorded side of one rollout.

    Attributes:
        item: the rollout.
        annotation: of its episode.
        frame_ids: (F,) recorded frame of each new frame, clipped to the last.
        valid: (F,) False where the recording has already ended; such frames are not scored.
        first: uint8 (V, H, W, 3), the frame at the start.
        frames: uint8 (F, V, H, W, 3).
        first_latent: (C, h, w).
        commanded: (F + 1, D) poses from the start on that the model is given instead of the recorded ones, or None.
    """

    item: Item
    annotation: Annotation
    frame_ids: NDArray[np.int64]
    valid: NDArray[np.bool_]
    first: NDArray[np.uint8]
    frames: NDArray[np.uint8]
    first_latent: Tensor
    commanded: NDArray[np.float64] | None = None

    def poses(self, interaction: int, rows: int) -> NDArray[np.float64]:
        """Poses (L, D) of an interaction, row 0 the current one: recorded (clipped to the last), or commanded."""
        if self.commanded is not None:
            begin = (rows - 1) * interaction
            return self.commanded[begin : begin + rows]
        return recorded_poses(self.annotation.states, self.item.start, interaction, rows)

    def row_ids(self, interaction: int, rows: int) -> NDArray[np.int64]:
        """Recorded frame ids (L,) of an interaction's rows, clipped to the recording's last."""
        return row_ids(self.annotation.num_frames, self.item.start, interaction, rows)


def check_item(store: EpisodeStore, split: str, item: Item) -> Annotation:
    """The annotation of an item's episode.

    Raises:
        PersistWorldError: no such episode, lengths in it that disagree, or nothing recorded after the start.
    """
    annotation = store.annotation(split, item.episode)
    store.require_latents(split, annotation)
    if not 0 <= item.start < annotation.num_frames - 1:
        raise PersistWorldError(
            f"a rollout cannot start at frame {item.start} of the {annotation.num_frames} of episode '{item.episode}'",
            where="start",
            fix=f"start between 0 and {annotation.num_frames - 2}",
        )
    return annotation


def require_same_shape(
    episode: str, views: int, latents: tuple[int, ...], cameras: int, wanted: tuple[int, ...]
) -> None:
    """Refuse a recording whose cameras or latents (C, h, w) are not the model's.

    Raises:
        PersistWorldError: saying which numbers differ.
    """
    if latents != wanted or views != cameras:
        raise PersistWorldError(
            f"episode '{episode}' has {views} cameras and latents {latents}, "
            f"the model wants {cameras} cameras and {wanted}",
            where="the dataset and the preset",
            fix="extract the dataset with this preset, or use the preset it was extracted with",
        )


def load_recording(store: EpisodeStore, split: str, item: Item, steps: int, rows: int) -> Recording:
    """Read the recorded frames, the first latent and the poses of one rollout.

    Args:
        store: the dataset.
        split: the split the episode is in.
        item: which rollout.
        steps: interactions S.
        rows: frames L of an interaction, the current one among them.

    Raises:
        PersistWorldError: as `check_item`, or unreadable files.
    """
    annotation = check_item(store, split, item)
    wanted = item.start + 1 + np.arange(steps * (rows - 1))
    last = annotation.num_frames - 1
    ids = np.minimum(wanted, last)
    frames = store.frames(split, item.episode, [item.start, *ids.tolist()])
    return Recording(
        item=item,
        annotation=annotation,
        frame_ids=ids,
        valid=wanted <= last,
        first=frames[0],
        frames=frames[1:],
        first_latent=store.latents(split, item.episode, [item.start])[0],
    )


def to_unit(frames: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> Tensor:
    """uint8 (..., H, W, 3) to float (..., 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(frames))).movedim(-1, -3).float() / 255.0


def to_uint8(images: Tensor, rounding: str = "nearest") -> NDArray[np.uint8]:
    """Float (..., 3, H, W) in [0, 1] to uint8 (..., H, W, 3), rounded to the nearest, or "down" as Ctrl-World does."""
    scaled = images.clamp(0, 1) * 255.0
    whole = scaled.round() if rounding == "nearest" else scaled.floor()
    return whole.to(torch.uint8).movedim(-3, -1).cpu().numpy()


def crop_to(images: Tensor, height: int, width: int, where: str) -> Tensor:
    """Decoded images (..., H', W') cut to the recording's size: a VAE rounds up to its factor.

    Raises:
        PersistWorldError: smaller than the recording, or larger by more than the rounding: another world's model.
    """
    high, wide = images.shape[-2:]
    if not (0 <= high - height < 16 and 0 <= wide - width < 16):
        raise PersistWorldError(
            f"the model draws {high}x{wide} images, the recording has {height}x{width}",
            where=where,
            fix="use the preset that the dataset was extracted with",
        )
    return images[..., :height, :width]
