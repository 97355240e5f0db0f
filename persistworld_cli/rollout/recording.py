"""Where rollouts start, and the recorded frames that they are compared with.

Shape legend: T recorded frames, D pose numbers, L frames of an interaction (row 0 the current frame), S interactions,
F = S (L-1) new frames, V cameras, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.data.clips.store import Annotation, EpisodeStore
from persistworld_cli.errors import PersistWorldError

NoiseKey = tuple[int | str, ...]


def row_ids(start: int, interaction: int, num_frames: int, interactions: int = 1) -> NDArray[np.int64]:
    """Recorded frames (1 + interactions (L-1),) of consecutive interactions, unclipped.

    Row k of interaction i is frame ``start + (L-1) i + k``: its row 0 is the last row of the previous interaction.
    """
    return start + (num_frames - 1) * interaction + np.arange((num_frames - 1) * interactions + 1)


def recorded_poses(states: NDArray[np.float64], start: int, interaction: int, num_frames: int) -> NDArray[np.float64]:
    """Poses (L, D) of an interaction along a recording (T, D), clipped to the last one."""
    return states[np.minimum(row_ids(start, interaction, num_frames), len(states) - 1)]


@dataclass(frozen=True, order=True)
class Item:
    """One rollout to make: an episode, the frame it starts from, the seed of its noise."""

    episode: str
    start: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """For file names."""
        return f"{self.episode}_{self.start}_{self.seed}"

    @property
    def noise_key(self) -> NoiseKey:
        """This and the interaction's number decide the noise: the same in any batch and for every model."""
        return self.seed, self.episode, self.start


@dataclass(frozen=True)
class Start:
    """Where one rollout begins: a recorded frame and an instruction.

    Attributes:
        item: the rollout.
        split: of its episode.
        annotation: of the episode.
        text: the instruction.
    """

    item: Item
    split: str
    annotation: Annotation
    text: str

    @property
    def pose(self) -> NDArray[np.float64]:
        """(D,) the recorded pose at the frame."""
        pose: NDArray[np.float64] = self.annotation.states[self.item.start]
        return pose

    @property
    def joints(self) -> NDArray[np.float64]:
        """(8,) joints and gripper at the frame. Raises PersistWorldError where the recording has none."""
        recorded = self.annotation.joints
        if recorded is None or len(recorded) <= self.item.start:
            raise PersistWorldError(
                f"episode '{self.item.episode}' has no joint angles, which a Franka's policies need",
                where=f"annotation/{self.split}/{self.item.episode}.json, key 'joints'",
                fix="extract it again from its raw recording, take another episode, or a policy of --actions model",
            )
        joints: NDArray[np.float64] = recorded[self.item.start]
        return joints

    def row_ids(self, interaction: int, num_frames: int, interactions: int = 1) -> NDArray[np.int64]:
        """Recorded frames of consecutive interactions (`row_ids`), clipped to the last."""
        ids = row_ids(self.item.start, interaction, num_frames, interactions)
        return np.minimum(ids, self.annotation.num_frames - 1)

    def poses(self, interaction: int, num_frames: int) -> NDArray[np.float64]:
        """Recorded poses (L, D) of an interaction, row 0 the current one."""
        return recorded_poses(self.annotation.states, self.item.start, interaction, num_frames)


@dataclass(frozen=True)
class Recording(Start):
    """A start and the recording after it.

    Attributes:
        frame_ids: (F,) recorded frame of each new frame, clipped to the last.
        valid: (F,) False where the recording has already ended; such frames are not scored.
        first: uint8 (V, H, W, 3), the frame at the start.
        frames: uint8 (F, V, H, W, 3).
        commanded: (F + 1, D) poses from the start on that the model gets in place of the recorded ones, or None.
    """

    frame_ids: NDArray[np.int64]
    valid: NDArray[np.bool_]
    first: NDArray[np.uint8]
    frames: NDArray[np.uint8]
    commanded: NDArray[np.float64] | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """(H, W)."""
        return self.first.shape[1:3]

    def poses(self, interaction: int, num_frames: int) -> NDArray[np.float64]:
        """Poses (L, D) of an interaction, row 0 the current one: recorded, or commanded."""
        if self.commanded is None:
            return super().poses(interaction, num_frames)
        return self.commanded[row_ids(0, interaction, num_frames)]


def require_episodes(store: EpisodeStore, split: str) -> list[str]:
    """The episodes of a split. Raises PersistWorldError where it has none."""
    if episodes := store.episodes(split):
        return episodes
    raise PersistWorldError(
        f"split '{split}' has no episodes",
        where=str(store.root / "annotation"),
        fix=f"set eval.split to one of: {', '.join(store.splits)}",
    )


def check_item(store: EpisodeStore, split: str, item: Item) -> Annotation:
    """The annotation of an item's episode.

    Raises:
        PersistWorldError: no such episode, lengths that disagree, or no recorded frame after the start.
    """
    annotation = store.annotation(split, item.episode)
    store.require_latents(split, annotation)
    if not 0 <= item.start < annotation.num_frames - 1:
        raise PersistWorldError(
            f"frame {item.start} cannot be a start: episode '{item.episode}' has {annotation.num_frames} frames",
            where="start",
            fix=f"start between 0 and {annotation.num_frames - 2}",
        )
    return annotation


def make_items(
    store: EpisodeStore, split: str, episodes: Sequence[str], starts: Sequence[int], seeds: Sequence[int]
) -> list[Item]:
    """Every (episode, start, seed), each once. Raises PersistWorldError: there is none, or as `check_item`."""
    each = product(dict.fromkeys(episodes), dict.fromkeys(starts), dict.fromkeys(seeds))
    items = [Item(episode, start, seed) for episode, start, seed in each]
    if not items:
        raise PersistWorldError("nothing to roll out", where="eval.starts, eval.seeds", fix="name at least one of each")
    for item in items:
        check_item(store, split, item)
    return items


def load_recording(store: EpisodeStore, split: str, item: Item, steps: int, num_frames: int) -> Recording:
    """Read the recorded frames and poses of one rollout of S ``steps`` with L ``num_frames`` each.

    Raises:
        PersistWorldError: as `check_item`, or unreadable files.
    """
    annotation = check_item(store, split, item)
    wanted = row_ids(item.start, 0, num_frames, steps)
    last = annotation.num_frames - 1
    ids = np.minimum(wanted, last)
    frames = store.frames(split, item.episode, ids.tolist())
    return Recording(
        item=item,
        split=split,
        annotation=annotation,
        text=annotation.text,
        frame_ids=ids[1:],
        valid=wanted[1:] <= last,
        first=frames[0],
        frames=frames[1:],
    )
