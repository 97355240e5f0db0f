"""The keyboard map: one key -> one interaction's poses (method.md section 6).

A pose is x y z (m), roll pitch yaw (rad), gripper (0 open .. 1 closed). Keys move in the base frame:
l/r -/+ y, f/b +/- x, u/d +/- z by one step; o opens, c closes the gripper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from persistworld_cli.config.settings import DriveSettings
from persistworld_cli.errors import UsageError

Float = NDArray[np.float64]

# key -> (axis of the pose, sign, what it does)
MOVES: Mapping[str, tuple[int, float, str]] = {
    "l": (1, -1.0, "left (-y)"),
    "r": (1, 1.0, "right (+y)"),
    "f": (0, 1.0, "forward (+x)"),
    "b": (0, -1.0, "back (-x)"),
    "u": (2, 1.0, "up (+z)"),
    "d": (2, -1.0, "down (-z)"),
}
GRIPS: Mapping[str, str] = {"o": "open the gripper", "c": "close the gripper"}
_GRIPPER = 6


def key_help() -> str:
    """Every key with what it does, for messages and ``--help``."""
    return ", ".join(f"{key} {text}" for key, text in {**{k: m[2] for k, m in MOVES.items()}, **GRIPS}.items())


def parse_keys(text: str) -> list[str]:
    """``"lllrrr"`` -> its keys. Spaces and commas between keys are ignored.

    Raises:
        UsageError: no key at all, or one that the map does not have (the message lists those that it has).
    """
    known = {**MOVES, **GRIPS}
    keys = [key for key in text if key not in " ,"]
    for position, key in enumerate(text):
        if key not in known and key not in " ,":
            raise UsageError(
                f"unknown key '{key}' (character {position + 1} of '{text}')", where="--keys", fix=f"keys: {key_help()}"
            )
    if not keys:
        raise UsageError("no keys given", where="--keys", fix=f"write, for example, --keys lllrrr; keys: {key_help()}")
    return keys


@dataclass(frozen=True, kw_only=True)
class KeyMap:
    """Keys -> poses, with the step size and the limits of the workspace."""

    settings: DriveSettings = field(default_factory=DriveSettings)

    def chunk(self, pose: ArrayLike, key: str, rows: int = 5) -> Float:
        """Poses of one interaction.

        Args:
            pose: (7,) the current pose.
            key: one key; an unknown one means no motion, as in the reference (`parse_keys` refuses it before).
            rows: number of poses, the first of which is the current one.

        Returns:
            (rows, 7) float64: linear from the pose to its goal; xyz of every row inside the workspace.
        """
        start = np.asarray(pose, dtype=np.float64)
        delta = np.zeros(7)
        if key in MOVES:
            axis, sign, _ = MOVES[key]
            delta[axis] = sign * self.settings.step_m
        elif key in GRIPS:
            goal = self.settings.gripper_open if key == "o" else self.settings.gripper_closed
            delta[_GRIPPER] = goal - start[_GRIPPER]
        share = np.linspace(0.0, 1.0, rows)[:, None] if rows > 1 else np.zeros((1, 1))
        poses = start + share * delta
        # The first row is clipped as well: a start outside the workspace jumps to its edge (as in the reference).
        poses[:, :3] = np.clip(poses[:, :3], self.settings.workspace_low, self.settings.workspace_high)
        return poses
