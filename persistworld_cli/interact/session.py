"""A drive as a tree of steps: what keys, terminal and page share, so that the same keys and seed give the same frames.

A step's noise is a pure function of (seed, episode, start, interaction, branch). Branch 0 is what `drive --keys` draws;
`branch` takes the next number. Steps are kept, so going back shows the very frames that were shown before, and pressing
a key where it was pressed before leads to the step that is there.

Shape legend: L rows of an interaction, F new frames (L-1; 1 at the start), V cameras, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from persistworld_cli.config.settings import Settings
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.robot.keyboard import KeyMap, parse_keys
from persistworld_cli.rollout.interactive import Float, Images, InteractiveRollout, Snapshot
from persistworld_cli.rollout.recording import Start


class KeyboardController:
    """One key an interaction, the same for every rollout of the batch."""

    def __init__(self, keymap: KeyMap, keys: Sequence[str], rows: int = 5) -> None:
        """``keys``: one for each interaction. Raises UsageError for one that the map does not have."""
        self._keymap, self._rows = keymap, rows
        self._keys = parse_keys("".join(keys), keymap.settings.keys)

    def poses(self, step: int, current: Float, images: Images | None = None) -> Float:
        """(B, L, 7) from each rollout's current pose along the step's key. Raises IndexError behind the last key."""
        return np.stack([self._keymap.chunk(pose, self._keys[step], self._rows) for pose in current])


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the tree; number 0 is the start.

    Attributes:
        number: its place in `DriveSession.steps`.
        parent: the step before it; -1 at the start.
        depth: interactions since the start.
        key: what was pressed; "" at the start.
        branch: which of the noises.
        poses: (L, 7), row 0 where it began; (1, 7) at the start.
        images: uint8 (F, V, H, W, 3).
        seconds: it took to compute.
        snapshot: where the world stands after it.
    """

    number: int
    parent: int
    depth: int
    key: str
    branch: int
    poses: Float
    images: Images
    seconds: float
    snapshot: Snapshot


class DriveSession:
    """One drive from one real frame. Not to be used from two threads at once.

    Args:
        world: with a single rollout, at its start.
        start: where that is.
        settings: key map, step size, limits.
    """

    def __init__(self, world: InteractiveRollout, start: Start, settings: Settings) -> None:
        self._world, self.start, self.settings = world, start, settings
        self.keymap = KeyMap(settings=settings.drive)
        opening = Step(
            number=0,
            parent=-1,
            depth=0,
            key="",
            branch=0,
            poses=world.poses,
            images=world.images,
            seconds=0.0,
            snapshot=world.snapshot,
        )
        self.steps = [opening]
        self.head = opening

    @property
    def pose(self) -> Float:
        """(7,) where the arm is."""
        pose: Float = self.head.poses[-1]
        return pose

    @property
    def path(self) -> list[Step]:
        """The steps from the start (left out) to where the session stands."""
        steps, step = [], self.head
        while step.parent >= 0:
            steps.append(step)
            step = self.steps[step.parent]
        return steps[::-1]

    def press(self, key: str) -> Step:
        """One interaction along a key. Raises UsageError for one that the map does not have; nothing has moved then."""
        return self._step(self.head, key, 0)

    def branch(self) -> Step:
        """The step that led here once more, with noise not drawn yet. Raises PersistWorldError at the start."""
        self._require_step("branch")
        last = self.head
        twins = [s.branch for s in self.steps if s.parent == last.parent and s.key == last.key]
        return self._step(self.steps[last.parent], last.key, max(twins) + 1)

    def undo(self) -> Step:
        """Back by one step; what was done stays in the tree. Raises PersistWorldError at the start."""
        self._require_step("undo")
        return self.rewind(self.head.parent)

    def rewind(self, number: int) -> Step:
        """Stand where a step of the tree ended (0: the start). Raises PersistWorldError for one that there is not."""
        if not 0 <= number < len(self.steps):
            raise PersistWorldError(f"there is no step {number}", fix=f"steps are 0 to {len(self.steps) - 1}")
        self.head = self.steps[number]
        return self.head

    def frames(self) -> Images:
        """uint8 (1 + S (L-1), V, H, W, 3): the start, and what was seen on the way to where it stands."""
        return np.concatenate([self.steps[0].images, *(step.images for step in self.path)])

    def _step(self, origin: Step, key: str, branch: int) -> Step:
        """The step from ``origin``, computed unless it is there. An interruption leaves the session as it was."""
        for step in self.steps:
            if (step.parent, step.key, step.branch) == (origin.number, key, branch):
                self.head = step
                return step
        controller = KeyboardController(self.keymap, key, self._world.num_frames)
        self._world.restore(origin.snapshot)
        moved = self._world.step(controller.poses(0, self._world.poses), branch)
        step = Step(
            number=len(self.steps),
            parent=origin.number,
            depth=origin.depth + 1,
            key=key,
            branch=branch,
            poses=moved.poses[0],
            images=moved.images[0],
            seconds=moved.seconds,
            snapshot=self._world.snapshot,
        )
        self.steps.append(step)
        self.head = step
        return step

    def _require_step(self, what: str) -> None:
        if self.head.parent < 0:
            raise PersistWorldError(f"this is the start: there is no step to {what}", fix="press a key first")
