"""The bundled world's simulator behind a rollout: a recorded start restored, driven by a policy's joint velocities.

MuJoCo and the world's recorder are only imported here, and only when they are asked for (``pip install -e '.[sim]'``).

Shape legend: F frames, V cameras, H, W pixels, N objects, L rows of an interaction.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from persistworld_cli.config.settings import Settings
from persistworld_cli.data.raw.resize import resize
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.policies.bundled_world.scene import RecordedStart
from persistworld_cli.policies.bundled_world.success import (
    Outcome,
    frames_kept,
    outcome,
    pad_positions,
    read_instruction,
)
from persistworld_cli.policies.controller import ActingPolicy, PolicyTrace, PolicyView, ask_policy
from persistworld_cli.policies.judge import SceneObject
from persistworld_cli.policies.outputs import POLICY_HZ, Rollout
from persistworld_cli.read_files import as_object, parse_json, reading, whole_number
from persistworld_cli.rollout.interactive import Float
from persistworld_cli.rollout.recording import Start

_INSTALL = "in a checkout of the repository: pip install -e '.[sim]'"
_DRAWING = "apt install libegl1 libegl-mesa0 libgl1-mesa-dri (drawing without a screen)"
_STATE = ("observation.state.joint_position", "observation.state.gripper_position", "sim.object_pose")
_ORIGIN_KEY = b"persistworld_example"


@dataclass(frozen=True)
class SimRollout:
    """One rollout in the simulator: as an imagined one, with where the objects truly were (F, N, 3), and what of it."""

    rollout: Rollout
    positions: Float
    truth: Outcome | None  # None: the instruction is none of this world's
    restored_off: float  # m or rad: how far repeating the recording up to the start was off it


def check_simulator() -> None:
    """Refuse, before any compute, a machine without MuJoCo, the world's recorder, or a way to draw.

    Raises:
        PersistWorldError: saying how to install what is missing.
    """
    recorder = _recorder()
    try:
        recorder.mujoco.GLContext(16, 16).free()
    except Exception as error:  # each driver fails in a way of its own
        raise PersistWorldError(f"MuJoCo cannot draw here: {error!r}", where="--against sim", fix=_DRAWING) from error


def _recorder() -> Any:
    """The recorder's module that drives the world."""
    if sys.platform.startswith("linux"):
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's software renderer: one process, one core
    try:
        return importlib.import_module("dataset_example.recorder.live")
    except ModuleNotFoundError as error:
        what = "MuJoCo is not installed" if error.name == "mujoco" else f"module '{error.name}' is not installed"
        raise PersistWorldError(what, where="--against sim", fix=_INSTALL) from error
    except Exception as error:  # without its libraries, importing PyOpenGL fails in several ways
        raise PersistWorldError(f"MuJoCo cannot draw here: {error!r}", where="--against sim", fix=_DRAWING) from error


def recorded_origin(recorded: RecordedStart) -> tuple[int, str]:
    """The seed that an episode was recorded with, and the name of its world's design.

    Recordings made before there were designs name none: they are of the recorder's `VARIED`.

    Raises:
        PersistWorldError: it does not tell, or this checkout does not know the design.
    """
    table, recorder = recorded.raw.episode(recorded.index).table, _recorder()
    what = "the recording does not tell the seed that its scene comes from"
    with reading(what, table, "record it with python -m dataset_example.recorder"):
        entry = as_object(parse_json(pq.read_schema(table).metadata[_ORIGIN_KEY].decode()))
        seed, design = whole_number(entry["seed"], "seed"), str(entry.get("design", recorder.VARIED.name))
    if design not in recorder.DESIGNS:
        raise PersistWorldError(
            f"the recording is of the design '{design}', unknown here ({', '.join(recorder.DESIGNS)})",
            where=str(table),
            fix="use the version of the repository that recorded it",
        )
    return seed, design


@contextmanager
def restored(recorded: RecordedStart, *, render: bool = True) -> Iterator[tuple[Any, float]]:
    """The simulated world as it stood at a recorded start (the recorder's `LiveWorld`), and how far it is off."""
    ticks = round(recorded.row * POLICY_HZ / recorded.raw.fps)
    state = {name: values[recorded.row] for name, values in recorded.raw.read(recorded.index, _STATE).items()}
    joints, gripper, objects = (state[name] for name in _STATE)
    seed, design = recorded_origin(recorded)
    world, off = _recorder().restore(
        seed,
        recorded.index,
        ticks,
        design=design,
        joints=joints,
        gripper=float(np.ravel(gripper)[0]),
        objects=objects.reshape(-1, 7),
        render=render,
    )
    try:
        yield world, off
    finally:
        world.close()


def roll_in_simulator(
    settings: Settings, start: Start, recorded: RecordedStart, policy: ActingPolicy, view: PolicyView, steps: int
) -> SimRollout:
    """A policy acts in the simulator from a recorded start.

    It sees the simulated cameras at the size of the world model's images, and the measured joints; its velocities
    move the arm's targets as the dataset defines them, row by row, as many rows as the world model is given.

    Raises:
        PersistWorldError: the policy failed.
    """
    watch = _Watch(settings, start, recorded.objects)
    trace, poses = PolicyTrace(), []
    with restored(recorded) as (world, off):
        rule = _recorder().success_rule(start.text, world.objects, world.snapshot())
        watch.see(world, rule)
        policy.reset()
        for _ in range(steps):
            actions = ask_policy(policy, view, watch.frames[-1], watch.joints, start.text)
            rows = [watch.pose]
            for number in range((view.rows - 1) * view.skip):
                trace.joint_pos.append(watch.joints[:7].tolist())
                trace.joint_vel.append(actions[number, :7].tolist())
                trace.state_fk.append(watch.pose.tolist())
                world.drive(actions[number, :7], float(np.clip(actions[number, 7], 0, view.gripper_cap)))
                watch.feel(world)
                if (number + 1) % view.skip == 0:
                    watch.see(world, rule)
                    rows.append(watch.pose)
            poses.append(np.stack(rows))
    rollout = Rollout(
        start=start,
        frames=np.stack(watch.frames),
        poses=np.stack(poses),
        trace=trace,
        joints_end=watch.joints,
        skip=view.skip,
        seconds=(),
    )
    positions = np.stack(watch.positions)
    return SimRollout(rollout, positions, watch.truth(positions, rollout), off)


class _Watch:
    """What is seen and measured of a simulated world as it goes on."""

    def __init__(self, settings: Settings, start: Start, objects: tuple[SceneObject, ...]) -> None:
        self._world, self._start, self._objects = settings.world, start, objects
        self.frames: list[NDArray[np.uint8]] = []
        self.positions: list[Float] = []
        self._held: list[bool] = []
        self._known = True
        self.joints: Float = np.zeros(8)
        self.pose: Float = np.zeros(7)

    def feel(self, world: Any) -> None:
        """Joints and pose of now."""
        now = world.observe()
        gripper = [float(now["observation.state.gripper_position"])]
        self.joints = np.concatenate([now["observation.state.joint_position"], gripper])
        self.pose = np.concatenate([now["observation.state.cartesian_position"], gripper])

    def see(self, world: Any, rule: Callable[[Any], bool] | None) -> None:
        """A frame: images, places of the objects, and whether the recorder's condition holds."""
        self.feel(world)
        self.frames.append(resize(world.images(), self._world.height, self._world.width))
        now = world.snapshot()
        self.positions.append(now.positions)
        self._held.append(bool(rule(now)) if rule else False)
        self._known = rule is not None

    def truth(self, positions: Float, rollout: Rollout) -> Outcome | None:
        """Success by the recorder's condition, kept as long as the judge's must be; progress from the true places."""
        aim = read_instruction(self._start.text, self._objects)
        if isinstance(aim, str) or not self._known:
            return None
        pads = pad_positions(rollout.frame_poses)
        found = outcome(aim, self._objects, positions, pads, rollout.fps)
        window = min(frames_kept(rollout.fps), len(self._held))
        kept = bool(np.lib.stride_tricks.sliding_window_view(self._held, window).all(axis=1).any())
        return Outcome(kept, found.progress if found else 0.0)
