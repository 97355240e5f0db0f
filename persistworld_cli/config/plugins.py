"""User-defined classes, named ``module:Class``: policies, judges, referees, rewards and samplers."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from persistworld_cli.config.fields import Known
from persistworld_cli.errors import PersistWorldError, UsageError


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
        PersistWorldError: its module or its constructor fails; with the traceback.
    """
    Known(kind, tuple(known)).check(spec, kind, where)
    module_name, _, class_name = spec.partition(":")
    where = f"{where} {spec}"
    with running(kind, where):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UsageError(f"no module '{error.name}'", where=where, fix="is it on PYTHONPATH?") from error
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
    """Turn whatever the user's code in the block raises into one PersistWorldError that shows its traceback."""
    try:
        yield
    except PersistWorldError:
        raise
    except Exception as error:
        shown = traceback.format_exc().rstrip()
        raise PersistWorldError(f"the {kind} failed:\n{shown}", where=where) from error
