"""The keyboard map: one key -> one interaction's states (method.md section 6).

A key changes one number of the state by a step, or takes it to a value; the preset names the numbers
(`robot.dimensions`) and maps keys to actions (`drive.keys`). Shapes: L rows of an interaction, D numbers of a state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from persistworld_cli.config.keys import dimensions_of, parse_action
from persistworld_cli.config.settings import DriveSettings, Settings
from persistworld_cli.errors import UsageError

Float = NDArray[np.float64]

_BETWEEN = " ,"
_REPEATED = re.compile(r"(?P<key>[^*])(?:\*(?P<count>[1-9]\d{0,2})(?!\d))?")  # l, or l*3


def key_help(keys: Mapping[str, str] | None = None) -> str:
    """Every key with its action, for messages; ``keys``: a key map (`drive.keys`), else the default one."""
    return ", ".join(f"{key} {parse_action(action).text}" for key, action in (keys or DriveSettings().keys).items())


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


class KeyMap:
    """Keys -> states, with the steps and limits of the settings, which name every number (`dimensions_of`)."""

    def __init__(self, settings: Settings) -> None:
        self.dimensions = dimensions_of(settings)
        self._low, self._high = (np.array([getattr(one, end) for one in self.dimensions]) for end in ("low", "high"))
        self._step = settings.drive.step
        self._actions = {key: parse_action(text) for key, text in settings.drive.keys.items()}

    def meaning(self, key: str) -> str:
        """The action of a key, in words."""
        return self._actions[key].text

    def chunk(self, state: ArrayLike, key: str, rows: int = 5) -> Float:
        """States of one interaction.

        Args:
            state: (D,) the current state.
            key: one key; an unknown one gives no motion, as in the reference (`parse_keys` refuses it before).
            rows: L, the number of states, from the current one.

        Returns:
            (L, D) float64: linear from the state to its goal; every row within the limits.
        """
        start = np.asarray(state, dtype=np.float64)
        delta = np.zeros(len(self.dimensions))
        if action := self._actions.get(key):
            index = [one.name for one in self.dimensions].index(action.name)
            goal = action.goal - start[index]
            delta[index] = action.sign * self._step[action.name] if action.sign else goal
        share = np.linspace(0.0, 1.0, rows)[:, None] if rows > 1 else np.zeros((1, 1))
        # The first row is clipped as well: a start outside the limits jumps to their edge (as in the reference).
        return np.clip(start + share * delta, self._low, self._high)
