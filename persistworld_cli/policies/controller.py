"""A policy as the controller of rollouts: its joint velocities become the poses of the next interaction.

Shapes: B rollouts, L rows of an interaction (row 0 is the current pose), R rows of a policy's chunk at 15 Hz, V
cameras, H, W pixels. A pose is x y z (m), roll pitch yaw (rad), gripper; joints are 7 angles (rad) and the gripper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.policies.observation import Policy, PolicyView, ask_policy
from persistworld_cli.robot.kinematics import pose as flange_pose

Float = NDArray[np.float64]
Images = NDArray[np.uint8]


def interpret_chunk(actions: Float, joints: Float, view: PolicyView) -> tuple[Float, Float]:
    """The motion of the arm under a policy's answer (Ctrl-World's policy rollout); row 0 is the current state.

    Args:
        actions: (R, 8) joint velocities and gripper position.
        joints: (8,) current joints and gripper.
        view: adapter and gripper caps.

    Returns:
        (R, 8) joints and gripper, (R, 7) pose of the flange and gripper, at each row.
    """
    now = np.asarray(joints, dtype=np.float64)
    arm = np.concatenate([now[None, :7], view.adapter(actions[:, :7], now[:7])])[: len(actions)]
    closed = np.minimum(now[7:8], view.gripper_cap) if view.cap_current else now[7:8]
    gripper = np.concatenate([closed, np.clip(actions[:, 7], 0.0, view.gripper_cap)])[: len(actions), None]
    return np.concatenate([arm, gripper], axis=1), np.concatenate([flange_pose(arm), gripper], axis=1)


@dataclass
class PolicyTrace:
    """The arm's motion in one rollout, at 15 Hz, (L-1) x skip rows per interaction (Ctrl-World's keys)."""

    joint_pos: list[list[float]] = field(default_factory=list)
    joint_vel: list[list[float]] = field(default_factory=list)
    state_fk: list[list[float]] = field(default_factory=list)


class PolicyController:
    """Asks a policy once per rollout and interaction; its joint velocities give the poses.

    Args:
        policies: one per rollout, since a policy may have a memory.
        view: the policy's observation and the reading of its answer.
        joints: (B, 8) joints and gripper at the start.
        prompts: each rollout's instruction.
    """

    def __init__(self, policies: Sequence[Policy], view: PolicyView, joints: Float, prompts: Sequence[str]) -> None:
        self._policies, self._view, self._prompts = list(policies), view, list(prompts)
        self.joints = np.array(joints, dtype=np.float64)
        self.traces = [PolicyTrace() for _ in policies]

    def poses(self, images: Images) -> Float:
        """(B, L, 7): poses of the next interaction, given the current images (B, V, H, W, 3) uint8.

        Raises:
            PersistWorldError: a policy failed, or its answer does not fit the layout. No rollout advances then.
        """
        view, end, poses = self._view, self._view.advance, []
        asked = zip(self._policies, images, self.joints, self._prompts, strict=True)
        answers = [ask_policy(policy, view, *shown) for policy, *shown in asked]
        for row, (actions, trace) in enumerate(zip(answers, self.traces, strict=True)):
            joints, states = interpret_chunk(actions, self.joints[row], view)
            trace.joint_pos += joints[:end, :7].tolist()
            trace.joint_vel += actions[:end, :7].tolist()
            trace.state_fk += states[:end].tolist()
            self.joints[row] = joints[end]
            poses.append(states[: end + 1 : view.skip])
        return np.stack(poses)
