"""One episode: simulate the scripted motion, read the robot at the frame rate, render the cameras.

The motion is a function of (seed, episode id) alone. Frames are taken from it at `fps` (a divisor of 15), so a
recording at 5 fps holds every third frame of the one at 15.
"""

from __future__ import annotations

import dataclasses

import mujoco
import numpy as np

from persistworld_cli.policies.bundled_world.rules import FLANGE_TO_PADS, IMAGE_HEIGHT, IMAGE_WIDTH
from persistworld_cli.robot.kinematics import pose as flange_pose
from persistworld_cli.robot.kinematics import pose_of_frame

from .design import DEFAULT, Design
from .robot import CONTROL_HZ, FRAME_HZ, VELOCITY_GAIN, ArmController, Waypoint
from .scene import CAMERAS, ObjectSpec, build_model, sample_scene
from .tasks import Director, Snapshot, start_waypoint

PHYSICS_STEPS = 5  # per control period, at 300 Hz
LOST = 0.06  # m between the fingers and an object that they should hold


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
    """T frames: arrays by column name, images by camera (uint8 (T, height, width, 3); none without rendering)."""

    design: str
    episode_id: int
    fps: int
    instruction: str
    success: bool
    objects: tuple[ObjectSpec, ...]
    columns: dict[str, np.ndarray]
    frames: dict[str, np.ndarray]

    @property
    def length(self) -> int:
        return len(self.columns["observation.state.gripper_position"])


def record_episode(
    seed: int,
    episode_id: int,
    *,
    fps: int = 15,
    seconds: float = 14.0,
    render: bool = True,
    design: Design = DEFAULT,
) -> Episode:
    """Simulates episode `episode_id` of the world `seed`. Raises ValueError if fps does not divide 15."""
    if FRAME_HZ % fps:
        raise ValueError(f"fps {fps} does not divide {FRAME_HZ}")
    world, director = build_world(seed, episode_id, design)
    ticks = round(seconds * FRAME_HZ)
    stride = FRAME_HZ // fps
    renderer = Cameras(world, ticks // stride) if render else None

    observed: list[dict[str, np.ndarray]] = []
    targets = [world.command()]
    actor = Actor(world, director)
    for tick in range(ticks):
        observed.append(world.observe())
        if renderer is not None and tick % stride == 0:
            renderer.shoot()
        actor.tick()
        targets.append(world.command())
    director.judge(world.snapshot())
    if renderer is not None:
        renderer.close()
    return Episode(
        design=design.name,
        episode_id=episode_id,
        fps=fps,
        instruction=director.instruction,
        success=director.success,
        objects=director.objects,
        columns=_columns(observed, np.array(targets), stride),
        frames=renderer.frames if renderer is not None else {},
    )


def build_world(seed: int, episode_id: int, design: Design) -> tuple[World, Director]:
    """An episode's world at its start, and the director of what happens in it."""
    rng = np.random.default_rng([seed, episode_id])
    scene = sample_scene(rng, design)
    start = start_waypoint(rng, design)
    return World(build_model(scene), start, design), Director(scene.objects, rng, design)


def _columns(observed: list[dict[str, np.ndarray]], targets: np.ndarray, stride: int) -> dict[str, np.ndarray]:
    """DROID's columns at the recorded frames; `targets` (ticks + 1, 8) are the commands around each 15 Hz frame.

    The action of a frame is the target that the arm follows until the next 15 Hz frame; its joint velocity is that
    target's change over the frame in units of `VELOCITY_GAIN`, at any fps.
    """
    columns = {name: np.array([row[name] for row in observed])[::stride] for name in observed[0]}
    after, change = targets[1:][::stride], np.diff(targets[:, :7], axis=0)[::stride]
    columns["observation.state"] = np.column_stack(
        [columns["observation.state.joint_position"], columns["observation.state.gripper_position"]]
    )
    columns["action.joint_position"] = after[:, :7]
    columns["action.gripper_position"] = after[:, 7]
    columns["action.cartesian_position"] = np.array([flange_pose(row[:7]) for row in after])
    columns["action.joint_velocity"] = change / VELOCITY_GAIN
    columns["action"] = after
    return {name: values.astype(np.float32) for name, values in columns.items()}


class World:
    """MuJoCo's model and state, with the arm's controller; `stroke` (m) is how far a finger opens."""

    def __init__(self, model: mujoco.MjModel, start: Waypoint, design: Design) -> None:
        self.model, self.data = model, mujoco.MjData(model)
        self.stroke = design.motion.finger_stroke
        self.arm = ArmController(start, design.motion.turn_rate)
        self._joints = [model.joint(f"joint{i}").qposadr[0] for i in range(1, 8)]
        self._fingers = [model.joint(f"finger{i}").qposadr[0] for i in (1, 2)]
        self._bodies = [model.body(f"object{i}").id for i in range(3)]
        self._flange = model.site("flange").id
        self.data.qpos[self._joints] = self.arm.joints
        self.data.qpos[self._fingers] = self.stroke * (1 - self.arm.gripper)
        self._apply()
        mujoco.mj_forward(model, self.data)

    def place(self, joints: np.ndarray, gripper: float, objects: np.ndarray) -> None:
        """Puts everything somewhere, at rest: (7,) rad, 0 open .. 1 closed, (3, 7) positions and quaternions."""
        self.data.qpos[self._joints] = joints
        self.data.qpos[self._fingers] = self.stroke * (1 - gripper)
        for body, pose in zip(self._bodies, objects, strict=True):
            first = self.model.jnt_qposadr[self.model.body_jntadr[body]]
            self.data.qpos[first : first + 7] = pose
        self.data.qvel[:] = 0
        self.data.ctrl[:7] = joints
        self.data.ctrl[7] = self.stroke * (1 - gripper)
        mujoco.mj_forward(self.model, self.data)

    def step(self) -> None:
        self.arm.step()
        self._apply()
        mujoco.mj_step(self.model, self.data, PHYSICS_STEPS)

    def _apply(self) -> None:
        self.data.ctrl[:7] = self.arm.joints
        self.data.ctrl[7] = self.stroke * (1 - self.arm.gripper)

    def command(self) -> np.ndarray:
        return np.array([*self.arm.joints, self.arm.gripper])

    def flange(self) -> np.ndarray:
        frame = np.eye(4)
        frame[:3, :3] = self.data.site_xmat[self._flange].reshape(3, 3)
        frame[:3, 3] = self.data.site_xpos[self._flange]
        return frame

    def snapshot(self) -> Snapshot:
        rotations = self.data.xmat[self._bodies].reshape(3, 3, 3)
        flange = self.flange()
        return Snapshot(
            self.data.xpos[self._bodies].copy(), rotations.copy(), flange[:3, 3] + FLANGE_TO_PADS * flange[:3, 2]
        )

    def observe(self) -> dict[str, np.ndarray]:
        # Kinematics of the state that mj_step has just reached, so that pose, joints and images belong together.
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)
        opening = self.data.qpos[self._fingers].mean() / self.stroke
        objects = np.column_stack([self.data.xpos[self._bodies], self.data.xquat[self._bodies]])
        return {
            "observation.state.joint_position": self.data.qpos[self._joints].copy(),
            "observation.state.gripper_position": np.clip(1 - opening, 0, 1),
            "observation.state.cartesian_position": pose_of_frame(self.flange()),
            "sim.object_pose": objects.reshape(-1),
        }


class Actor:
    """Feeds the director's waypoints to the arm, and drops a script whose object slipped away."""

    def __init__(self, world: World, director: Director) -> None:
        self.world, self.director = world, director
        self.queue: list[Waypoint] = []

    def tick(self) -> None:
        """A 15 Hz frame."""
        for _ in range(CONTROL_HZ // FRAME_HZ):
            self.step()

    def step(self) -> None:
        arm = self.world.arm
        if arm.idle:
            if not self.queue:
                self.queue = self.director.next_script(self.world.snapshot())
            if self._lost(self.queue[0]):
                self.queue = self.director.next_script(self.world.snapshot())
            arm.go(self.queue.pop(0))
        self.world.step()

    def _lost(self, goal: Waypoint) -> bool:
        if goal.holds is None or self.world.arm.here.holds is None:
            return False
        now = self.world.snapshot()
        return bool(np.linalg.norm(now.positions[goal.holds] - now.tcp) > LOST)


class Cameras:
    """Renders the three views of a world, frame by frame."""

    def __init__(self, world: World, length: int) -> None:
        self._world = world
        self._renderer = mujoco.Renderer(world.model, IMAGE_HEIGHT, IMAGE_WIDTH)
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self.frames = {name: np.empty((length, IMAGE_HEIGHT, IMAGE_WIDTH, 3), np.uint8) for name in CAMERAS}
        self._count = 0

    def shoot(self) -> None:
        self._draw(self._count)
        self._count += 1

    def look(self) -> np.ndarray:
        """(cameras, height, width, 3) of now, kept nowhere."""
        self._draw(0)
        return np.stack([frames[0] for frames in self.frames.values()])

    def _draw(self, index: int) -> None:
        for name, frames in self.frames.items():
            self._renderer.update_scene(self._world.data, camera=name)
            self._renderer.render(out=frames[index])

    def close(self) -> None:
        self._renderer.close()
