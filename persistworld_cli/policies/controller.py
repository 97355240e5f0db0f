"""A policy as the controller of rollouts: its answers become the poses of the next interaction.

Shapes: B rollouts, L rows of an interaction (row 0 is the current pose), R rows of a policy's answer, V
cameras, H, W pixels, D numbers of a pose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.policies.action_spaces import ActionSpace, ArmState
from persistworld_cli.policies.observation import Policy, PolicyView, ask_policies

Float = NDArray[np.float64]
Images = NDArray[np.uint8]


@dataclass
class PolicyTrace:
    """The arm's motion in one rollout, at `policy.rate_hz`, (L-1) x skip rows per interaction (Ctrl-World's keys).

    ``answers``: the policy's rows; ``joint_vel``: the velocities in them, if it answers velocities.
    """

    joint_pos: list[list[float]] = field(default_factory=list)
    joint_vel: list[list[float]] = field(default_factory=list)
    state_fk: list[list[float]] = field(default_factory=list)
    answers: list[list[float]] = field(default_factory=list)

    def add(self, motion: ArmState, actions: Float, space: ActionSpace) -> None:
        """Add the states at some rows, and what the policy answered for them."""
        if space.joints:
            self.joint_pos += motion.joints[:, : space.joints].tolist()
        self.state_fk += motion.pose.tolist()
        self.answers += actions.tolist()
        if space.rates:
            self.joint_vel += actions[:, : space.joints].tolist()

    def cut(self, rows: int) -> None:
        """Keep the first rows only."""
        for part in (self.joint_pos, self.joint_vel, self.state_fk, self.answers):
            del part[rows:]


class PolicyController:
    """Asks a policy for each rollout in each interaction; its answers give the poses.

    Args:
        policies: one per rollout, since a policy may have a memory; a batched one as often.
        view: the policy's observation and the reading of its answer.
        starts: each rollout's state at the start.
        prompts: each rollout's instruction.
        gripper_stops: where each rollout's gripper stops (`ActionSpace.follow`); by default none does.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        view: PolicyView,
        starts: Sequence[ArmState],
        prompts: Sequence[str],
        gripper_stops: Sequence[float] = (),
    ) -> None:
        self._policies, self._view, self._prompts = list(policies), view, list(prompts)
        self._stops = list(gripper_stops) or [1.0] * len(self._prompts)
        self.states = list(starts)
        self._before = [list(starts)]  # the states at the start of each interaction
        self.traces = [PolicyTrace() for _ in policies]

    def poses(self, images: Images) -> Float:
        """(B, L, D): poses of the next interaction, given the current images (B, V, H, W, 3) uint8.

        Raises:
            PersistWorldError: a policy failed, or its answer cannot be followed. No rollout advances then.
        """
        view, end = self._view, self._view.advance
        answers = ask_policies(self._policies, view, images, self.states, self._prompts)
        rows = zip(answers, self.states, self._stops, strict=True)
        motions = [view.space.follow(actions, now, end, stop) for actions, now, stop in rows]
        for trace, motion, actions in zip(self.traces, motions, answers, strict=True):
            trace.add(motion[:end], actions[:end], view.space)
        self.states = [motion[end] for motion in motions]
        self._before.append(self.states)
        return np.stack([motion.pose[: end + 1 : view.skip] for motion in motions])

    def keep(self, interactions: int) -> None:
        """Forget what came after so many interactions: the answer to one that the world model did not make."""
        self._before = self._before[: interactions + 1]
        self.states = self._before[-1]
        for trace in self.traces:
            trace.cut(interactions * self._view.advance)
