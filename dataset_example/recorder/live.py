"""The world, driven from outside: a recorded episode's scene at one of its frames, moved by joint targets.

`restore` builds the scene of (design, seed, episode id) again, cameras, colours and textures included, with arm,
gripper and objects where the recording has them. The arm then follows targets as the dataset's actions define them.
"""

from __future__ import annotations

import mujoco
import numpy as np

from .design import DESIGNS, VARIED
from .episode import PHYSICS_STEPS, Actor, Cameras, World, build_world
from .robot import CONTROL_HZ, FRAME_HZ, JOINT_HIGH, JOINT_LOW, VELOCITY_GAIN
from .scene import ObjectSpec

__all__ = ["DESIGNS", "VARIED", "LiveWorld", "restore"]

REPEATED = 1e-3  # m, rad: closer than this to the record, a repetition is the recorded motion


class LiveWorld:
    """A restored scene; one `tick` is a 15 Hz frame. Only its images need OpenGL."""

    def __init__(self, world: World, objects: tuple[ObjectSpec, ...]) -> None:
        self.objects = objects
        self._world = world
        self._target = world.data.ctrl.copy()  # 7 joints, and the opening of a finger
        self._cameras: Cameras | None = None

    def observe(self) -> dict[str, np.ndarray]:
        """The recorder's columns of now: joints, gripper, flange pose, objects."""
        return self._world.observe()

    def positions(self) -> np.ndarray:
        """(3, 3): the objects' centres, m."""
        return self._world.snapshot().positions

    def images(self) -> np.ndarray:
        """uint8 (cameras, height, width, 3)."""
        if self._cameras is None:
            self._cameras = Cameras(self._world, 1)
        self._world.observe()  # kinematics of now
        return self._cameras.look()

    def drive(self, velocity: np.ndarray, gripper: float) -> None:
        """One tick along joint velocities (7,): a velocity of 1 moves a target by `VELOCITY_GAIN` per tick."""
        joints = self._target[:7] + VELOCITY_GAIN * np.clip(velocity, -1, 1)
        self.tick(np.clip(joints, JOINT_LOW + 0.02, JOINT_HIGH - 0.02), gripper)

    def tick(self, joints: np.ndarray, gripper: float) -> None:
        """One tick: the arm's targets go evenly to `joints` (7,), the gripper's to `gripper` (0 open .. 1 closed)."""
        begun = self._target.copy()
        self._target = np.append(joints, self._world.stroke * (1 - gripper))
        data, parts = self._world.data, CONTROL_HZ // FRAME_HZ
        for part in range(1, parts + 1):
            data.ctrl[:] = begun + (self._target - begun) * part / parts
            mujoco.mj_step(self._world.model, data, PHYSICS_STEPS)

    def close(self) -> None:
        if self._cameras is not None:
            self._cameras.close()


def restore(
    seed: int,
    episode_id: int,
    ticks: int,
    *,
    design: str,
    joints: np.ndarray,
    gripper: float,
    objects: np.ndarray,
) -> tuple[LiveWorld, float]:
    """The scene of an episode after so many 15 Hz frames, and the error of the repetition (m or rad).

    The recorded motion is simulated again up to there, so that speeds and grasps are restored too. Where this MuJoCo
    (of another version) does not repeat the recording, everything is placed where the recording has it, at rest.

    Args:
        seed, episode_id: of the recording.
        ticks: frames from its beginning.
        design: name of the recording's world, one of `DESIGNS`.
        joints, gripper, objects: as recorded there: (7,) rad, 0 open .. 1 closed, (3, 7) position and quaternion.
    """
    world, director = build_world(seed, episode_id, DESIGNS[design])
    actor = Actor(world, director)
    for _ in range(ticks):
        actor.tick()
    now = world.observe()
    moved = np.abs(now["sim.object_pose"].reshape(-1, 7) - objects)[:, :3].max()
    off = float(max(moved, np.abs(now["observation.state.joint_position"] - joints).max()))
    if off > REPEATED:
        world.place(joints, gripper, objects)
    return LiveWorld(world, director.objects), off
