"""The numbers of a robot's state, and the keys of `drive` that change them; `robot.keyboard` turns keys into states."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from persistworld_cli.config.settings import Settings, WorldSettings

# Franka's pose, as DROID records it: "NAME UNIT" of each number
FRANKA_POSE = ("x m", "y m", "z m", "roll rad", "pitch rad", "yaw rad", "gripper")
# Keys of the session itself, the same in the terminal and on the page.
SESSION_KEYS: Mapping[str, str] = {"z": "undo", "x": "branch", "q": "quit"}
TOKEN_VARIABLE = "PERSISTWORLD_DRIVE_TOKEN"  # the page's token travels in the environment: others can read config.json
KEY_ACTION = 'write +NAME, -NAME or NAME=VALUE, and a label if you like: l = "-y left", o = "gripper=0 open"'
_ACTION = re.compile(
    r"(?:(?P<sign>[+-])(?P<step>[^\s=]+)|(?P<goal>[^\s=+-][^\s=]*)=(?P<value>\S+))(?:\s+(?P<label>\S.*))?"
)


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One number of a state: its name, its unit ("" for none), and the limits of a command."""

    name: str
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True, kw_only=True)
class KeyAction:
    """What a key does to one number of a state: `sign` steps (+1 or -1), or to a `goal` where sign is 0."""

    name: str
    sign: int = 0
    goal: float = 0.0
    label: str = ""

    @property
    def text(self) -> str:
        """The action in words: ``left (-y)``."""
        action = f"{self.name}={self.goal:g}" if self.sign == 0 else f"{'+' if self.sign > 0 else '-'}{self.name}"
        return f"{self.label} ({action})" if self.label else action


def parse_action(text: str) -> KeyAction:
    """``"+x"``, ``"-y left"`` or ``"gripper=0.7 close"``. Raises ValueError for another form."""
    match = _ACTION.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    label = match["label"] or ""
    if match["sign"]:
        return KeyAction(name=match["step"], sign=1 if match["sign"] == "+" else -1, label=label)
    goal = float(match["value"])
    if not math.isfinite(goal):
        raise ValueError(text)
    return KeyAction(name=match["goal"], goal=goal, label=label)


def dimensions_of(settings: Settings) -> tuple[Dimension, ...]:
    """The numbers of a state, in order; none if the settings do not say what they are."""
    robot = settings.robot
    droid = settings.world.state_fields == WorldSettings().state_fields
    named = [text.partition(" ")[::2] for text in robot.dimensions or (FRANKA_POSE if droid else ())]
    limits = {name: robot.limits.get(name, (-math.inf, math.inf)) for name, _ in named}
    return tuple(Dimension(name=n, unit=unit.strip(), low=limits[n][0], high=limits[n][1]) for n, unit in named)


def state_names(width: int, settings: Settings | None = None) -> tuple[str, ...]:
    """Names of a state's numbers: those of the settings (default: Franka's pose) if they fit, else 0, 1, ..."""
    names = tuple(one.name for one in dimensions_of(settings or Settings()))
    return names if len(names) == width else tuple(map(str, range(width)))


def robot_name(settings: Settings) -> str:
    """The `robot_type` of a written LeRobot dataset."""
    return settings.robot.name or ("unknown" if settings.robot.dimensions else "Franka")
