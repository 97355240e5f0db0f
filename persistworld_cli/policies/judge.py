"""Judges: a judge looks at a rollout and decides whether the instruction succeeded, and with how much progress.

To add one: write a class with `judge` (see `Judge`) and a line in `JUDGES`, or name your own as
``--judge module:Class``.

Shape legend: F frames of a rollout (the first is the start), V cameras, H, W pixels, R rows of the trace at
`policy.rate_hz`, J joints, D numbers of a pose: the robot's state, of a Franka x y z (m), roll pitch yaw (rad) of the
flange in the base frame, gripper (0 open .. 1 closed).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.fields import Known
from persistworld_cli.config.plugins import make_plugin, running
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.policies.bundled_world.rules import LARGE_SHAPES, Float

JUDGES = {"bundled-world": "persistworld_cli.policies.bundled_world.judge:BundledJudge"}


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """An object at the start: colour (0 .. 1), full size (m), position (3,) of its centre (m)."""

    name: str
    colour: str
    shape: str
    rgb: tuple[float, ...]
    size: tuple[float, ...]
    position: Float
    quaternion: Float  # w x y z

    @property
    def graspable(self) -> bool:
        """Whether the gripper can hold it; large objects can only be pushed."""
        return self.shape not in LARGE_SHAPES

    @property
    def half(self) -> Float:
        """(3,) half its size along its own axes."""
        return np.array(self.size) / 2


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The input of a judge.

    Attributes:
        episode, start, seed: the rollout.
        instruction: the policy's instruction.
        cameras: V names.
        rate_hz: frame rate.
        frames: (F, V, H, W, 3) uint8: the camera images, imagined or simulated.
        poses: (F, D) at each frame.
        joint_pos, joint_vel: (R, J) joints of the arm and velocities of the policy between frames; (0, 0) where the
            policy's answers do not have them.
        objects: the scene at the start; None if the dataset does not describe it.
    """

    episode: str
    start: int
    seed: int
    instruction: str
    cameras: tuple[str, ...]
    rate_hz: float
    frames: NDArray[np.uint8]
    poses: Float
    joint_pos: Float
    joint_vel: Float
    objects: tuple[SceneObject, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A judge's decision: success, progress (0 .. 1), and the reason in one line. None means undecided."""

    success: bool | None
    progress: float | None
    reason: str


class Judge(Protocol):
    """Anything that judges a rollout.

    A class may set ``wants_objects = True``: then `Evidence.objects` is never None, and a dataset without a description
    of its objects is refused before anything is rolled out.
    """

    def judge(self, evidence: Evidence) -> Verdict:
        """The verdict on one rollout."""
        ...


def check_judge(name: str) -> None:
    """Refuse a name that is neither in the registry nor ``module:Class``. Raises UsageError."""
    Known("judge", tuple(JUDGES)).check(name, "judge", "--judge")


def load_judge(name: str) -> Judge:
    """A judge of the registry, or of a class ``module:Class``. Raises as `make_plugin`."""
    fix = "a judge has judge(evidence) -> Verdict"
    spec = JUDGES.get(name, name)
    judge: Judge = make_plugin(spec, JUDGES, kind="judge", where="--judge", needs=("judge",), fix=fix)
    return judge


_VERDICT = "return persistworld_cli.Verdict(success, progress, reason); success None: undecided"


def ask_judge(judge: Judge, evidence: Evidence, name: str) -> Verdict:
    """The verdict, checked. Raises PersistWorldError: the judge failed, or returns no verdict."""
    with running("judge", name):
        verdict: Any = judge.judge(evidence)
    if not isinstance(verdict, Verdict):
        raise PersistWorldError(f"the judge gave {verdict!r}, not a Verdict", where=name, fix=_VERDICT)
    progress = verdict.progress
    if progress is not None and not (math.isfinite(progress) and 0 <= progress <= 1):
        raise PersistWorldError(f"the judge gave progress {progress!r}, not a number from 0 to 1", where=name)
    if verdict.success not in (True, False, None):
        raise PersistWorldError(f"the judge gave success {verdict.success!r}, not true, false or none", where=name)
    return verdict
