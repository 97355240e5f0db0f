"""Rollouts controlled by keys or a policy: poses in, images out, one interaction at a time.

Shape legend: B rollouts, L frames of an interaction (row 0 the current frame), V cameras, C latent channels, h, w
latent, H, W pixels, D numbers of a pose: the state of the robot, for Franka x y z (m), roll pitch yaw (rad), gripper.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from persistworld_cli.config.keys import dimensions_of
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.rollout.engine import RolloutEngine, RolloutState
from persistworld_cli.rollout.images import draw_images, to_uint8
from persistworld_cli.rollout.recording import Item, Start, check_item

Float = NDArray[np.float64]
Images = NDArray[np.uint8]


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
    return Start(item=item, split=split, annotation=annotation, text=text or annotation.text)


def require_dimensions(settings: Settings, start: Start) -> None:
    """Raise PersistWorldError unless the settings name every number of the start's pose (`robot.dimensions`)."""
    names, count = [one.name for one in dimensions_of(settings)], len(start.pose)
    if len(names) != count:
        said = f"robot.dimensions has {len(names)}: {', '.join(names)}" if names else "robot.dimensions is not set"
        raise PersistWorldError(
            f"states have {count} numbers, but {said}",
            where=f"episode '{start.item.episode}'",
            fix='name every number in the preset, in order: [robot] dimensions = ["shoulder rad", "gripper"]; '
            "with it robot.limits, drive.step and drive.keys (docs/own-robot.md)",
        )


@dataclass(frozen=True)
class StepResult:
    """The result of one interaction: its poses (B, L, D), new images (B, L-1, V, H, W, 3) uint8, seconds of work."""

    poses: Float
    images: Images
    seconds: float


@dataclass(frozen=True)
class Snapshot:
    """A state of an `InteractiveRollout` to return to: rollouts, poses (B, D), images (B, V, H, W, 3)."""

    state: RolloutState
    poses: Float
    images: Images


class InteractiveRollout:
    """Rollouts in progress: poses in, images out. The same starts, poses and seeds give the same images.

    Args:
        model: the world model on its device.
        store: the dataset of the starts.
        starts: one for each rollout; all are advanced together.
        settings: sampling and image size.
        policy: use the history entries for policies (`sampling.history_policy`).
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
        self._engine = RolloutEngine(model, settings.sampling, store.stat(), history)
        self._state = self._engine.start_from(store, starts, encode_missing=True)
        latents, self.poses = self._state.memory.current
        self.images = self._draw(latents[:, None])[:, 0]  # (B, V, H, W, 3): what the cameras show now

    @property
    def num_frames(self) -> int:
        """L, the number of poses that an interaction takes."""
        return self._engine.model.settings.num_frames

    @property
    def snapshot(self) -> Snapshot:
        """The current state."""
        return Snapshot(self._state.copy(), self.poses, self.images)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot."""
        self._state, self.poses, self.images = snapshot.state.copy(), snapshot.poses, snapshot.images

    def step(self, poses: Float, branch: int = 0) -> StepResult:
        """Predict one interaction along raw poses (B, L, D); `poses` and `images` then hold its last ones.

        A ``branch`` other than 0 gives the interaction other noise; 0 is the noise of all other rollouts of the starts.
        """
        began = time.perf_counter()
        predicted = self._engine.step(self._state, poses, self._engine.noise(self._state, branch))
        images = self._draw(predicted)[:, 1:]  # row 0 repeats the current frame
        self.poses, self.images = poses[:, -1].copy(), images[:, -1]
        return StepResult(poses, images, time.perf_counter() - began)

    def _draw(self, latents: Tensor) -> Images:
        """(B, N, C, h, w) -> uint8 (B, N, V, H, W, 3)."""
        model = self._engine.model
        return to_uint8(draw_images(model, latents, self._engine.sampling), model.world.pixel_rounding)
