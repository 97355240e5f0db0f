"""What keys of `drive` can be made to do, and the check of a key map; the poses follow in `robot.keyboard`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from persistworld_cli.config.settings import DriveSettings
from persistworld_cli.errors import UsageError, nearest

# action -> what it does, for people
ACTIONS: Mapping[str, str] = {
    "-y": "left (-y)",
    "+y": "right (+y)",
    "+x": "forward (+x)",
    "-x": "back (-x)",
    "+z": "up (+z)",
    "-z": "down (-z)",
    "open": "open the gripper",
    "close": "close the gripper",
}
# Keys of the session itself, the same in the terminal and on the page.
SESSION_KEYS: Mapping[str, str] = {"z": "undo", "x": "branch", "q": "quit"}
TOKEN_VARIABLE = "PERSISTWORLD_DRIVE_TOKEN"  # the page's token travels in the environment: others can read config.json


def check_drive(drive: DriveSettings, place: Callable[..., str]) -> None:
    """Refuse a key map or a workspace that cannot be meant.

    Args:
        drive: the settings.
        place: dotted keys -> where they were written.

    Raises:
        UsageError: the first thing that is wrong.
    """
    low, high = drive.workspace_low, drive.workspace_high
    if not len(low) == len(high) == 3 or any(a >= b for a, b in zip(low, high, strict=True)):
        raise UsageError(
            f"drive.workspace {low} .. {high} is no box: three bounds each",
            where=place("drive.workspace_low", "drive.workspace_high"),
            fix="write three numbers in each, low below high",
        )
    if not drive.keys:
        raise UsageError("drive.keys is empty", where=place("drive.keys"), fix='write, for example, l = "-y"')
    for key, action in drive.keys.items():
        if action not in ACTIONS:
            raise UsageError(
                f"drive.keys: key '{key}' does '{action}', which is no action",
                where=place("drive.keys"),
                fix=nearest(action, ACTIONS),
            )
        if len(key) != 1 or not key.isascii() or not key.isalpha():
            raise UsageError(f"drive.keys: '{key}' is not one letter", where=place("drive.keys"), fix="take a letter")
        if key in SESSION_KEYS:
            raise UsageError(
                f"drive.keys: '{key}' is taken: it means {SESSION_KEYS[key]}",
                where=place("drive.keys"),
                fix="take another letter",
            )
