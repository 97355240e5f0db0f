"""Who acts in a rollout: a recording, a keyboard, a policy. Each gives the poses of the next interaction.

Shapes: B rollouts, L rows of an interaction (row 0 is the current pose), T recorded frames, R rows of a policy's chunk
at 15 Hz, V cameras, H, W pixels. A pose is x y z (m), roll pitch yaw (rad), gripper; joints are 7 angles (rad) and the
gripper.
To add a controller: write a class with `poses` (see `Controller`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.policies.observation import Layout, build_observation, check_actions
from persistworld_cli.robot.adapter import ActionAdapter
from persistworld_cli.robot.kinematics import pose as flange_pose
from persistworld_cli.rollout.recording import recorded_poses

Float = NDArray[np.float64]
Images = NDArray[np.uint8]


class Controller(Protocol):
    """Gives each interaction's poses."""

    def poses(self, step: int, current: Float, images: Images | None = None) -> Float:
        """Poses of interaction ``step`` (from 0).

        Args:
            step: number of the interaction; every one is asked for once, in order.
            current: (B, 7) the last pose of each rollout.
            images: (B, V, H, W, 3) uint8 what the cameras show now; only policies need it.

        Returns:
            (B, L, 7) float64.
        """
        ...


class RecordedController:
    """Replays recorded states: row k of interaction i is frame start + (L-1) i + k, clipped to the last."""

    def __init__(self, states: Sequence[Float], starts: Sequence[int], rows: int = 5) -> None:
        """``states``: (T, 7) of each rollout; ``starts``: its first frame; ``rows``: L."""
        self._tracks, self._rows = list(zip(states, starts, strict=True)), rows

    def poses(self, step: int, current: Float, images: Images | None = None) -> Float:
        """(B, L, 7) recorded poses; what was reached and seen does not matter."""
        return np.stack([recorded_poses(states, start, step, self._rows) for states, start in self._tracks])


@dataclass(frozen=True)
class PolicyChunk:
    """What a policy's answer means (Ctrl-World's policy rollout); R rows at 15 Hz, the first of them is now.

    Args:
        velocities: (R, 7) as the policy gave them.
        adapter_joints: (R, 7) the adapter's joints after each row's control step.
        joints: (R, 8) joints and gripper at each row: those of now, then the adapter's.
        states: (R, 7) pose and gripper of the flange at each row.
        poses_taken: (L, 7) every skip-th row: the world model's poses.
        joints_taken: (L, 8) the same rows' joints and gripper; the last one is where the next interaction begins.
    """

    velocities: Float
    adapter_joints: Float
    joints: Float
    states: Float
    poses_taken: Float
    joints_taken: Float


def interpret_chunk(
    actions: Float,
    joints: Float,
    adapter: ActionAdapter,
    *,
    skip: int,
    gripper_cap: float,
    cap_current: bool = False,
    rows: int = 5,
) -> PolicyChunk:
    """A policy's chunk -> the poses of an interaction.

    Args:
        actions: (R, 8) joint velocities and gripper position.
        joints: (8,) joints and gripper now.
        adapter: velocities -> joints.
        skip: every skip-th row is taken.
        gripper_cap: the most that the gripper may close.
        cap_current: whether that holds for the gripper of now as well.
        rows: L.

    Raises:
        UsageError: the chunk is too short for the skip.
    """
    needed = (rows - 1) * skip + 1
    if len(actions) < needed:
        raise UsageError(
            f"skip {skip} needs {needed} rows of actions, but the policy gives {len(actions)}",
            where="policy.skip",
            fix=f"take a skip of at most {(len(actions) - 1) // (rows - 1)}",
        )
    velocities, now = actions[:, :7], np.asarray(joints, dtype=np.float64)
    adapted = adapter(velocities, now[:7])
    arm = np.concatenate([now[None, :7], adapted])[: len(actions)]
    closed = np.minimum(now[7:8], gripper_cap) if cap_current else now[7:8]
    gripper = np.concatenate([closed, np.clip(actions[:, 7], 0.0, gripper_cap)])[: len(actions)]
    states = np.concatenate([flange_pose(arm), gripper[:, None]], axis=1)
    full = np.concatenate([arm, gripper[:, None]], axis=1)
    return PolicyChunk(velocities, adapted, full, states, states[:needed:skip], full[:needed:skip])


class ActingPolicy(Protocol):
    """What a controller needs of a policy: a connection to a server or an object here."""

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """One observation -> a map with ``actions``."""
        ...

    def reset(self) -> None:
        """A new episode begins."""
        ...

    def close(self) -> None:
        """No more questions."""
        ...


@dataclass(frozen=True, kw_only=True)
class PolicyView:
    """How the world is shown to a policy, and how its answer is read."""

    layout: Layout
    adapter: ActionAdapter
    skip: int = 2
    gripper_cap: float = 1.0
    cap_current: bool = False
    camera: int = 1  # the exterior camera it sees
    wrist_camera: int = 2
    resize: tuple[int, ...] = ()
    image_size: int = 224
    rows: int = 5


@dataclass
class PolicyTrace:
    """What one rollout's arm did, at 15 Hz, (L-1) x skip rows an interaction (Ctrl-World's keys)."""

    joint_pos: list[list[float]] = field(default_factory=list)
    joint_vel: list[list[float]] = field(default_factory=list)
    state_fk: list[list[float]] = field(default_factory=list)

    def add(self, chunk: PolicyChunk, rows: int) -> None:
        """Append the first ``rows`` rows of a chunk."""
        self.joint_pos += chunk.joints[:rows, :7].tolist()
        self.joint_vel += chunk.velocities[:rows].tolist()
        self.state_fk += chunk.states[:rows].tolist()


class PolicyController:
    """Asks a policy once for each rollout and interaction; poses follow from its joint velocities.

    Args:
        policies: one for each rollout, so that a policy with a memory keeps rollouts apart.
        view: what it is shown and how its answer is read.
        joints: (B, 8) joints and gripper at the start.
        prompts: each rollout's instruction.
    """

    def __init__(
        self, policies: Sequence[ActingPolicy], view: PolicyView, joints: Float, prompts: Sequence[str]
    ) -> None:
        if not len(policies) == len(joints) == len(prompts):
            raise ValueError(f"{len(policies)} policies, {len(joints)} joints and {len(prompts)} prompts for one batch")
        self._policies, self._view, self._prompts = list(policies), view, list(prompts)
        self.joints = np.array(joints, dtype=np.float64)
        self.traces = [PolicyTrace() for _ in policies]

    def poses(self, step: int, current: Float, images: Images | None = None) -> Float:
        """(B, L, 7): what each policy's answer makes of the arm's joints. ``current`` is not used: joints lead.

        Raises:
            PersistWorldError: a policy failed or its answer is not what the layout says. No rollout has advanced then.
        """
        if images is None:
            raise PersistWorldError("a policy needs images")
        chunks = [self._ask(b, images[b]) for b in range(len(self._policies))]
        for b, chunk in enumerate(chunks):
            self.traces[b].add(chunk, (self._view.rows - 1) * self._view.skip)
            self.joints[b] = chunk.joints_taken[-1]
        return np.stack([chunk.poses_taken for chunk in chunks])

    def _ask(self, rollout: int, images: Images) -> PolicyChunk:
        """One question: (V, H, W, 3) images of one rollout -> its chunk."""
        view, joints = self._view, self.joints[rollout]
        actions = ask_policy(self._policies[rollout], view, images, joints, self._prompts[rollout])
        return interpret_chunk(
            actions,
            joints,
            view.adapter,
            skip=view.skip,
            gripper_cap=view.gripper_cap,
            cap_current=view.cap_current,
            rows=view.rows,
        )


def ask_policy(policy: ActingPolicy, view: PolicyView, images: Images, joints: Float, prompt: str) -> Float:
    """One question to a policy.

    Args:
        policy: who is asked.
        view: what it is shown.
        images: (V, H, W, 3) uint8.
        joints: (8,) joints and gripper.
        prompt: the instruction.

    Returns:
        (R, 8) joint velocities and gripper position.

    Raises:
        PersistWorldError: it failed, or its answer is not what the layout says.
    """
    obs = build_observation(
        images[view.camera], images[view.wrist_camera], joints, prompt, view.image_size, view.resize
    )
    return check_actions(policy.infer(obs), view.layout, source="the policy")
