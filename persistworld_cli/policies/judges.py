"""Judges by name: the project's own, and any class of the user's.

To add one: write a class (see `policies.judge`) and a line in `JUDGES`.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from persistworld_cli.config.plugins import make_plugin
from persistworld_cli.errors import PersistWorldError, UsageError, nearest
from persistworld_cli.policies.bundled_world.judge import BundledJudge
from persistworld_cli.policies.judge import Evidence, Judge, Verdict

JUDGES: Mapping[str, Callable[[], Judge]] = {"bundled-world": BundledJudge}


def load_judge(name: str) -> Judge:
    """A judge of the registry, or ``module:Class``, made without arguments.

    Raises:
        UsageError: no such judge, module or class, or one without ``judge``.
    """
    if name in JUDGES:
        return JUDGES[name]()
    if ":" not in name:
        raise UsageError(
            f"unknown judge '{name}'", where="--judge", fix=f"{nearest(name, JUDGES)} (or module:Class for your own)"
        )
    judge: Judge = make_plugin(name, "--judge", ("judge",), "a judge has judge(evidence) -> Verdict")
    return judge


def ask_judge(judge: Judge, evidence: Evidence, name: str) -> Verdict:
    """The verdict, checked. Raises PersistWorldError: the judge failed (with its traceback), or gives no verdict."""
    try:
        verdict: Any = judge.judge(evidence)
    except PersistWorldError:
        raise
    except Exception as error:
        raise PersistWorldError(f"the judge failed:\n{traceback.format_exc().rstrip()}", where=name) from error
    if not isinstance(verdict, Verdict):
        raise PersistWorldError(f"the judge gave {verdict!r}, not a Verdict", where=name)
    progress = verdict.progress
    if progress is not None and not (math.isfinite(progress) and 0 <= progress <= 1):
        raise PersistWorldError(f"the judge gave progress {progress!r}, not a number from 0 to 1", where=name)
    if verdict.success not in (True, False, None):
        raise PersistWorldError(f"the judge gave success {verdict.success!r}, not true, false or none", where=name)
    return verdict
