"""The look of an episode: objects, table, lights and cameras, drawn at random, and their MJCF.

Units are metres and radians; the world frame is the robot's base frame (x forward, y left, z up); the table top is at
z = 0. What a rollout can only know from its history varies here: colours, sizes, pattern, light and camera poses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np

from persistworld_cli.policies.bundled_world.rules import (
    EXTERIOR_VIEWS,
    FIELD_OF_VIEW,
    IMAGE_HEIGHT,
    IMAGE_WIDTH,
    LARGE_SHAPES,
    LOOK_AT,
    OBJECT_COLOURS,
    ROUND_SHAPES,
    SMALL_SHAPES,
)

from .arm_mjcf import ARM_ACTUATORS, arm_body
from .design import Design, SizeRange, Surfaces, Views

# The tray's rim around the work area stops what rolls.
TRAY_CENTRE = (0.51, 0.0)
TRAY_HALF = (0.195, 0.275)
TEXTURE_SIDE = 128

WRIST_CAMERA = "wrist_left"
CAMERAS = (*EXTERIOR_VIEWS, WRIST_CAMERA)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectSpec:
    """One object. `half` is the half size along its axes; a round one has half[0] == half[1] == radius."""

    colour: str
    shape: str
    rgb: tuple[float, float, float]
    half: tuple[float, float, float]
    position: tuple[float, float]
    yaw: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def graspable(self) -> bool:
        return self.shape in SMALL_SHAPES

    @property
    def round(self) -> bool:
        return self.shape in ROUND_SHAPES

    @property
    def radius(self) -> float:
        """Radius of a circle that holds most of the footprint."""
        return self.half[0] if self.round else 1.2 * self.half[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CameraSpec:
    position: np.ndarray
    target: np.ndarray
    up: np.ndarray
    fovy: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneSpec:
    design: Design
    objects: tuple[ObjectSpec, ...]
    table_rgb: np.ndarray
    floor_rgb: np.ndarray
    mat_pixels: np.ndarray  # uint8 (side, side, 3)
    light_position: np.ndarray
    light_strength: float
    ambient: float
    cameras: dict[str, CameraSpec]


def sample_scene(rng: np.random.Generator, design: Design) -> SceneSpec:
    """Draws everything that is fixed during an episode."""
    objects = _sample_objects(rng, design)
    surfaces = design.surfaces
    palette = surfaces.palettes[rng.integers(len(surfaces.palettes))]
    tint = rng.uniform(*surfaces.tint, size=3)
    table, mat, tone = (np.clip(np.array(c) * tint * rng.uniform(*surfaces.shade), 0, 1) for c in palette)
    varies = design.steady == 0 or rng.random() >= design.steady
    draw = rng.uniform if varies else _middle
    light = design.light
    angle, height = draw(*light.angle), draw(*light.height)
    reach = draw(*light.reach)
    return SceneSpec(
        design=design,
        objects=objects,
        table_rgb=table,
        floor_rgb=np.array(surfaces.floors[rng.integers(len(surfaces.floors))]) * rng.uniform(*surfaces.floor_shade),
        mat_pixels=_paint_mat(rng, surfaces, mat, tone),
        light_position=np.array([0.5 + reach * np.cos(angle), reach * np.sin(angle), height]),
        light_strength=draw(*light.strength),
        ambient=draw(*light.ambient),
        cameras=_sample_cameras(draw, design.views),
    )


def _middle(low: float, high: float, size: int | None = None) -> float | np.ndarray:
    """The mean of a uniform draw."""
    middle = (low + high) / 2
    return middle if size is None else np.full(size, middle)


def _sample_objects(rng: np.random.Generator, design: Design) -> tuple[ObjectSpec, ...]:
    """Two graspable objects and a large one, apart from each other, all of different colours."""
    colours, rules = rng.permutation(list(OBJECT_COLOURS))[:3], design.objects
    shapes = (*rng.choice(SMALL_SHAPES, size=2), rng.choice(LARGE_SHAPES))
    sizes = [_sample_size(rng, str(shape), rules.sizes[str(shape)]) for shape in shapes]
    while True:
        spots = rng.uniform(design.work_low, design.work_high, size=(3, 2))
        gaps = [np.linalg.norm(spots[i] - spots[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        if gaps[0] > rules.apart[0] and min(gaps[1:]) > rules.apart[1]:
            break
    return tuple(
        ObjectSpec(
            colour=str(colour),
            shape=shape,
            rgb=tuple(float(v) for v in np.clip(np.array(OBJECT_COLOURS[colour]) + rng.uniform(-0.04, 0.04, 3), 0, 1)),
            half=half,
            position=(float(spot[0]), float(spot[1])),
            yaw=float(rng.uniform(-rules.yaw, rules.yaw)),
        )
        for colour, (shape, half), spot in zip(colours, sizes, spots, strict=True)
    )


def _sample_size(rng: np.random.Generator, shape: str, size: SizeRange) -> tuple[str, tuple[float, float, float]]:
    across = rng.uniform(*size.across)
    return shape, (across, across, across if size.up is None else rng.uniform(*size.up))


def _sample_cameras(draw: Callable[..., Any], views: Views) -> dict[str, CameraSpec]:
    def off(most: float, size: int | None = None) -> Any:
        return draw(-most, most, size)

    cameras = {}
    for name, (azimuth, elevation, distance) in EXTERIOR_VIEWS.items():
        azimuth, elevation = np.array([math.radians(azimuth), math.radians(elevation)]) + off(views.angle_off, 2)
        away = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
        target = np.array(LOOK_AT) + off(views.target_off, 3)
        distance += off(views.distance_off)
        cameras[name] = CameraSpec(
            position=target + distance * away, target=target, up=np.array([0.0, 0.0, 1.0]), fovy=FIELD_OF_VIEW
        )
    cameras[WRIST_CAMERA] = CameraSpec(
        position=np.array(views.wrist_from) + off(views.wrist_off, 3),
        target=np.array(views.wrist_to) + off(views.wrist_off, 3),
        up=np.array([0.0, 1.0, 0.0]),
        fovy=views.wrist_fovy,
    )
    return cameras


def _paint_mat(rng: np.random.Generator, surfaces: Surfaces, base: np.ndarray, tone: np.ndarray) -> np.ndarray:
    """Pixels of the mat: uint8 (side, side, 3), one of the patterns with a random period, phase and direction."""
    row, column = np.mgrid[0:TEXTURE_SIDE, 0:TEXTURE_SIDE] / TEXTURE_SIDE
    pattern = surfaces.patterns[rng.integers(len(surfaces.patterns))]
    count, phase = rng.integers(*surfaces.periods), rng.uniform(0, 1)
    along = row if rng.random() < 0.5 else column
    if pattern == "checker":
        mask = (np.floor(row * count + phase) + np.floor(column * count)) % 2 == 0
    elif pattern == "stripes":
        mask = (along * count + phase) % 1 < 0.4
    elif pattern == "dots":
        mask = np.hypot((row * count + phase) % 1 - 0.5, (column * count) % 1 - 0.5) < 0.25
    elif pattern == "border":
        mask = np.maximum(np.abs(row - 0.5), np.abs(column - 0.5)) > surfaces.border
    else:
        mask = np.zeros_like(row, bool)
    return np.round(255 * np.where(mask[..., None], tone, base)).astype(np.uint8)


def build_model(scene: SceneSpec) -> mujoco.MjModel:
    """Compiles the scene and paints the mat."""
    model = mujoco.MjModel.from_xml_string(build_mjcf(scene))
    texture = model.texture("mat")
    start = int(texture.adr[0])
    model.tex_data[start : start + scene.mat_pixels.size] = scene.mat_pixels.reshape(-1)
    return model


def build_mjcf(scene: SceneSpec) -> str:
    """The whole scene as MJCF.

    Contacts: objects (1) meet everything; hand (2) and table (4) meet objects only, so the hand cannot jam.
    """
    exterior = "".join(_camera(name, scene.cameras[name]) for name in EXTERIOR_VIEWS)
    objects = "".join(_object_body(index, item) for index, item in enumerate(scene.objects))
    light, strength = scene.light_position, scene.light_strength
    beam, case = np.array(LOOK_AT) - light, _vec(scene.design.views.wrist_case)
    return f"""<mujoco model="persistworld-example">
<compiler angle="radian"/>
<option timestep="{1 / 300!r}" integrator="implicitfast" cone="elliptic" impratio="10"/>
<visual>
  <headlight ambient="{_vec([scene.ambient] * 3)}" diffuse=".26 .26 .26" specular="0 0 0"/>
  <quality shadowsize="{scene.design.light.shadow_map}" offsamples="0" numslices="20" numstacks="10" numquads="1"/>
  <map znear="0.02" zfar="8" shadowclip="1" shadowscale="0.9"/>
  <global offwidth="{IMAGE_WIDTH}" offheight="{IMAGE_HEIGHT}"/>
</visual>
<statistic center=".5 0 .1" extent="1"/>
<asset>
  <texture name="mat" type="2d" builtin="flat" width="{TEXTURE_SIDE}" height="{TEXTURE_SIDE}" rgb1="1 1 1"/>
  <texture name="wall" type="skybox" builtin="flat" width="64" height="64" rgb1="{_vec(0.5 + 0.5 * scene.floor_rgb)}"/>
  <material name="mat" texture="mat" specular="0" shininess="0"/>
</asset>
<default><geom solref="0.01 1"/></default>
<worldbody>
  <light pos="{_vec(light)}" dir="{_vec(beam)}" diffuse="{_vec([strength] * 3)}" specular=".1 .1 .1"
    cutoff="40" exponent="1" castshadow="true"/>
  {_table(scene)}{exterior}{objects}
  {arm_body(_camera(WRIST_CAMERA, scene.cameras[WRIST_CAMERA]), case, scene.design.motion.finger_stroke)}
</worldbody>
{ARM_ACTUATORS}
</mujoco>"""


def _table(scene: SceneSpec) -> str:
    """Floor, table, mat and the tray's rim, with an unseen wall above it that keeps objects in reach."""
    (x, y), (half_x, half_y), rim = TRAY_CENTRE, TRAY_HALF, 0.009
    rim_rgba = _vec([*(0.62 * scene.table_rgb), 1])
    bars = [
        (x - half_x, y, rim, half_y + rim),
        (x + half_x, y, rim, half_y + rim),
        (x, y - half_y, half_x, rim),
        (x, y + half_y, half_x, rim),
    ]
    rims = "".join(
        f'<geom type="box" pos="{_vec([cx, cy, half])}" size="{_vec([hx, hy, half])}" rgba="{rgba}"'
        ' contype="4" conaffinity="0"/>'
        for cx, cy, hx, hy in bars
        for half, rgba in ((0.009, rim_rgba), (0.15, "0 0 0 0"))
    )
    floor, table = _vec([*scene.floor_rgb, 1]), _vec([*scene.table_rgb, 1])
    mat_size, mat_place = _vec([half_x, half_y, 0.1]), _vec([x, y, 0.0003])
    return f"""<geom type="plane" size="4 4 .1" pos="0 0 -.6" rgba="{floor}" contype="0" conaffinity="0"/>
  <geom type="box" size=".58 .62 .3" pos=".4 0 -.3005" rgba="{table}" contype="4" conaffinity="0"/>
  <geom type="box" size=".3 .4 .1" pos=".5 0 -.1" rgba="0 0 0 0" friction="1 .02 .002" contype="4" conaffinity="0"/>
  <geom type="plane" size="{mat_size}" pos="{mat_place}" material="mat" contype="0" conaffinity="0"/>
  {rims}"""


def _object_body(index: int, item: ObjectSpec) -> str:
    volume = (np.pi if item.round else 4) * item.half[0] * item.half[1] * 2 * item.half[2]
    kind, size = ("cylinder", (item.half[0], item.half[2])) if item.round else ("box", item.half)
    pose = f'pos="{_vec([*item.position, item.half[2] + 0.001])}" euler="0 0 {item.yaw!r}"'
    return f"""<body name="object{index}" {pose}><freejoint/>
    <geom type="{kind}" size="{_vec(size)}" rgba="{_vec([*item.rgb, 1])}" mass="{300 * volume!r}" condim="6"
      friction=".9 .02 .004" contype="1" conaffinity="7"/></body>
  """


def _camera(name: str, camera: CameraSpec) -> str:
    back = camera.position - camera.target
    back = back / np.linalg.norm(back)
    right = np.cross(camera.up, back)
    right = right / np.linalg.norm(right)
    axes = _vec([*right, *np.cross(back, right)])
    return f'<camera name="{name}" pos="{_vec(camera.position)}" xyaxes="{axes}" fovy="{camera.fovy}"/>'


def _vec(values) -> str:
    return " ".join(f"{float(v):.6g}" for v in values)
