"""Action spaces: what the rows of a policy's answer mean (`policy.actions`), and how the arm moves along them.

To add one: write a class (see `ActionSpace`), a line in `ACTION_SPACES`, and its name in `policy.actions`.

Shapes: R rows of an answer (`policy.rate_hz`); a motion has a row more, row 0 is now. D numbers of an action of the
world model, for the Franka its pose: x y z (m), roll pitch yaw (rad), gripper (0 open .. 1 closed). J joints; recorded
joints are these and the gripper, if there is one: for the Franka 7 angles (rad) and the gripper.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.keys import Dimension, dimensions_of
from persistworld_cli.config.plugins import running
from persistworld_cli.config.settings import Settings
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.robot.adapter import JointVelocityAdapter
from persistworld_cli.robot.kinematics import PANDA, Kinematics
from persistworld_cli.robot.kinematics import pose as flange_pose
from persistworld_cli.rollout.recording import Start

Float = NDArray[np.float64]

DEFAULT_ACTIONS = "joint-velocity"
JOINTS = "observation/joint_position"
GRIPPER = "observation/gripper_position"
CARTESIAN = "observation/cartesian_position"
STATE = "observation/state"
_FARTHEST = 0.5  # rad: DROID commands positions at most 0.28 rad from the arm's (952 rows of six episodes)
_FASTEST = 1.0  # DROID's controller slows a faster command down; 0.1 to 99.9% of those rows' velocities: -1.00 .. 1.00
_ELSEWHERE = {"m": 0.01, "cm": 1.0, "mm": 10.0}  # between recorded pose and recorded joints: DROID's agree to 4e-8 m
_FRANKA = dimensions_of(Settings())
# The likely causes of numbers that no policy with this action space answers.
_POSITIONS = (
    "likely cause: joint positions read as velocities; openpi's *_full_droid_finetune and *_jointpos configs need "
    "--actions joint-position"
)
_VELOCITIES = (
    "likely cause: joint velocities read as positions; openpi's pi0_droid, pi0_fast_droid, pi05_droid and "
    "pi05_droid_finetune configs need --actions joint-velocity"
)
_INTO_STOP = "likely cause: the policy drives the joint into its stop; --set policy.joint_limits=stop keeps it there"
_GRIPPER = "likely cause: another scale or sign; a Franka's is 0 open to 1 closed, another arm's as in robot.limits"
_GRIP_SLACK = 0.1  # share of its range by which a gripper's command may be beyond it without a warning
_POSES = "answer x y z (m) of the flange in the base frame and roll pitch yaw (rad, extrinsic xyz), as DROID has them"

logger = logging.getLogger(__name__)


def _parts(what: str, joints: int, grippers: int = 1) -> tuple[str, ...]:
    """What each number of a row is."""
    return (*(f"{what} of joint {i}" for i in range(1, joints + 1)), *["gripper position"] * grippers)


@dataclass(frozen=True)
class ArmState:
    """Action (..., D) of the world model and joints (..., J + 1) that it belongs to, now or at each row of a motion.

    ``joints`` is (..., 0) in an action space without joints.
    """

    pose: Float
    joints: Float

    def __getitem__(self, rows: int | slice | None) -> ArmState:
        return ArmState(self.pose[rows], self.joints[rows])


class ActionSpace(ABC):
    """The meaning of a policy's answer.

    Attributes:
        parts: what each number of a row is, for messages.
        fields: the observation's fields that hold the same numbers of the current state, in order.
        rates: those of the fields that are rates in a row: 0 where the arm stays.
        joints: number of joints of the arm; 0 where none are needed.
        most: largest number that is accepted.
        gripper_cap: largest gripper position; None: not limited.
        is_franka: whether the arm is a Franka, which all action spaces fit.
    """

    parts: tuple[str, ...]
    fields: ClassVar[tuple[str, ...]]
    rates: ClassVar[tuple[str, ...]] = ()
    joints: int = 0
    most: float = float(np.finfo(np.float32).max)
    gripper_cap: float | None = None
    is_franka: bool

    @abstractmethod
    def begin(self, start: Start) -> ArmState:
        """The state at a start. Raises PersistWorldError where the recording lacks it."""

    @abstractmethod
    def observe(self, now: ArmState) -> dict[str, Float]:
        """The state's fields of an observation; copies, since a policy in this process may keep them."""

    def targets(self, actions: Float, now: ArmState) -> Float | None:
        """(R, J) joints that the rows command; None if they command none. Raises PersistWorldError: out of reach."""
        return None

    @abstractmethod
    def follow(self, actions: Float, now: ArmState, taken: int, gripper_stop: float = 1.0) -> ArmState:
        """The motion along an answer.

        Args:
            actions: (R, len(parts)).
            now: the current state.
            taken: rows that the interaction takes; the others are not checked.
            gripper_stop: where a Franka's gripper stops when it closes, since it then holds something; one that is
                closed further stays so until it opens.

        Returns:
            The state at rows 0 .. taken, or more.

        Raises:
            PersistWorldError: the arm cannot move so.
        """


class _Joints(ActionSpace):
    """Base of the action spaces of an arm whose kinematics are known, with or without a gripper.

    Args:
        gripper_cap: largest gripper position of a Franka; another arm's keeps to `robot.limits`.
        cap_current: whether the cap also limits the current gripper position, at row 0.
        stop: keep joints at their limits instead of refusing what is beyond.
        arm: kinematics.
        dimensions: the numbers of a state: the arm's pose, and the gripper's position if it has one.

    Raises:
        UsageError: the kinematics do not give these numbers.
    """

    fields = (JOINTS, GRIPPER)
    what: ClassVar[str]  # in a row, of a joint: position or velocity
    most = 100.0  # 1 is full speed and full grip

    def __init__(
        self,
        gripper_cap: float = 1.0,
        cap_current: bool = False,
        stop: bool = False,
        arm: Kinematics = PANDA,
        dimensions: Sequence[Dimension] = _FRANKA,
    ) -> None:
        self._arm, self._dimensions, self._stop = arm, tuple(dimensions), stop
        self._warned: set[str] = set()
        low, high = np.array(arm.joint_low, dtype=np.float64), np.array(arm.joint_high, dtype=np.float64)
        self.joints, self._low, self._high = len(low), low, high
        width = self._pose((low + high) / 2).shape[-1]
        if width not in (len(dimensions), len(dimensions) - 1):
            raise UsageError(
                f"robot.kinematics gives {width} numbers, but a state has {len(dimensions)}",
                where="robot.kinematics",
                fix="it gives the numbers of a state (robot.dimensions), without the gripper's, which is the last",
            )
        self._grippers = len(dimensions) - width
        self.parts = _parts(self.what, self.joints, self._grippers)
        self.is_franka = arm is PANDA
        if not self.is_franka:
            self.most = ActionSpace.most
        grip = (0.0, gripper_cap) if self.is_franka else (dimensions[-1].low, dimensions[-1].high)
        self._grip_low, self._grip_high = grip
        least, most = (0.0, 1.0) if self.is_franka else grip
        slack = _GRIP_SLACK * (most - least)
        self._grip_usual = least - slack, most + slack
        self.gripper_cap, self._cap_current = gripper_cap if self.is_franka else None, cap_current

    def _pose(self, joints: Float) -> Float:
        """(..., J) joints -> (..., P). Raises PersistWorldError where a user's class fails."""
        with running("kinematics", "robot.kinematics"):
            return np.asarray(self._arm.pose(joints), dtype=np.float64)

    def begin(self, start: Start) -> ArmState:
        """The recorded joints. Raises PersistWorldError if the recorded pose is not theirs."""
        joints, width = start.joints, len(self._dimensions)
        if joints.shape == (self.joints + self._grippers,) and start.pose.shape == (width,):
            pose = np.concatenate([self._pose(joints[: self.joints]), joints[self.joints :]])
            off = np.abs(pose - start.pose)
            if all(off[i] <= _ELSEWHERE.get(one.unit, np.inf) for i, one in enumerate(self._dimensions)):
                return ArmState(pose, joints)
        whose = "a Franka" if self.is_franka else "robot.kinematics"
        raise PersistWorldError(
            f"the recorded states are not poses of {whose} at the recorded joints",
            where=f"episode '{start.item.episode}', frame {start.item.start}",
            fix="--actions model takes a policy that answers with states, of any robot",
        )

    def observe(self, now: ArmState) -> dict[str, Float]:
        """Joints and gripper, as openpi's DROID policies get them."""
        arm, grip = now.joints[: self.joints].copy(), now.joints[self.joints :].copy()
        return {JOINTS: arm, GRIPPER: grip} if self._grippers else {JOINTS: arm}

    def follow(self, actions: Float, now: ArmState, taken: int, gripper_stop: float = 1.0) -> ArmState:
        """The arm's motion; each row's gripper position is reached with it (Ctrl-World's policy rollout)."""
        arm = np.concatenate([now.joints[None, : self.joints], self._move(actions, now, taken)])
        current = now.joints[self.joints :]
        current = np.minimum(current, self._grip_high) if self._cap_current else current
        wanted = actions[:, actions.shape[1] - self._grippers :]
        unusual = (wanted[:taken] < self._grip_usual[0]) | (wanted[:taken] > self._grip_usual[1])
        self._warn_once("gripper", wanted, unusual, "and is cut", _GRIPPER)
        commanded = np.clip(wanted, self._grip_low, self._grip_high)
        if self.is_franka and gripper_stop < 1:
            before = now.joints[self.joints :]
            for row in range(len(commanded)):
                before = commanded[row] = np.minimum(commanded[row], np.maximum(before, gripper_stop))
        grip = np.concatenate([current[None], commanded])[: len(arm)]
        return ArmState(np.concatenate([self._pose(arm), grip], axis=1), np.concatenate([arm, grip], axis=1))

    @abstractmethod
    def _move(self, actions: Float, now: ArmState, taken: int) -> Float:
        """(R, J) joints after each row, at least ``taken`` of them."""

    def _limit(self, joints: Float, taken: int, what: str, cause: str) -> Float:
        """(R, J) joints, kept within their limits if they may not pass them; else the rows taken are checked."""
        low, high = self._low, self._high
        if self._stop:
            return np.clip(joints, low, high)
        if len(beyond := np.argwhere((joints[:taken] < low) | (joints[:taken] > high))):
            row, joint = (int(i) for i in beyond[0])
            unit, ends = " rad" if self.is_franka else "", f"{low[joint]:g} and {high[joint]:g}"
            raise PersistWorldError(
                f"{what} {joints[row, joint]:.4g}{unit} at joint {joint + 1}, whose limits are {ends}{unit}",
                where=f"row {row} of the policy's answer",
                fix=cause,
            )
        return joints

    def _warn_once(self, kind: str, numbers: Float, unusual: NDArray[np.bool_], text: str, cause: str) -> None:
        """Log the first number (R, n) of the run that is unusual, once a kind (joints, gripper)."""
        if kind in self._warned or not unusual.any():
            return
        self._warned.add(kind)
        row, column = (int(i) for i in np.argwhere(unusual)[0])
        part = self.parts[column] if kind == "joints" else self.parts[-1]
        said = "the %s in row %d of the policy's answer is %.4g, %s; %s"
        logger.warning(said, part, row, numbers[row, column], text, cause)


def at_joints(joints: Float) -> ArmState:
    """The state of a Franka at (8,) joints and gripper."""
    joints = np.array(joints, dtype=np.float64)
    return ArmState(np.append(flange_pose(joints[:7]), joints[7]), joints)


class JointVelocity(_Joints):
    """Joint velocities (Franka: seven, 1 is DROID's full speed) and the gripper's position: openpi's DROID policies."""

    what = "velocity"
    parts = _parts(what, PANDA.num_joints)
    rates = (JOINTS,)

    def __init__(self, adapter: JointVelocityAdapter, *limits: Any, **more: Any) -> None:
        super().__init__(*limits, **more)
        self._adapter = adapter

    def _move(self, actions: Float, now: ArmState, taken: int) -> Float:
        rows = actions[:, : self.joints]
        fast = np.abs(rows[:taken]) > _FASTEST
        self._warn_once("joints", actions, fast & self.is_franka, "outside DROID's -1 to 1 (0.1 to 99.9%)", _POSITIONS)
        arm = self._adapter(rows, now.joints[: self.joints])
        cause = _POSITIONS if self.is_franka and fast.any() else _INTO_STOP
        return self._limit(arm, taken, "the arm reaches", cause)


class JointPosition(_Joints):
    """Commanded joints (Franka: seven, rad) and the gripper's position: openpi's ``*_full_droid_finetune``.

    Args:
        gain: share of the way to the commanded joints that the arm covers in a row.
    """

    what = "position"
    parts = _parts(what, PANDA.num_joints)

    def __init__(self, gain: float, *limits: Any, **more: Any) -> None:
        super().__init__(*limits, **more)
        self._gain = gain

    def targets(self, actions: Float, now: ArmState) -> Float:
        """The commanded joints, within the limits."""
        joints = actions[:, : self.joints]
        far = np.abs(joints[:1] - now.joints[: self.joints]) > _FARTHEST
        self._warn_once(
            "joints", actions, far & self.is_franka, f"over {_FARTHEST} rad from where the joint is", _VELOCITIES
        )
        cause = _VELOCITIES if self.is_franka and far.any() else _INTO_STOP
        return self._limit(joints, len(actions), "the policy commands", cause)

    def _move(self, actions: Float, now: ArmState, taken: int) -> Float:
        arm, reached = now.joints[: self.joints], []
        for target in self.targets(actions[:taken], now):
            arm = arm + self._gain * (target - arm)
            reached.append(arm)
        return np.array(reached)


class Pose(JointPosition):
    """A commanded pose (Franka: of the flange, as DROID records it), and the gripper's position.

    As in DROID's controller, inverse kinematics makes commanded joints of it.
    """

    parts = tuple(one.name for one in _FRANKA)
    fields = (CARTESIAN, GRIPPER)

    def __init__(self, gain: float, *limits: Any, **more: Any) -> None:
        super().__init__(gain, *limits, **more)
        self.parts = tuple(one.name for one in self._dimensions)
        self._width = len(self.parts) - self._grippers
        if not hasattr(self._arm, "inverse"):
            fix = "give the class inverse(pose, joints) -> joints or None"
            raise UsageError("policy.actions = 'pose' needs inverse kinematics", where="robot.kinematics", fix=fix)

    def observe(self, now: ArmState) -> dict[str, Float]:
        """The pose beside joints and gripper."""
        return {CARTESIAN: now.pose[: self._width].copy(), **super().observe(now)}

    def targets(self, actions: Float, now: ArmState) -> Float:
        """The joints of each pose, each found from those before it."""
        joints, arm = [now.joints[: self.joints]], cast("Any", self._arm)
        for row, goal in enumerate(actions[:, : self._width]):
            with running("kinematics", "robot.kinematics"):
                found = arm.inverse(goal, joints[-1])
            if found is None:
                shown, whose = ", ".join(f"{value:.3f}" for value in goal), "Franka" if self.is_franka else "arm"
                what = f"the {whose} cannot reach pose ({shown}) within its joints' limits"
                fix = _POSES if self.is_franka else "answer poses as the dataset has them"
                raise PersistWorldError(what, where=f"row {row} of the policy's answer", fix=fix)
            joints.append(np.asarray(found, dtype=np.float64))
        return np.array(joints[1:])


class ModelActions(ActionSpace):
    """The world model's own actions, for any robot: states within `robot.limits`, without lag."""

    fields = (STATE,)

    def __init__(self, settings: Settings) -> None:
        self._dimensions, self.is_franka = dimensions_of(settings), not settings.robot.dimensions
        self.parts = tuple(one.name for one in self._dimensions)

    def begin(self, start: Start) -> ArmState:
        """The recorded state."""
        return ArmState(start.pose, np.empty(0))

    def observe(self, now: ArmState) -> dict[str, Float]:
        """The state, as openpi's policies of robots other than DROID get it."""
        return {STATE: now.pose.copy()}

    def follow(self, actions: Float, now: ArmState, taken: int, gripper_stop: float = 1.0) -> ArmState:
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


ACTION_SPACES: Mapping[str, type[ActionSpace]] = {
    DEFAULT_ACTIONS: JointVelocity,
    "joint-position": JointPosition,
    "pose": Pose,
    "model": ModelActions,
}
