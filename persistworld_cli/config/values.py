"""Types of the settings, read from the dataclasses' annotations, and how a written value becomes one."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from typing import Any

import tomli

from persistworld_cli.config.settings import Settings
from persistworld_cli.errors import UsageError

_NAMES: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


@functools.cache
def field_types() -> dict[str, Any]:
    """``table.key`` -> the annotated type, for every setting."""
    return {
        f"{table}.{name}": hint
        for table, cls in typing.get_type_hints(Settings).items()
        for name, hint in typing.get_type_hints(cls).items()
        if name in {field.name for field in dataclasses.fields(cls)}
    }


def expected(hint: Any) -> str:
    """A type in a user's words."""
    if hint in _NAMES:
        return _NAMES[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        plural = {bool: "booleans", int: "whole numbers", float: "numbers", str: "strings"}.get(args[0], "values")
        return f"a list of {plural}"
    if origin is dict:
        return "a table of numbers" if args[1] is float else "a table"
    return str(hint)


def coerce(value: Any, hint: Any, *, key: str, where: str) -> Any:
    """``value`` as type ``hint``: whole numbers pass as numbers, lists become tuples; nothing else is converted.

    Raises:
        UsageError: another type, or a number that is not finite.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        _plain(value, key=key, where=where)
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(coerce(item, args[0], key=f"{key}[{i}]", where=where) for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {str(name): coerce(item, args[1], key=f"{key}.{name}", where=where) for name, item in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # a whole number beyond every float
            number = math.inf
        if not math.isfinite(number):
            raise UsageError(f"{key} is not finite, or too large", where=where, fix="write a finite number")
        return number
    if hint in (bool, int, str) and type(value) is hint:
        return value
    raise UsageError(
        f"{key} = {value!r} has the wrong type: expected {expected(hint)}", where=where, fix=f"write {expected(hint)}"
    )


def parse_text(text: str, hint: Any) -> Any:
    """A value written on a command line or in the environment: TOML where it is TOML, a plain string where not.

    A string setting takes the text as it stands (``--set eval.split=val``); a list may be written without brackets and
    quotes (``--set eval.episodes=99,199``).
    """
    if typing.get_origin(hint) is tuple:
        value = _toml(text)
        if isinstance(value, list):
            return value
        return [parse_text(part.strip(), typing.get_args(hint)[0]) for part in text.split(",") if part.strip()]
    value = _toml(text)
    if hint is str:
        return value if isinstance(value, str) else text
    return text if value is None else value


def _toml(text: str) -> Any:
    """The TOML value, or None where it is none (TOML has no null)."""
    try:
        data = tomli.loads(f"value = {text}")
    except (ValueError, RecursionError):  # TOMLDecodeError is a ValueError
        return None
    return data["value"] if data.keys() == {"value"} else None


def _plain(value: Any, *, key: str, where: str) -> None:
    """Refuse what JSON cannot carry to a worker (dates, non-finite numbers)."""
    if isinstance(value, dict):
        for name, item in value.items():
            _plain(item, key=f"{key}.{name}", where=where)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _plain(item, key=f"{key}[{i}]", where=where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{key} = {value} is not finite", where=where, fix="write a finite number")
    elif not isinstance(value, str | int | float | bool):
        kinds = "a string, number, list or table"
        raise UsageError(f"{key} = {value!r} has the wrong type: expected {kinds}", where=where, fix=f"write {kinds}")
