"""What replaying, driving and policies share: where a rollout starts, and its state as it goes on.

Shape legend: B rollouts, L rows of an interaction (row 0 the current frame), V cameras, C latent channels, h, w latent,
H, W pixels. A pose is x y z (m), roll pitch yaw (rad), gripper.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persistworld_cli.config.settings import Settings
from persistworld_cli.data.clips.store import Annotation, EpisodeStore
from persistworld_cli.data.raw.video import resize
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.rollout.engine import RolloutEngine, RolloutState, rollout_noise
from persistworld_cli.rollout.recording import Item, check_item, crop_to, to_uint8

Float = NDArray[np.float64]
Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Start:
    """Where one rollout begins: a real frame of the store, and what is asked there."""

    item: Item
    split: str
    annotation: Annotation
    text: str

    @property
    def pose(self) -> Float:
        """(7,) the recorded pose at the frame."""
        pose: Float = self.annotation.states[self.item.start]
        return pose

    @property
    def joints(self) -> Float:
        """(8,) joints and gripper at the frame. Raises PersistWorldError where the recording has none."""
        recorded = self.annotation.joints
        if recorded is None or len(recorded) <= self.item.start:
            raise PersistWorldError(
                f"episode '{self.item.episode}' has no joint angles, which a policy needs",
                where=f"annotation/{self.split}/{self.item.episode}.json, key 'joints'",
                fix="extract the episode again from its raw recording, or take another episode",
            )
        joints: Float = recorded[self.item.start]
        return joints


def find_split(store: EpisodeStore, episode: str, prefer: str) -> str | None:
    """The split that holds an episode, ``prefer`` looked at first; None if none does."""
    order = [prefer, *(split for split in store.splits if split != prefer)]
    return next((split for split in order if episode in store.episodes(split)), None)


def make_start(store: EpisodeStore, item: Item, prefer: str, text: str = "") -> Start:
    """The start of a rollout, checked. ``text`` replaces the recorded instruction.

    Raises:
        PersistWorldError: no such episode in any split (those of ``prefer`` are listed), or no such frame.
    """
    split = find_split(store, item.episode, prefer) or prefer
    annotation = check_item(store, split, item)
    if annotation.states.shape[1] != 7:
        raise PersistWorldError(
            f"states have {annotation.states.shape[1]} numbers, not 7 (xyz, rpy, gripper)",
            where=f"episode '{item.episode}'",
            fix="keys and policies move a pose of 7 numbers: extract with the default state_fields",
        )
    return Start(item=item, split=split, annotation=annotation, text=text or annotation.text)


def first_latents(model: WorldModel, store: EpisodeStore, starts: Sequence[Start]) -> Tensor:
    """(B, C, h, w): the stored latents of the start frames; encoded from the videos where none were extracted.

    Raises:
        PersistWorldError: they are not the model's size.
    """
    rows = []
    for start in starts:
        split, episode, frame = start.split, start.item.episode, start.item.start
        try:
            store.latent_files(split, episode)
        except PersistWorldError:
            images = store.frames(split, episode, [frame])[0]
            latent = model.encode_frames(torch.from_numpy(resize(images, model.world.height, model.world.width))[None])[
                0
            ].cpu()
        else:
            latent = store.latents(split, episode, [frame])[0]
        if tuple(latent.shape) != model.latent_shape:
            raise PersistWorldError(
                f"episode '{episode}' has latents of shape {tuple(latent.shape)}, the model wants {model.latent_shape}",
                where="the dataset and the preset",
                fix="use the preset that the dataset was extracted with",
            )
        rows.append(latent)
    return torch.stack(rows)


@dataclass(frozen=True)
class StepResult:
    """What one interaction brought: its poses (B, L, 7), new images (B, L-1, V, H, W, 3) uint8, seconds of work."""

    poses: Float
    images: Images
    seconds: float


@dataclass(frozen=True)
class Snapshot:
    """Where an `InteractiveRollout` stood, to come back to: rollouts, poses (B, 7), images (B, V, H, W, 3), steps."""

    state: RolloutState
    poses: Float
    images: Images
    steps: int


class InteractiveRollout:
    """Rollouts in progress: poses in, images out. The same starts, poses and seeds give the same images.

    Args:
        model: the world model on its device.
        store: where the starts lie.
        starts: one for each rollout; all are advanced together.
        settings: sampling and image size.
        policy: show the model the history that policies are rolled out with (`sampling.history_policy`).
    """

    def __init__(
        self,
        model: WorldModel,
        store: EpisodeStore,
        starts: Sequence[Start],
        settings: Settings,
        *,
        policy: bool = False,
    ) -> None:
        history = settings.sampling.history_policy if policy else None
        self._model, self._world = model, settings.world
        self._engine = RolloutEngine(model, settings.sampling, store.stat(), history)
        self._starts = list(starts)
        first = first_latents(model, store, starts)
        self.poses: Float = np.stack([start.pose for start in starts])
        self.images: Images = self._draw(first[:, None])[:, 0]  # (B, V, H, W, 3): what the cameras show now
        self._state = self._engine.start(first, self.poses, [start.text for start in starts])
        self.steps = 0

    @property
    def rows(self) -> int:
        """L, the number of poses that an interaction takes."""
        return self._model.settings.num_frames

    @property
    def snapshot(self) -> Snapshot:
        """Where it stands now."""
        return Snapshot(self._state.copy(), self.poses, self.images, self.steps)

    def restore(self, snapshot: Snapshot) -> None:
        """Stand where it stood."""
        self._state, self.poses, self.images, self.steps = (
            snapshot.state.copy(),
            snapshot.poses,
            snapshot.images,
            snapshot.steps,
        )

    def step(self, poses: Float, branch: int = 0) -> StepResult:
        """One interaction along raw poses (B, L, 7); `poses`, `images` and `steps` then show where it led.

        ``branch`` draws other noise for the same interaction; 0 is what every other rollout of these starts gets.
        """
        began = time.perf_counter()
        extra = (branch,) if branch else ()
        keys = [(s.item.seed, s.item.episode, s.item.start, self.steps, *extra) for s in self._starts]
        predicted = self._engine.step(self._state, poses, rollout_noise(keys, self._engine.noise_shape))
        images = self._draw(predicted)[:, 1:]  # row 0 only draws the current frame again
        self.poses, self.images = poses[:, -1].copy(), images[:, -1]
        self.steps += 1
        return StepResult(poses, images, time.perf_counter() - began)

    def _draw(self, latents: Tensor) -> Images:
        """(B, N, C, h, w) -> uint8 (B, N, V, H, W, 3)."""
        images = self._model.draw(latents.to(self._model.device), self._engine.sampling)
        drawn = crop_to(images, self._world.height, self._world.width, where="model.vae")
        return to_uint8(drawn, self._world.pixel_rounding)
