"""A drive as a tree of steps, shared by keys, terminal and page, so that the same keys and seed give the same frames.

A step's noise is a pure function of (seed, episode, start, interaction, branch). A key uses branch 0,
`branch` the next number. Steps are kept: rewinding shows the same frames again, and the same key after the same step
returns the existing step.

Shape legend: L rows of an interaction, D numbers of a pose, F new frames (L-1; 1 at the start), V cameras, H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from persistworld_cli.config.settings import Settings
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.robot.keyboard import KeyMap, key_help
from persistworld_cli.rollout.interactive import Float, Images, InteractiveRollout, Snapshot
from persistworld_cli.rollout.recording import Start


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the tree; the defaults describe the start.

    Attributes:
        number: its index in `DriveSession.steps`.
        parent: number of the step before it; -1 at the start.
        depth: interactions since the start.
        key: the key pressed; "" at the start.
        branch: number of the noise.
        poses: (L, D), the first row is the pose before it; (1, D) at the start.
        images: uint8 (F, V, H, W, 3).
        seconds: time to compute it.
        snapshot: state of the rollout after it.
    """

    number: int = 0
    parent: int = -1
    depth: int = 0
    key: str = ""
    branch: int = 0
    poses: Float
    images: Images
    seconds: float = 0.0
    snapshot: Snapshot


class DriveSession:
    """One drive from one real frame; not thread-safe.

    Args:
        world: with a single rollout, at its start.
        start: its episode and frame.
        settings: numbers of a pose, limits, keys and steps.
    """

    def __init__(self, world: InteractiveRollout, start: Start, settings: Settings) -> None:
        self._world, self.start, self.settings = world, start, settings
        self.keymap = KeyMap(settings)
        self.head = Step(poses=world.poses, images=world.images, snapshot=world.snapshot)
        self.steps = [self.head]

    @property
    def pose(self) -> Float:
        """(D,) the current pose."""
        pose: Float = self.head.poses[-1]
        return pose

    @property
    def path(self) -> list[Step]:
        """The steps from the start (excluded) to `head`."""
        steps, step = [], self.head
        while step.parent >= 0:
            steps.append(step)
            step = self.steps[step.parent]
        return steps[::-1]

    def press(self, key: str) -> Step:
        """One interaction in the direction of a key. Raises UsageError for an unknown key, before anything moves."""
        keys = self.settings.drive.keys
        if key not in keys:
            raise UsageError(f"unknown key '{key}'", fix=f"keys: {key_help(keys)}")
        return self._step(self.head, key, 0)

    def branch(self) -> Step:
        """Repeat the last step with new noise. Raises PersistWorldError at the start."""
        last = self._last_step("branch")
        twins = [s.branch for s in self.steps if s.parent == last.parent and s.key == last.key]
        return self._step(self.steps[last.parent], last.key, max(twins) + 1)

    def undo(self) -> Step:
        """Go back by one step, which stays in the tree. Raises PersistWorldError at the start."""
        return self.rewind(self._last_step("undo").parent)

    def rewind(self, number: int) -> Step:
        """Go to the end of a step of the tree (0: the start). Raises PersistWorldError for an unknown number."""
        self.head = self.find(number)
        return self.head

    def find(self, number: int) -> Step:
        """A step of the tree. Raises PersistWorldError for an unknown number."""
        if not 0 <= number < len(self.steps):
            raise PersistWorldError(f"there is no step {number}", fix=f"steps are 0 to {len(self.steps) - 1}")
        return self.steps[number]

    def frames(self) -> Images:
        """uint8 (1 + S (L-1), V, H, W, 3): the start and the frames of `path`."""
        return np.concatenate([self.steps[0].images, *(step.images for step in self.path)])

    def _step(self, origin: Step, key: str, branch: int) -> Step:
        """The step from ``origin``, computed unless it exists. An interruption leaves the session unchanged."""
        for step in self.steps:
            if (step.parent, step.key, step.branch) == (origin.number, key, branch):
                self.head = step
                return step
        self._world.restore(origin.snapshot)
        moved = self._world.step(self.keymap.chunk(self._world.poses[0], key, self._world.num_frames)[None], branch)
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

    def _last_step(self, what: str) -> Step:
        if self.head.parent < 0:
            raise PersistWorldError(f"at the start there is no step to {what}", fix="press a key first")
        return self.head
