"""Classes of the user's own, named as ``module:Class`` on the command line: policies, judges."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from persistworld_cli.errors import UsageError


def make_plugin(spec: str, option: str, methods: Sequence[str], fix: str) -> Any:
    """An instance of ``module:Class``, made without arguments.

    Args:
        spec: what was named.
        option: the flag it was named with.
        methods: that it must have.
        fix: said where one is missing.

    Raises:
        UsageError: the module or the class is not there, it cannot be made without arguments, or a method is missing.
    """
    where = f"{option} {spec}"
    module_name, _, class_name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"no module '{error.name}'", where=where, fix="is it on PYTHONPATH?") from error
    made = getattr(module, class_name, None)
    if not callable(made):
        raise UsageError(f"'{module_name}' has no class '{class_name}'", where=where, fix="check the name")
    try:
        plugin = made()
    except TypeError as error:
        raise UsageError(f"'{spec}' cannot be made without arguments: {error}", where=where, fix=fix) from error
    for name in methods:
        if not callable(getattr(plugin, name, None)):
            raise UsageError(f"'{spec}' has no method '{name}'", where=where, fix=fix)
    return plugin
