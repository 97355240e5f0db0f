"""Which experiment trackers a run starts, and whether their packages are installed."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import get_args

from persistworld_cli.config.settings import Tracker
from persistworld_cli.errors import PersistWorldError


def wanted_trackers(names: Iterable[str]) -> tuple[str, ...]:
    """The trackers to start, each once, in the order they were named; ``none`` is none.

    Raises:
        PersistWorldError: the package of one is not installed.
    """
    wanted = tuple(dict.fromkeys(name for name in names if name != "none"))
    for name in wanted:
        if find_spec(name) is None:
            others = [other for other in get_args(Tracker) if other != name]
            raise PersistWorldError(
                f"the tracker '{name}' needs the package '{name}', which is not installed",
                where="launch.trackers (--tracker)",
                fix=f"pip install {name}, or take another one: {', '.join(others)}",
            )
    return wanted
