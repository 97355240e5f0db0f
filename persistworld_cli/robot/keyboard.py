"""The keyboard map: one key -> one interaction's poses (method.md section 6).

A pose is x y z (m), roll pitch yaw (rad), gripper (0 open .. 1 closed). A key moves by one step along an axis of the
base frame, or opens or closes the gripper; the preset maps keys to actions (`drive.keys`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from persistworld_cli.config.keys import ACTIONS
from persistworld_cli.config.settings import DriveSettings
from persistworld_cli.errors import UsageError

Float = NDArray[np.float64]

_AXES = {"x": 0, "y": 1, "z": 2}
_GRIPPER = 6
_BETWEEN = " ,"
_REPEATED = re.compile(r"(?P<key>[^*])(?:\*(?P<count>[1-9]\d{0,2})(?!\d))?")  # l, or l*3


def key_help(keys: Mapping[str, str] | None = None) -> str:
    """Every key with its action, for messages; ``keys``: a key map (`drive.keys`), else the default one."""
    return ", ".join(f"{key} {ACTIONS[action]}" for key, action in (keys or DriveSettings().keys).items())


def parse_keys(text: str, keys: Mapping[str, str] | None = None) -> list[str]:
    """``"lllrrr"`` -> its keys. ``l*3`` is ``lll``; spaces and commas between keys are ignored.

    ``keys`` is the key map (`drive.keys`), else the default one. Raises UsageError for an unknown key, or none at all.
    """
    known = keys or DriveSettings().keys
    found: list[str] = []
    place = 0
    while place < len(text):
        match = _REPEATED.match(text, place)
        if match is None or (match["key"] not in known and (match["key"] not in _BETWEEN or match["count"])):
            raise UsageError(
                f"unknown key '{text[place]}' (character {place + 1} of '{text}')",
                where="--keys",
                fix=f"keys: {key_help(known)}; l*3 is lll",
            )
        if match["key"] in known:
            found += [match["key"]] * int(match["count"] or 1)
        place = match.end()
    if not found:
        raise UsageError(
            "no keys given", where="--keys", fix=f"write, for example, --keys lllrrr; keys: {key_help(known)}"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class KeyMap:
    """Keys -> poses, with the step size and the limits of the workspace."""

    settings: DriveSettings = field(default_factory=DriveSettings)

    def meaning(self, key: str) -> str:
        """The action of a key, in words."""
        return ACTIONS[self.settings.keys[key]]

    def chunk(self, pose: ArrayLike, key: str, rows: int = 5) -> Float:
        """Poses of one interaction.

        Args:
            pose: (7,) the current pose.
            key: one key; an unknown one gives no motion, as in the reference (`parse_keys` refuses it before).
            rows: number of poses, from the current one.

        Returns:
            (rows, 7) float64: linear from the pose to its goal; xyz of every row inside the workspace.
        """
        start = np.asarray(pose, dtype=np.float64)
        delta = np.zeros(7)
        action = self.settings.keys.get(key, "")
        if action in ("open", "close"):
            goal = self.settings.gripper_open if action == "open" else self.settings.gripper_closed
            delta[_GRIPPER] = goal - start[_GRIPPER]
        elif action:
            delta[_AXES[action[1]]] = float(f"{action[0]}1") * self.settings.step_m
        share = np.linspace(0.0, 1.0, rows)[:, None] if rows > 1 else np.zeros((1, 1))
        poses = start + share * delta
        # The first row is clipped as well: a start outside the workspace jumps to its edge (as in the reference).
        poses[:, :3] = np.clip(poses[:, :3], self.settings.workspace_low, self.settings.workspace_high)
        return poses
