"""The actions that a key of `drive` can have; `robot.keyboard` turns actions into poses."""

from __future__ import annotations

from collections.abc import Mapping

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
