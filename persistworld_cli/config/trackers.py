"""Which experiment trackers are known, and whether the packages they need are installed."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from persistworld_cli.errors import PersistWorldError

TRACKERS = ("tensorboard", "wandb", "trackio")  # each the name of its package too
NO_TRACKER = "none"


def wanted_trackers(names: Iterable[str]) -> tuple[str, ...]:
    """The trackers to start, each once, in the order they were named; ``none`` is none.

    Raises:
        PersistWorldError: the package of one is not installed.
    """
    wanted = tuple(dict.fromkeys(name for name in names if name != NO_TRACKER))
    for name in wanted:
        if find_spec(name) is None:
            others = [other for other in (*TRACKERS, NO_TRACKER) if other != name]
            raise PersistWorldError(
                f"the tracker '{name}' needs the package '{name}', which is not installed",
                where="launch.trackers (--tracker)",
                fix=f"pip install {name}, or take another one: {', '.join(others)}",
            )
    return wanted
