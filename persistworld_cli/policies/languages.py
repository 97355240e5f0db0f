"""Action languages: what the rows of a policy's answer mean (`policy.actions`), and how the arm moves along them.

To add one: write a class (see `ActionLanguage`), a line in `LANGUAGES`, and its name in `policy.actions`.

Shapes: R rows of an answer at 15 Hz; a motion has a row more, row 0 is now. D numbers of an action of the world model,
for the Franka its pose: x y z (m), roll pitch yaw (rad), gripper (0 open .. 1 closed). Joints are 7 angles (rad) and
the gripper.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.keys import dimensions_of
from persistworld_cli.config.settings import Settings
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.robot.adapter import ActionAdapter
from persistworld_cli.robot.kinematics import PANDA, inverse
from persistworld_cli.robot.kinematics import pose as flange_pose
from persistworld_cli.rollout.interactive import require_dimensions
from persistworld_cli.rollout.recording import Start

Float = NDArray[np.float64]

DEFAULT_ACTIONS = "joint-velocity"
JOINTS = "observation/joint_position"
GRIPPER = "observation/gripper_position"
CARTESIAN = "observation/cartesian_position"
STATE = "observation/state"
_FARTHEST = 0.5  # rad: DROID commands positions at most 0.28 rad from the arm's (952 rows of six episodes)
_FASTEST = 1.0  # DROID's controller slows a faster command down; 0.1 to 99.9% of those rows' velocities: -1.00 .. 1.00
_ELSEWHERE = 0.01  # m between recorded pose and recorded joints: DROID's agree to 4e-8
# The likely causes of numbers that no policy of the language answers.
_POSITIONS = (
    "likely cause: joint positions read as velocities; openpi's *_full_droid_finetune and *_jointpos configs need "
    "--actions joint-position"
)
_VELOCITIES = (
    "likely cause: joint velocities read as positions; openpi's pi0_droid, pi0_fast_droid, pi05_droid and "
    "pi05_droid_finetune configs need --actions joint-velocity"
)
_INTO_STOP = "likely cause: the policy drives the joint into its stop; --set policy.joint_limits=stop keeps it there"
_POSES = "answer x y z (m) of the flange in the base frame and roll pitch yaw (rad, extrinsic xyz), as DROID has them"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ArmState:
    """Action (..., D) of the world model and joints (..., 8) that it belongs to, now or at each row of a motion.

    ``joints`` is (..., 0) in a language that does not need them.
    """

    pose: Float
    joints: Float

    def __getitem__(self, rows: int | slice | None) -> ArmState:
        return ArmState(self.pose[rows], self.joints[rows])


class ActionLanguage(ABC):
    """The meaning of a policy's answer.

    Attributes:
        parts: what each number of a row is, for messages.
        fields: the observation's fields that hold the same numbers of the current state, in order.
        rates: leading numbers of a row that are rates, which are 0 where the arm stays.
        most: largest number that is accepted.
        gripper_cap: largest gripper position; None: not limited.
    """

    parts: tuple[str, ...]
    fields: ClassVar[tuple[str, ...]]
    rates: ClassVar[int] = 0
    most: ClassVar[float] = float(np.finfo(np.float32).max)
    gripper_cap: float | None = None

    @abstractmethod
    def begin(self, start: Start) -> ArmState:
        """The state at a start. Raises PersistWorldError where the recording lacks it."""

    @abstractmethod
    def observe(self, now: ArmState) -> dict[str, Float]:
        """The state's fields of an observation; copies, since a policy in this process may keep them."""

    def targets(self, actions: Float, now: ArmState) -> Float | None:
        """(R, 7) joints that the rows command; None if they command none. Raises PersistWorldError: out of reach."""
        return None

    @abstractmethod
    def follow(self, actions: Float, now: ArmState, taken: int) -> ArmState:
        """The motion along an answer.

        Args:
            actions: (R, len(parts)).
            now: the current state.
            taken: rows that the interaction takes; the others are not checked.

        Returns:
            The state at rows 0 .. taken, or more.

        Raises:
            PersistWorldError: the arm cannot move so.
        """


class _Franka(ActionLanguage):
    """Base of the languages of a Franka arm with a gripper.

    Args:
        gripper_cap: largest gripper position.
        cap_current: whether the cap also limits the current gripper position, at row 0.
        stop: keep joints at their limits instead of refusing what is beyond.
    """

    fields = (JOINTS, GRIPPER)
    most = 100.0  # 1 is full speed and full grip
    gripper_cap: float

    def __init__(self, gripper_cap: float = 1.0, cap_current: bool = False, stop: bool = False) -> None:
        self.gripper_cap, self._cap_current, self._stop, self._warned = gripper_cap, cap_current, stop, False

    def begin(self, start: Start) -> ArmState:
        """The recorded joints. Raises PersistWorldError if the recorded pose is not theirs."""
        now = at_joints(start.joints) if start.pose.shape == (7,) and start.joints.shape == (8,) else None
        if now is None or np.abs(now.pose - start.pose)[:3].max() > _ELSEWHERE:
            raise PersistWorldError(
                "the recorded states are not poses of a Franka at the recorded joints",
                where=f"episode '{start.item.episode}', frame {start.item.start}",
                fix="--actions model takes a policy that answers with states, of any robot",
            )
        return now

    def observe(self, now: ArmState) -> dict[str, Float]:
        """Joints and gripper, as openpi's DROID policies get them."""
        return {JOINTS: now.joints[:7].copy(), GRIPPER: now.joints[7:].copy()}

    def follow(self, actions: Float, now: ArmState, taken: int) -> ArmState:
        """The arm's motion; each row's gripper position is reached with it (Ctrl-World's policy rollout)."""
        arm = np.concatenate([now.joints[None, :7], self._move(actions, now, taken)])
        current = np.minimum(now.joints[7:], self.gripper_cap) if self._cap_current else now.joints[7:]
        grip = np.concatenate([current, np.clip(actions[:, -1], 0.0, self.gripper_cap)])[: len(arm), None]
        return ArmState(np.concatenate([flange_pose(arm), grip], axis=1), np.concatenate([arm, grip], axis=1))

    @abstractmethod
    def _move(self, actions: Float, now: ArmState, taken: int) -> Float:
        """(R, 7) joints after each row, at least ``taken`` of them."""

    def _limit(self, joints: Float, taken: int, what: str, cause: str) -> Float:
        """(R, 7) joints, kept within the Franka's limits if they may not pass them; else the rows taken are checked."""
        low, high = np.array(PANDA.joint_low), np.array(PANDA.joint_high)
        if self._stop:
            return np.clip(joints, low, high)
        if len(beyond := np.argwhere((joints[:taken] < low) | (joints[:taken] > high))):
            row, joint = (int(i) for i in beyond[0])
            value = joints[row, joint]
            raise PersistWorldError(
                f"{what} {value:.4g} rad at joint {joint + 1}, whose limits are {low[joint]:g} and {high[joint]:g} rad",
                where=f"row {row} of the policy's answer",
                fix=cause,
            )
        return joints

    def _warn_once(self, actions: Float, unusual: NDArray[np.bool_], text: str, cause: str) -> None:
        """Log the first unusual number (R, 7) of the run."""
        if self._warned or not unusual.any():
            return
        self._warned = True
        row, joint = (int(i) for i in np.argwhere(unusual)[0])
        value = actions[row, joint]
        said = "the %s in row %d of the policy's answer is %.4g, %s; %s"
        logger.warning(said, self.parts[joint], row, value, text, cause)


def at_joints(joints: Float) -> ArmState:
    """The state of a Franka at (8,) joints and gripper."""
    joints = np.array(joints, dtype=np.float64)
    return ArmState(np.append(flange_pose(joints[:7]), joints[7]), joints)


class JointVelocity(_Franka):
    """Seven joint velocities (1: DROID's full speed) and the gripper's position: openpi's DROID policies."""

    parts = (*(f"velocity of joint {i}" for i in range(1, 8)), "gripper position")
    rates = 7

    def __init__(self, adapter: ActionAdapter, *limits: Any, **more: Any) -> None:
        super().__init__(*limits, **more)
        self._adapter = adapter

    def _move(self, actions: Float, now: ArmState, taken: int) -> Float:
        fast = np.abs(actions[:taken, :7]) > _FASTEST
        self._warn_once(actions, fast, "outside DROID's -1 to 1 (0.1 to 99.9%)", _POSITIONS)
        arm = self._adapter(actions[:, :7], now.joints[:7])
        return self._limit(arm, taken, "the arm reaches", _POSITIONS if fast.any() else _INTO_STOP)


class JointPosition(_Franka):
    """Seven commanded joint angles (rad) and the gripper's position: openpi's ``*_full_droid_finetune``.

    Args:
        gain: share of the way to the commanded joints that the arm covers in a row.
    """

    parts = (*(f"position of joint {i}" for i in range(1, 8)), "gripper position")

    def __init__(self, gain: float, *limits: Any, **more: Any) -> None:
        super().__init__(*limits, **more)
        self._gain = gain

    def targets(self, actions: Float, now: ArmState) -> Float:
        """The commanded joints, within the limits."""
        far = np.abs(actions[:1, :7] - now.joints[:7]) > _FARTHEST
        self._warn_once(actions, far, f"over {_FARTHEST} rad from where the joint is", _VELOCITIES)
        cause = _VELOCITIES if far.any() else _INTO_STOP
        return self._limit(actions[:, :7], len(actions), "the policy commands", cause)

    def _move(self, actions: Float, now: ArmState, taken: int) -> Float:
        arm, reached = now.joints[:7], []
        for target in self.targets(actions[:taken], now):
            arm = arm + self._gain * (target - arm)
            reached.append(arm)
        return np.array(reached)


class Pose(JointPosition):
    """A commanded pose of the flange, as DROID records it, and the gripper's position.

    As in DROID's controller, inverse kinematics makes commanded joints of it.
    """

    parts = ("x", "y", "z", "roll", "pitch", "yaw", "gripper position")
    fields = (CARTESIAN, GRIPPER)

    def observe(self, now: ArmState) -> dict[str, Float]:
        """The flange's pose beside joints and gripper."""
        return {CARTESIAN: now.pose[:6].copy(), **super().observe(now)}

    def targets(self, actions: Float, now: ArmState) -> Float:
        """The joints of each pose, each found from those before it."""
        joints = [now.joints[:7]]
        for row, goal in enumerate(actions[:, :6]):
            found = inverse(goal, joints[-1])
            if found is None:
                shown = ", ".join(f"{value:.3f}" for value in goal)
                what = f"the Franka cannot reach pose ({shown}) within its joints' limits"
                raise PersistWorldError(what, where=f"row {row} of the policy's answer", fix=_POSES)
            joints.append(found)
        return np.array(joints[1:])


class ModelActions(ActionLanguage):
    """The world model's own actions, for any robot: states within `robot.limits`, without lag."""

    fields = (STATE,)

    def __init__(self, settings: Settings) -> None:
        self._settings, self._dimensions = settings, dimensions_of(settings)
        self.parts = tuple(one.name for one in self._dimensions)

    def begin(self, start: Start) -> ArmState:
        """The recorded state. Raises PersistWorldError unless `robot.dimensions` names its numbers."""
        require_dimensions(self._settings, start)
        return ArmState(start.pose, np.empty(0))

    def observe(self, now: ArmState) -> dict[str, Float]:
        """The state, as openpi's policies of robots other than DROID get it."""
        return {STATE: now.pose.copy()}

    def follow(self, actions: Float, now: ArmState, taken: int) -> ArmState:
        """The rows as they are."""
        for column, one in enumerate(self._dimensions):
            outside = np.flatnonzero((actions[:taken, column] < one.low) | (actions[:taken, column] > one.high))
            if len(outside):
                value, row = actions[outside[0], column], outside[0]
                raise PersistWorldError(
                    f"the policy commands {one.name} = {value:.4g}, limited to {one.low:g} to {one.high:g} {one.unit}",
                    where=f"row {row} of the policy's answer",
                    fix="answer states as the dataset has them, or widen robot.limits",
                )
        poses = np.concatenate([now.pose[None], actions])
        return ArmState(poses, np.empty((len(poses), 0)))


LANGUAGES: Mapping[str, type[ActionLanguage]] = {
    DEFAULT_ACTIONS: JointVelocity,
    "joint-position": JointPosition,
    "pose": Pose,
    "model": ModelActions,
}
