"""Inverse kinematics of the arm, and the controller that follows Cartesian waypoints.

Poses are those of the flange in the base frame: x y z (m), then roll pitch yaw, extrinsic xyz (rad), as in DROID.

The gripper's fingers open along the flange's x axis, and it works at a yaw of about pi/2 with its tips leaning about
0.22 rad away from the base, as a person at the controls would hold it. So the recorded roll stays near pi - 0.22 and
does not meet the seam between +pi and -pi, where DROID's roll jumps.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.spatial.transform import Rotation

from persistworld_cli.policies.bundled_world.rules import FLANGE_TO_PADS
from persistworld_cli.robot.kinematics import PANDA, joint_frames

JOINT_LOW, JOINT_HIGH = np.array(PANDA.joint_low), np.array(PANDA.joint_high)
REST = np.array([0.0, 0.05, 0.0, -2.25, 0.0, 2.5, -np.pi / 2])

CONTROL_HZ = 60
FRAME_HZ = 15  # DROID's rate: actions are defined between its frames
# DROID's arm moves about 0.054 rad in a frame for a commanded joint velocity of 1 (measured over real episodes), so a
# target that moves by dq in a frame is a velocity of dq / 0.054; the controller never asks for more than 1.
VELOCITY_GAIN = 0.054
MAX_STEP = VELOCITY_GAIN * FRAME_HZ / CONTROL_HZ
PASS_PART = 0.72
GRIP_TIME = 0.28  # s, to open or close


@dataclasses.dataclass(frozen=True)
class Waypoint:
    """Where the point between the finger pads goes next, at `speed` m/s.

    `holds` names the object that must be in hand on the way; a `passing` point is left for the next before it is met.
    """

    position: np.ndarray
    euler: np.ndarray
    gripper: float
    speed: float
    holds: int | None = None
    passing: bool = False


def solve_step(joints: np.ndarray, tcp: np.ndarray, euler: np.ndarray, damping: float = 1e-3) -> np.ndarray:
    """One damped Gauss-Newton step towards a finger position and flange angles, drawn to `REST` in the null space."""
    frames = joint_frames(joints)
    flange, goal = frames[7], Rotation.from_euler("xyz", euler).as_matrix()
    point = flange[:3, 3] + FLANGE_TO_PADS * flange[:3, 2]
    turn = 0.5 * np.cross(flange[:3, :3], goal, axis=0).sum(axis=1)  # small-angle rotation vector
    error = np.concatenate([tcp - point, turn])
    axes, origins = frames[:7, :3, 2], frames[:7, :3, 3]
    jacobian = np.concatenate([np.cross(axes, point - origins), axes], axis=1).T
    inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + damping * np.eye(6))
    return inverse @ error + (np.eye(7) - inverse @ jacobian) @ (0.05 * (REST - joints))


def solve(tcp: np.ndarray, euler: np.ndarray, steps: int = 80) -> np.ndarray:
    """Joints that reach a pose, from `REST`."""
    joints = REST.copy()
    for _ in range(steps):
        joints = np.clip(joints + solve_step(joints, tcp, euler), JOINT_LOW + 0.02, JOINT_HIGH - 0.02)
    return joints


class ArmController:
    """Turns waypoints into joint and gripper targets at `CONTROL_HZ`, within DROID's velocity limit.

    `turn_rate` is the most of a planned rotation, rad/s.
    """

    def __init__(self, start: Waypoint, turn_rate: float) -> None:
        self.here = start
        self.turn_rate = turn_rate
        self.joints = solve(start.position, start.euler)
        self.gripper = start.gripper
        self._goal: Waypoint | None = None
        self._duration = self._elapsed = 0.0

    @property
    def idle(self) -> bool:
        return self._goal is None

    def go(self, goal: Waypoint) -> None:
        self._goal, self._elapsed = goal, 0.0
        move = np.linalg.norm(goal.position - self.here.position) / goal.speed
        turn = np.abs(goal.euler - self.here.euler).max() / self.turn_rate
        grip = GRIP_TIME if goal.gripper != self.here.gripper else 0.0
        self._duration = max(move, turn, grip, 0.1)

    def step(self) -> None:
        """One control period."""
        if self._goal is None:
            position, euler, gripper = self.here.position, self.here.euler, self.here.gripper
        else:
            self._elapsed += 1 / CONTROL_HZ
            position, euler, gripper = self._blend()
        change = solve_step(self.joints, position, euler)
        change *= min(1.0, MAX_STEP / np.abs(change).max())
        self.joints = np.clip(self.joints + change, JOINT_LOW + 0.02, JOINT_HIGH - 0.02)
        self.gripper = gripper
        if self._goal is not None and self._arrived(position):
            self.here = dataclasses.replace(self._goal, position=position, euler=euler, gripper=gripper)
            self._goal = None

    def _arrived(self, position: np.ndarray) -> bool:
        """A passing point at PASS_PART of the way; others when the joint targets have caught up with the path."""
        if self._goal.passing:
            return self._elapsed >= PASS_PART * self._duration
        late = self._elapsed > self._duration + 0.6
        return self._elapsed >= self._duration and (late or self._error(position) < 0.006)

    def _blend(self) -> tuple[np.ndarray, np.ndarray, float]:
        start, goal, part = self.here, self._goal, min(1.0, self._elapsed / self._duration)
        ease = part * part * (3 - 2 * part)
        return (
            start.position + (goal.position - start.position) * ease,
            start.euler + (goal.euler - start.euler) * ease,
            start.gripper + (goal.gripper - start.gripper) * min(1.0, 1.5 * part),
        )

    def _error(self, position: np.ndarray) -> float:
        flange = joint_frames(self.joints)[7]
        return float(np.linalg.norm(flange[:3, 3] + FLANGE_TO_PADS * flange[:3, 2] - position))
