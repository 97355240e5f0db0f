"""What a judge is: it looks at a rollout and says whether the instruction came true, and how far it got.

To add one: write a class with `judge` (see `Judge`) and add a line to `policies.judges`, or name your own as
``--judge module:Class``.

Shape legend: F frames of a rollout (the first is the start), V cameras, H, W pixels, R rows of the trace at 15 Hz.
A pose is x y z (m), roll pitch yaw (rad), gripper (0 open .. 1 closed), of the flange in the robot's base frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """An object as it was known at the start: colour (0 .. 1), full size (m), position (3,) of its centre (m)."""

    name: str
    colour: str
    shape: str
    rgb: tuple[float, ...]
    size: tuple[float, ...]
    position: Float
    quaternion: Float  # w x y z

    @property
    def graspable(self) -> bool:
        """Whether the gripper can take it; the large ones can only be pushed."""
        return self.shape not in ("box", "drum")

    @property
    def half(self) -> Float:
        """(3,) half its size along its own axes."""
        return np.array(self.size) / 2


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a judge may look at.

    Attributes:
        episode, start, seed: which rollout it is.
        instruction: what was asked.
        cameras: V names.
        rate_hz: of the frames.
        frames: (F, V, H, W, 3) uint8: what the cameras showed, imagined or not.
        poses: (F, 7) of the flange at each frame.
        joint_pos, joint_vel: (R, 7) what the arm and the policy did between frames.
        objects: the scene at the start; None where the dataset does not tell.
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
    """What a judge says. None: it cannot tell, and `reason` says why.

    Attributes:
        success: whether the instruction came true.
        progress: how far it got, 0 .. 1.
        reason: in a line.
    """

    success: bool | None
    progress: float | None
    reason: str


class Judge(Protocol):
    """Anything that judges a rollout.

    A class may say ``wants_objects = True``: then `Evidence.objects` is never None, and a dataset that does not tell
    of its objects is refused before anything is rolled out.
    """

    def judge(self, evidence: Evidence) -> Verdict:
        """One rollout -> its verdict."""
        ...
