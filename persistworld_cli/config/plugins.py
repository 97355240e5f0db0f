"""User-defined classes, named ``module:Class``: policies, judges, referees, rewards and samplers."""

from __future__ import annotations

import importlib
import inspect
import linecache
import os
import sys
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from persistworld_cli.config.fields import Known
from persistworld_cli.errors import PersistWorldError, UsageError

_OWN = __name__.partition(".")[0]
_USERS = set[str]()  # top-level packages of the classes that were made


def make_plugin(spec: str, known: Collection[str], *, kind: str, where: str, needs: Sequence[str], fix: str) -> Any:
    """An instance of ``module:Class``, made without arguments.

    Args:
        spec: ``module:Class``; not one of `known`.
        known: names of the built-in classes, to suggest the nearest.
        kind: what the class is: ``judge``.
        where: the option or setting that named it.
        needs: the attributes that it must have.
        fix: a description of such a class, for the error.

    Raises:
        UsageError: no such name, module or class, a class that takes arguments, or an attribute is missing.
        PersistWorldError: its module or its constructor fails, as `running`.
    """
    Known(kind, tuple(known)).check(spec, kind, where)
    module_name, _, class_name = spec.partition(":")
    where = f"{where} {spec}"
    _USERS.add(module_name.partition(".")[0])
    with running(kind, where):
        if (here := os.getcwd()) not in sys.path:  # as workers have it, which start by python -m
            sys.path.append(here)
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UsageError(
                f"no module '{error.name}'", where=where, fix="is it in this folder or on PYTHONPATH?"
            ) from error
        made = getattr(module, class_name, None)
        if not callable(made):
            raise UsageError(f"'{module_name}' has no class '{class_name}'", where=where, fix="check the name")
        try:
            inspect.signature(made).bind()
        except TypeError as error:
            raise UsageError(f"'{spec}' cannot be made without arguments: {error}", where=where, fix=fix) from error
        plugin = made()
    missing = [name for name in needs if not hasattr(plugin, name)]
    if missing:
        raise UsageError(f"'{spec}' has no '{missing[0]}'", where=where, fix=fix)
    return plugin


@contextmanager
def running(kind: str, where: str) -> Iterator[None]:
    """Turn what the user's code in the block raises into one PersistWorldError that names its method and line.

    What arises in this package, which such code may call, stays as it is.
    """
    try:
        yield
    except PersistWorldError:
        raise
    except Exception as error:
        frames = list(traceback.walk_tb(error.__traceback__))[2:]  # without this function and the block
        known = [(frame.f_code, line, name) for frame, line in frames if (name := _top(frame)) in (_OWN, *_USERS)]
        if known and known[-1][2] == _OWN:
            raise
        what, users = f"the {kind} failed", [(code, line) for code, line, name in known if name != _OWN]
        if users:
            (method, _), (code, line) = users[0], users[-1]
            what += "" if method.co_qualname.startswith("<") else f" in {method.co_qualname}"
            where += f"; {code.co_filename}:{line}: {linecache.getline(code.co_filename, line).strip()}"
        said = "".join(traceback.format_exception_only(error)).strip()
        raise PersistWorldError(f"{what}: {said}", where=where, fix="--debug shows the traceback") from error


def _top(frame: FrameType) -> str:
    """The top-level package of a frame's code."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
