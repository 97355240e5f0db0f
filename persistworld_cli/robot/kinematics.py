"""Kinematics of an arm: Franka's, and those of your own (`robot.kinematics`).

Forward kinematics of the Franka: joint angles -> pose of the flange in the base frame.

Source: Franka's published modified (Craig) Denavit-Hartenberg table; the flange follows joint 7 at 0.107 m along z. No
hand rotation and no gripper offset: this is what DROID records as `cartesian_position` (to 4e-8 m and 2e-7 rad).
Shapes: (...) any leading batch, J joints. Angles in rad, lengths in m, float64 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from persistworld_cli.config.plugins import make_plugin
from persistworld_cli.config.settings import Settings
from persistworld_cli.errors import UsageError

Float = NDArray[np.float64]


class Kinematics(Protocol):
    """An arm whose policies answer in joints: J of them, in the units of the recorded joints.

    A class with ``inverse(pose, joints) -> joints or None`` takes poses too (``policy.actions = "pose"``).
    """

    @property
    def joint_low(self) -> Sequence[float]:
        """The lower limits of the joints (J,)."""
        ...

    @property
    def joint_high(self) -> Sequence[float]:
        """The upper limits of the joints (J,)."""
        ...

    def pose(self, joints: Float) -> Float:
        """(R, J) joints -> (R, P): the numbers of a state, without the gripper's, which is the last if there is one."""
        ...


@dataclass(frozen=True)
class Arm:
    """A serial arm: `a` (m), `d` (m), `alpha` (rad) of each joint; the flange lies `flange_d` (m) along the last z."""

    a: tuple[float, ...]
    d: tuple[float, ...]
    alpha: tuple[float, ...]
    flange_d: float
    joint_low: tuple[float, ...]
    joint_high: tuple[float, ...]

    @property
    def num_joints(self) -> int:
        """Number of joints."""
        return len(self.a)

    def pose(self, joints: Float) -> Float:
        """(..., J) rad -> (..., 6): `pose` of this arm."""
        return pose(joints, self)

    def inverse(self, goal: Float, joints: Float) -> Float | None:
        """`inverse` of this arm."""
        return inverse(goal, joints, self)


_RIGHT = float(np.pi / 2)
_INVERSE_STEPS, _DAMPING = 100, 1e-3
_CONVERGED, _REACHED = 1e-6, 1e-3  # m and rad
PANDA = Arm(
    a=(0.0, 0.0, 0.0, 0.0825, -0.0825, 0.0, 0.088),
    d=(0.333, 0.0, 0.316, 0.0, 0.384, 0.0, 0.0),
    alpha=(0.0, -_RIGHT, _RIGHT, _RIGHT, -_RIGHT, _RIGHT, _RIGHT),
    flange_d=0.107,
    joint_low=(-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973),
    joint_high=(2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973),
)
"""Franka Emika Panda, as in DROID."""


def load_kinematics(settings: Settings) -> Kinematics:
    """The arm that the settings name. Raises UsageError if they name none, or as `make_plugin`."""
    name = settings.robot.kinematics or ("" if settings.robot.dimensions else "panda")
    if not name:
        what = f"policy.actions = '{settings.policy.actions}' needs the arm's kinematics"
        fix = "name a class of yours, module:Class (docs/own-robot.md), or take a policy of --actions model"
        raise UsageError(what, where="robot.kinematics", fix=fix)
    if name == "panda":
        return PANDA
    needs, fix = ("joint_low", "joint_high", "pose"), "a class has joint_low, joint_high and pose(joints)"
    arm: Kinematics = make_plugin(name, ("panda",), kind="kinematics", where="robot.kinematics", needs=needs, fix=fix)
    return arm


def joint_frames(joints: ArrayLike, arm: Arm = PANDA) -> Float:
    """Frames of every joint and, last, of the flange in the base frame: (..., J) rad -> (..., J + 1, 4, 4).

    Raises ValueError for a wrong number of joints.
    """
    angle = np.asarray(joints, dtype=np.float64)
    if angle.ndim == 0 or angle.shape[-1] != arm.num_joints:
        raise ValueError(f"joints must be (..., {arm.num_joints}), not {angle.shape}")
    frames = np.empty((*angle.shape[:-1], arm.num_joints + 1, 4, 4))
    pose = np.broadcast_to(np.eye(4), (*angle.shape[:-1], 4, 4))
    for j in range(arm.num_joints):
        pose = pose @ _link(angle[..., j], arm.a[j], arm.d[j], arm.alpha[j])
        frames[..., j, :, :] = pose
    frames[..., -1, :, :] = pose
    frames[..., -1, :3, 3] += arm.flange_d * pose[..., :3, 2]
    return frames


def _link(theta: Float, a: float, d: float, alpha: float) -> Float:
    """(...,) joint angle -> (..., 4, 4): RotX(alpha) TransX(a) RotZ(theta) TransZ(d)."""
    cos, sin = np.cos(theta), np.sin(theta)
    cos_a, sin_a = np.cos(alpha), np.sin(alpha)
    link = np.zeros((*theta.shape, 4, 4))
    link[..., 0, 0], link[..., 0, 1], link[..., 0, 3] = cos, -sin, a
    link[..., 1, 0], link[..., 1, 1], link[..., 1, 2], link[..., 1, 3] = sin * cos_a, cos * cos_a, -sin_a, -d * sin_a
    link[..., 2, 0], link[..., 2, 1], link[..., 2, 2], link[..., 2, 3] = sin * sin_a, cos * sin_a, cos_a, d * cos_a
    link[..., 3, 3] = 1.0
    return link


def forward(joints: ArrayLike, arm: Arm = PANDA) -> Float:
    """Flange in the base frame: (..., J) rad -> (..., 4, 4). Raises ValueError for a wrong number of joints."""
    return joint_frames(joints, arm)[..., -1, :, :]


def pose(joints: ArrayLike, arm: Arm = PANDA) -> Float:
    """Flange pose as DROID records it: (..., J) rad -> (..., 6) x y z (m), roll pitch yaw (rad, extrinsic xyz).

    Raises ValueError for a wrong number of joints.
    """
    return pose_of_frame(forward(joints, arm))


def pose_of_frame(frame: Float) -> Float:
    """(..., 4, 4) -> (..., 6): position and extrinsic xyz angles (scipy's 'xyz')."""
    flat = frame.reshape(-1, 4, 4)
    euler = Rotation.from_matrix(flat[:, :3, :3]).as_euler("xyz") if len(flat) else np.empty((0, 3))
    return np.concatenate([flat[:, :3, 3], euler], axis=1).reshape(*frame.shape[:-2], 6)


def inverse(goal: ArrayLike, joints: ArrayLike, arm: Arm = PANDA) -> Float | None:
    """Joints (J,) within their limits at which the flange has a pose (6,), by damped least squares from ``joints`` on.

    None if the flange cannot get within 1 mm and 1 mrad of the pose.
    """
    end, angle = np.asarray(goal, dtype=np.float64), np.asarray(joints, dtype=np.float64)
    target = Rotation.from_euler("xyz", end[3:])
    for _ in range(_INVERSE_STEPS):
        frame = forward(angle, arm)
        turn = (target * Rotation.from_matrix(frame[:3, :3]).inv()).as_rotvec()
        error = np.concatenate([end[:3] - frame[:3, 3], turn])
        if np.abs(error).max() < _CONVERGED:
            return angle
        jac = jacobian(angle, arm)
        step = jac.T @ np.linalg.solve(jac @ jac.T + _DAMPING * np.eye(6), error)
        angle = np.clip(angle + step, arm.joint_low, arm.joint_high)
    return angle if np.abs(error).max() < _REACHED else None


def jacobian(joints: ArrayLike, arm: Arm = PANDA, tool_z: float = 0.0) -> Float:
    """Geometric Jacobian at joints (..., J) rad of a point `tool_z` m beyond the flange along its z, in the base frame.

    Returns:
        (..., 6, J): rows 0..2 velocity of the point, rows 3..5 angular velocity, for 1 rad/s of each joint.
    """
    frames = joint_frames(joints, arm)
    axes, origins = frames[..., :-1, :3, 2], frames[..., :-1, :3, 3]
    point = frames[..., -1, :3, 3] + tool_z * frames[..., -1, :3, 2]
    linear = np.cross(axes, point[..., None, :] - origins)
    return np.swapaxes(np.concatenate([linear, axes], axis=-1), -1, -2)
