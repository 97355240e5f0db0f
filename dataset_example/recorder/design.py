"""Designs of the bundled world: every number that may differ between worlds, in one frozen dataclass.

`steady` is the world of the shipped recordings and model. `varied` is that of earlier versions, in which everything
varies between episodes. `steady` is easier to learn: most episodes share cameras and light, the mat is plain, objects
are larger, and the wrist camera sees more and turns less, so that its frames overlap. Success rules, instructions,
object colours and exterior cameras are the same in all designs (`persistworld_cli/policies/bundled_world/rules.py`), so
the judge of the bundled world works in each.

Units are metres and radians, but for fields of view (degrees); the world frame is the robot's base frame (x forward,
y left, z up), with the table top at z = 0. A pair is the range of a uniform draw.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

Pair = tuple[float, float]
Triple = tuple[float, float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeRange:
    """Half sizes of one shape: `across` (or the radius), `up` along its axis; a cube has no `up`."""

    across: Pair
    up: Pair | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objects:
    """Two small objects that the gripper can hold, and a large one that it can only push.

    `apart` is the least distance between centres at the start: small to small, small to large. `yaw` is the largest
    angle from the table's axes at the start.
    """

    sizes: Mapping[str, SizeRange]
    apart: Pair
    yaw: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surfaces:
    """Colours of table, mat and floor, and what is painted on the mat.

    A palette is (table, mat, second tone of the mat's pattern); `tint` scales its channels apart, `shade` together.
    `periods` counts a pattern's repetitions, end excluded; `border` is where the border pattern begins (0 centre, 0.5
    edge).
    """

    palettes: tuple[tuple[Triple, Triple, Triple], ...]
    floors: tuple[Triple, ...]
    tint: Pair
    shade: Pair
    floor_shade: Pair
    patterns: tuple[str, ...]
    periods: tuple[int, int]
    border: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Light:
    """A lamp over the table, seen from (0.5, 0) at `angle` and `reach`, and the light from everywhere.

    `shadow_map` is the side of the image that shadows are drawn with, pixels.
    """

    angle: Pair
    height: Pair
    reach: Pair
    strength: Pair
    ambient: Pair
    shadow_map: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views:
    """The wrist camera, and how far an episode's cameras may deviate (the last four numbers).

    The wrist camera is given in the flange's frame: `wrist_from`, `wrist_to`, `wrist_fovy`; `wrist_case` is the middle
    of the case that the exterior cameras see.
    """

    wrist_from: Triple
    wrist_to: Triple
    wrist_fovy: float
    wrist_case: Triple
    angle_off: float
    target_off: float
    distance_off: float
    wrist_off: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Motion:
    """How the arm moves and what it chooses to do.

    `speed` is in m/s, `turn_rate` in rad/s; `yaw` and `reach_yaw` are the largest angles from the working yaw while
    carrying or pushing, and above an object or at the start. `tasks` and `fillers` are probabilities of (pick, push,
    stack, reach) for the instruction and of (pick, hide, push, stack, reach) for what follows.
    """

    speed: Pair
    turn_rate: float
    yaw: float
    reach_yaw: float
    finger_stroke: float
    tasks: tuple[float, float, float, float]
    fillers: tuple[float, float, float, float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """A whole world. Object centres stay between `work_low` and `work_high` (x, y); a pushing finger may go further.

    `steady` is the share of episodes without deviation of cameras and with the lamp's mean light; in others both vary.
    """

    name: str
    objects: Objects
    surfaces: Surfaces
    light: Light
    views: Views
    motion: Motion
    steady: float
    work_low: Pair = (0.40, -0.19)
    work_high: Pair = (0.62, 0.19)
    push_low: Pair = (0.36, -0.28)
    push_high: Pair = (0.67, 0.28)


VARIED = Design(
    name="varied",
    objects=Objects(
        sizes=MappingProxyType(
            {
                "cube": SizeRange(across=(0.030, 0.035)),
                "cylinder": SizeRange(across=(0.031, 0.035), up=(0.032, 0.040)),
                "box": SizeRange(across=(0.049, 0.060), up=(0.054, 0.064)),
                "drum": SizeRange(across=(0.052, 0.064), up=(0.054, 0.064)),
            }
        ),
        apart=(0.115, 0.13),
        yaw=math.pi / 4,
    ),
    surfaces=Surfaces(
        palettes=(
            ((0.66, 0.50, 0.34), (0.70, 0.62, 0.50), (0.52, 0.44, 0.35)),  # wood, linen mat
            ((0.66, 0.66, 0.64), (0.42, 0.44, 0.48), (0.58, 0.60, 0.64)),  # white, slate mat
            ((0.36, 0.28, 0.24), (0.64, 0.60, 0.56), (0.46, 0.46, 0.44)),  # dark wood, stone mat
            ((0.46, 0.52, 0.48), (0.68, 0.70, 0.64), (0.50, 0.64, 0.58)),  # sage, pale mat
            ((0.30, 0.34, 0.42), (0.60, 0.56, 0.66), (0.42, 0.40, 0.50)),  # navy grey, lilac mat
        ),
        floors=((0.50, 0.48, 0.46), (0.34, 0.36, 0.40), (0.62, 0.58, 0.50), (0.40, 0.46, 0.44)),
        tint=(0.93, 1.07),
        shade=(0.92, 1.08),
        floor_shade=(0.9, 1.1),
        patterns=("plain", "checker", "stripes", "dots", "border"),
        periods=(4, 8),
        border=0.36,
    ),
    light=Light(
        angle=(0.0, 2 * math.pi),
        height=(1.3, 1.9),
        reach=(0.25, 0.75),
        strength=(0.40, 0.62),
        ambient=(0.40, 0.50),
        shadow_map=512,
    ),
    views=Views(
        wrist_from=(0.0, -0.095, 0.045),
        wrist_to=(0.0, 0.0, 0.215),
        wrist_fovy=68.0,
        wrist_case=(0.0, -0.085, 0.018),
        angle_off=0.03,
        target_off=0.012,
        distance_off=0.02,
        wrist_off=0.004,
    ),
    motion=Motion(
        speed=(0.26, 0.38),
        turn_rate=0.8,
        yaw=0.5,
        reach_yaw=0.6,
        finger_stroke=0.046,
        tasks=(0.5, 0.27, 0.15, 0.08),
        fillers=(0.31, 0.30, 0.26, 0.09, 0.04),
    ),
    steady=0.0,
)

STEADY = Design(
    name="steady",
    objects=Objects(
        sizes=MappingProxyType(
            {
                "cube": SizeRange(across=(0.037, 0.041)),
                "cylinder": SizeRange(across=(0.037, 0.041), up=(0.039, 0.044)),
                "box": SizeRange(across=(0.057, 0.064), up=(0.051, 0.058)),
                "drum": SizeRange(across=(0.060, 0.067), up=(0.051, 0.058)),
            }
        ),
        apart=(0.125, 0.14),
        yaw=0.35,
    ),
    surfaces=Surfaces(
        palettes=(
            ((0.66, 0.50, 0.34), (0.74, 0.69, 0.60), (0.54, 0.45, 0.36)),  # wood, linen mat
            ((0.66, 0.66, 0.64), (0.52, 0.55, 0.60), (0.38, 0.41, 0.46)),  # white, slate mat
            ((0.46, 0.52, 0.48), (0.70, 0.71, 0.66), (0.50, 0.56, 0.52)),  # sage, pale mat
        ),
        floors=((0.42, 0.43, 0.45),),
        tint=(0.97, 1.03),
        shade=(0.95, 1.05),
        floor_shade=(1.0, 1.0),
        patterns=("plain", "border", "stripes"),
        periods=(3, 4),
        border=0.40,
    ),
    light=Light(
        angle=(-0.3 * math.pi, 0.4 * math.pi),
        height=(1.4, 1.8),
        reach=(0.25, 0.45),
        strength=(0.42, 0.54),
        ambient=(0.44, 0.50),
        shadow_map=1024,
    ),
    views=Views(
        wrist_from=(0.0, -0.13, -0.02),
        wrist_to=(0.0, 0.0, 0.215),
        wrist_fovy=72.0,
        wrist_case=(0.0, -0.12, -0.045),
        angle_off=0.03,
        target_off=0.012,
        distance_off=0.02,
        wrist_off=0.004,
    ),
    motion=Motion(
        speed=(0.24, 0.33),
        turn_rate=0.5,
        yaw=0.2,
        reach_yaw=0.25,
        finger_stroke=0.052,
        tasks=(0.45, 0.33, 0.15, 0.07),
        fillers=(0.28, 0.29, 0.33, 0.08, 0.02),
    ),
    steady=0.8,
)

DESIGNS: Mapping[str, Design] = MappingProxyType({design.name: design for design in (VARIED, STEADY)})
DEFAULT = STEADY
