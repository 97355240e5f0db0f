"""Rollouts in the bundled world's simulator: restore a recorded start, then follow a policy's answers.

MuJoCo and the world's recorder are only imported here, on use (``pip install -e '.[sim]'``).

Shape legend: F frames, V cameras, H, W pixels, N objects, L rows of an interaction.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from persistworld_cli.config.settings import Settings
from persistworld_cli.data.raw.resize import resize
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.policies.action_spaces import ArmState
from persistworld_cli.policies.bundled_world.rules import Condition, Outcome, Task, pad_positions, read_instruction
from persistworld_cli.policies.bundled_world.scene import RecordedStart
from persistworld_cli.policies.controller import PolicyTrace
from persistworld_cli.policies.observation import Policy, PolicyView, ask_policies
from persistworld_cli.policies.outputs import POLICY_HZ, PolicyRollout
from persistworld_cli.read_files import as_object, parse_json, reading, whole_number
from persistworld_cli.rollout.interactive import Float
from persistworld_cli.rollout.recording import Start

_INSTALL = "in a checkout of the repository: pip install -e '.[sim]'"
_DRAWING = "apt install libegl1 libegl-mesa0 libgl1-mesa-dri (drawing without a screen)"
_STATE = ("observation.state.joint_position", "observation.state.gripper_position", "sim.object_pose")
_ORIGIN_KEY = b"persistworld_example"


@dataclass(frozen=True)
class SimRollout:
    """One rollout in the simulator: as an imagined one, plus the ground truth.

    Attributes:
        positions: (F, N, 3) of the objects, m.
        truth: success and progress from the simulator's state; None if the instruction is not one of this world's, or
            the rollout is shorter than the time for which a condition must hold.
        reset_error: m or rad, largest deviation from the recording when it is repeated up to the start.
    """

    rollout: PolicyRollout
    positions: Float
    truth: Outcome | None
    reset_error: float


def check_simulator() -> None:
    """Refuse early a machine without MuJoCo, the recorder or a renderer. Raises PersistWorldError."""
    recorder = _recorder()
    try:
        recorder.mujoco.GLContext(16, 16).free()
    except Exception as error:  # each driver fails in its own way
        raise PersistWorldError(f"MuJoCo cannot draw here: {error!r}", where="--against sim", fix=_DRAWING) from error


def _recorder() -> Any:
    """The recorder's module that runs the world."""
    try:
        return importlib.import_module("dataset_example.recorder.live")
    except ModuleNotFoundError as error:
        what = "MuJoCo is not installed" if error.name == "mujoco" else f"module '{error.name}' is not installed"
        raise PersistWorldError(what, where="--against sim", fix=_INSTALL) from error
    except Exception as error:  # without its libraries, importing PyOpenGL fails in several ways
        raise PersistWorldError(f"MuJoCo cannot draw here: {error!r}", where="--against sim", fix=_DRAWING) from error


def recorded_origin(recorded: RecordedStart) -> tuple[int, str]:
    """The seed of an episode's recording, and the name of its design (`VARIED` if it has no name).

    Raises:
        PersistWorldError: they are missing, or this checkout does not know the design.
    """
    table, recorder = recorded.raw.episode(recorded.index).table, _recorder()
    what = "the recording lacks the seed of its scene"
    with reading(what, table, "record it with python -m dataset_example.recorder"):
        entry = as_object(parse_json(pq.read_schema(table).metadata[_ORIGIN_KEY].decode()))
        seed, design = whole_number(entry["seed"], "seed"), str(entry.get("design", recorder.VARIED.name))
    if design not in recorder.DESIGNS:
        raise PersistWorldError(
            f"the recording has the design '{design}', unknown here ({', '.join(recorder.DESIGNS)})",
            where=str(table),
            fix="use the version of the repository that recorded it",
        )
    return seed, design


@contextmanager
def restored(recorded: RecordedStart) -> Iterator[tuple[Any, float]]:
    """The simulated world restored at a recorded start (the recorder's `LiveWorld`), and its reset error (m or rad)."""
    ticks = round(float(recorded.raw.clock(recorded.index).times[recorded.row]) * POLICY_HZ)
    state = {name: values[recorded.row] for name, values in recorded.raw.read(recorded.index, _STATE).items()}
    joints, gripper, objects = (state[name] for name in _STATE)
    seed, design = recorded_origin(recorded)
    world, error = _recorder().restore(
        seed,
        recorded.index,
        ticks,
        design=design,
        joints=joints,
        gripper=float(np.ravel(gripper)[0]),
        objects=objects.reshape(-1, 7),
    )
    try:
        yield world, error
    finally:
        world.close()


def roll_in_simulator(
    settings: Settings, start: Start, recorded: RecordedStart, policy: Policy, view: PolicyView, steps: int
) -> SimRollout:
    """Roll a policy out in the simulator from a recorded start.

    The policy sees the simulated cameras at the size of the world model's images, and the measured joints. Its
    answer moves the arm's targets row by row, as the dataset defines them, for as many rows as the world model gets.
    The gripper gets the whole command: what it holds stops it, as a task's `gripper_stops` do in the world model.

    Raises:
        PersistWorldError: the policy failed.
    """
    trace, poses = PolicyTrace(), []
    frames: list[NDArray[np.uint8]] = []
    positions: list[Float] = []
    size = settings.world.height, settings.world.width

    def look() -> None:
        frames.append(resize(world.images(), *size))
        positions.append(world.positions())

    with restored(recorded) as (world, error):
        now = _measure(world)
        look()
        policy.reset()
        for _ in range(steps):
            (answer,) = ask_policies([policy], view, frames[-1:], [now], [start.text])
            actions = answer[: view.advance]
            targets = view.space.targets(actions, now)
            rows = [now.pose]
            for number, action in enumerate(actions):
                trace.add(now[None], action[None], view.space)
                gripper = float(np.clip(action[-1], 0, 1))
                if targets is None:
                    world.drive(action[:7], gripper)
                else:
                    world.tick(targets[number], gripper)
                now = _measure(world)
                if (number + 1) % view.skip == 0:
                    look()
                    rows.append(now.pose)
            poses.append(np.stack(rows))
        half = np.array([item.half for item in world.objects])
    rollout = PolicyRollout(
        start=start,
        frames=np.stack(frames),
        poses=np.stack(poses),
        trace=trace,
        joints_end=now.joints,
        skip=view.skip,
    )
    task, places = read_instruction(start.text, [item.name for item in recorded.objects]), np.stack(positions)
    truth = None
    if isinstance(task, Task):
        pads = pad_positions(rollout.frame_poses)
        truth = Condition(task, half, places[0]).outcome(places, pads, rollout.fps)
    return SimRollout(rollout, places, truth, error)


def _measure(world: Any) -> ArmState:
    """Joints and pose of the simulated arm, each with the gripper."""
    now = world.observe()
    gripper = [float(now["observation.state.gripper_position"])]
    return ArmState(
        np.concatenate([now["observation.state.cartesian_position"], gripper]),
        np.concatenate([now["observation.state.joint_position"], gripper]),
    )
