"""Policies that run in this process: the embedded ones, and any class of the user.

To add one: write a class (see `observation.Policy`) and a line in `POLICIES`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.plugins import make_plugin, running
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.policies.action_spaces import ACTION_SPACES, DEFAULT_ACTIONS, GRIPPER, JOINTS
from persistworld_cli.policies.bundled_world.rules import FLANGE_TO_PADS
from persistworld_cli.policies.observation import ACTIONS, PROMPT, Policy
from persistworld_cli.robot.adapter import DEFAULT_GAIN
from persistworld_cli.robot.kinematics import PANDA, forward, jacobian

Float = NDArray[np.float64]

ROWS = 15  # of an answer, as many as pi0.5-DROID's


class _Embedded:
    """Base of the embedded policies: the rows of an answer, a seed, and the number of calls in the episode."""

    spaces: tuple[str, ...] = (DEFAULT_ACTIONS,)  # in which it answers

    def __init__(self, actions: str = DEFAULT_ACTIONS, rows: int = ROWS, seed: int = 0) -> None:
        self._actions, self._rows, self._seed, self._calls = actions, rows, seed, 0

    def reset(self) -> None:
        """Start a new episode."""
        self._calls = 0


class HoldPolicy(_Embedded):
    """Stays still, the gripper unchanged. The lower bound of a leaderboard."""

    spaces = tuple(ACTION_SPACES)

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """The observed state in every row, velocities of 0."""
        space = ACTION_SPACES[self._actions]
        fields = [field for field in space.fields if field != GRIPPER or GRIPPER in obs]  # an arm may have none
        row = np.concatenate([_read(obs, [field]) * (field not in space.rates) for field in fields])
        return {ACTIONS: np.tile(row, (self._rows, 1))}


class RandomPolicy(_Embedded):
    """A random direction for each chunk, the gripper open or closed at random.

    Random draws depend only on the seed, the number of the call, the joints and the instruction, so other rollouts in
    the batch do not change them.
    """

    speed = 0.4  # standard deviation of a joint's velocity

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """One velocity per joint, fading in and out over the chunk."""
        joints = read_joints(obs)
        known = zlib.crc32(np.round(joints, 6).tobytes() + str(obs.get(PROMPT, "")).encode())
        rng = np.random.default_rng([self._seed, self._calls, known])
        self._calls += 1
        shape = np.sin(np.linspace(0, np.pi, self._rows + 2)[1:-1])[:, None]
        velocity = np.clip(rng.normal(0, self.speed, 7) * shape, -1, 1)
        end = joints[:7] + DEFAULT_GAIN * velocity.sum(axis=0)
        velocity[:, (end < PANDA.joint_low) | (end > PANDA.joint_high)] *= -1  # back from the joint's limit
        gripper = np.full((self._rows, 1), float(rng.integers(2)))
        return {ACTIONS: np.concatenate([velocity, gripper], axis=1)}


class ScriptedPolicy(_Embedded):
    """Moves above a spot on the table, goes down, closes the gripper and lifts.

    A closed loop on joint angles and gripper alone: actions follow from the pose of the arm, so the policy has no state
    and one instance can serve any number of rollouts. It ignores the images.
    """

    target = np.array([0.51, 0.0])  # m: the spot
    tool_z = FLANGE_TO_PADS
    hover, grasp, lift = 0.14, 0.035, 0.17  # m above the table: heights of the finger pads
    near = 0.02  # m: close enough to the spot to go down
    closed = 0.5  # planned rows lift from here on
    stopped = 0.15  # or, if the gripper is seen closed so far, all rows: a wide object stops it at 0.2
    stride, grip_stride = 0.016, 0.2  # largest motion of pads (m) and gripper per row (1/15 s)
    damping = 2e-3

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """Plan each row from the joints that the previous rows should reach."""
        joints = read_joints(obs)
        rows = np.empty((self._rows, 8))
        closed = self.stopped if joints[7] > self.stopped else self.closed
        for row in rows:
            goal, gripper = self._goal(joints, closed)
            velocity = self._velocity(joints[:7], goal)
            row[:7], row[7] = velocity, np.clip(gripper, joints[7] - self.grip_stride, joints[7] + self.grip_stride)
            moved = np.clip(joints[:7] + DEFAULT_GAIN * velocity, PANDA.joint_low, PANDA.joint_high)
            joints = np.append(moved, row[7])
        return {ACTIONS: rows}

    def _pads(self, joints: Float) -> Float:
        """(7,) joints -> (3,) the point between the finger pads."""
        flange = forward(joints)
        point: Float = flange[:3, 3] + self.tool_z * flange[:3, 2]
        return point

    def _goal(self, joints: Float, closed: float) -> tuple[Float, float]:
        """(8,) joints and gripper, and from where on it holds -> goal of the pads, and of the gripper."""
        pads, gripper = self._pads(joints[:7]), float(joints[7])
        away = float(np.linalg.norm(pads[:2] - self.target))
        if gripper > closed:
            return np.append(self.target, self.lift), 1.0
        if away < self.near:
            low = pads[2] <= self.grasp + 0.01
            # Once closing has begun it continues, although the gripper pulls the pads up a little.
            return np.append(self.target, self.grasp), 1.0 if low else gripper * 0.5
        if away > 3 * self.near and pads[2] < self.hover - 3 * self.near:
            return np.append(pads[:2], self.hover), 0.0  # too low to cross the table: up first
        return np.append(self.target, self.hover), 0.0

    def _velocity(self, joints: Float, goal: Float) -> Float:
        """Joint velocities (at most 1) that take the pads towards the goal without turning the hand."""
        step = goal - self._pads(joints)
        length = float(np.linalg.norm(step))
        twist = np.zeros(6)
        twist[:3] = step * min(1.0, self.stride / max(length, 1e-9)) * min(1.0, 0.4 + length / self.stride)
        jac = jacobian(joints, tool_z=self.tool_z)
        change = jac.T @ np.linalg.solve(jac @ jac.T + self.damping * np.eye(6), twist)
        velocity: Float = change / DEFAULT_GAIN
        return velocity / max(1.0, float(np.abs(velocity).max()))


POLICIES: Mapping[str, type[HoldPolicy | RandomPolicy | ScriptedPolicy]] = {
    "scripted": ScriptedPolicy,
    "hold": HoldPolicy,
    "random": RandomPolicy,
}


def make_policy(name: str, actions: str = DEFAULT_ACTIONS, rows: int = ROWS, seed: int = 0) -> Policy:
    """A new policy of the registry, or of a class ``module:Class``.

    Args:
        name: the policy.
        actions: the action space of an embedded one (`policy.actions`).
        rows: rows of its answers.
        seed: of its random numbers.

    Raises:
        UsageError: an embedded one has no such action space; or as `make_plugin`.
    """
    if name in POLICIES:
        kind = POLICIES[name]
        if actions not in kind.spaces:
            fix = f"leave out --actions, or use another --policy ({', '.join(_answering(actions))}, a server, yours)"
            raise UsageError(f"policy '{name}' does not answer in {actions}", where="policy.actions", fix=fix)
        return kind(actions, rows, seed)
    fix = "a policy has infer(obs) -> dict and reset()"
    policy: Policy = make_plugin(name, POLICIES, kind="policy", where="--policy", needs=("infer", "reset"), fix=fix)
    return policy


def _answering(actions: str) -> list[str]:
    return [name for name, kind in POLICIES.items() if actions in kind.spaces]


class LocalPolicy:
    """A user's policy in this process; its exceptions become errors (`running`)."""

    def __init__(self, policy: Policy, name: str) -> None:
        self._policy, self.name = policy, name
        self.batched = hasattr(policy, "infer_batch")

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """The policy's answer. Raises PersistWorldError for its exception."""
        with running("policy", self.name):
            return self._policy.infer(obs)

    def infer_batch(self, observations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The policy's answers to several observations. Raises as `infer`."""
        with running("policy", self.name):
            answers: list[dict[str, Any]] = cast("Any", self._policy).infer_batch(observations)
            return answers

    def reset(self) -> None:
        """Forget the episode so far."""
        with running("policy", self.name):
            self._policy.reset()


def read_joints(obs: Mapping[str, Any]) -> Float:
    """(8,) joints and gripper of an observation. Raises PersistWorldError naming the field that is missing or wrong."""
    joints = _read(obs, (JOINTS, GRIPPER))
    if joints.shape != (8,):
        raise PersistWorldError(f"fields '{JOINTS}' and '{GRIPPER}' have {len(joints)} numbers, not 7 and 1")
    return joints


def _read(obs: Mapping[str, Any], fields: Sequence[str]) -> Float:
    """The numbers of some fields of an observation, in order."""
    parts = []
    for key in fields:
        if key not in obs:
            raise PersistWorldError(f"the observation has no field '{key}'")
        value = np.asarray(obs[key], dtype=np.float64).reshape(-1)
        if not len(value) or not np.isfinite(value).all():
            raise PersistWorldError(f"field '{key}' must be finite numbers, not {obs[key]!r}")
        parts.append(value)
    return np.concatenate(parts)
