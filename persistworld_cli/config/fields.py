"""How a setting is declared: its annotation gives type, bounds and choices, and one pass checks them all.

    steps: Annotated[int, Bounds(ge=1)] = 50
    decay: Literal["constant", "cosine"] = "constant"
    updates: Count = free(4000)

`coerce` converts a value from a file or command line to the declared type; `check_fields` refuses a value that is out
of bounds or not one of the choices. Annotations nest: ``tuple[Literal["a", "b"], ...]``, ``dict[str, Share]``,
``Count | None``. Importing pydantic alone takes longer than `--help`, and its errors lack key, place and nearest name.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tomli

from persistworld_cli.errors import UsageError, nearest

FREE = {"resume": "free"}  # metadata of a setting, or of a whole table, that a resumed run may change
_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a path",
}
MODULE_CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_RELATIONS = (
    ("ge", "at least", operator.ge),
    ("gt", "more than", operator.gt),
    ("le", "at most", operator.le),
    ("lt", "less than", operator.lt),
)
_PLURALS: dict[Any, str] = {bool: "booleans", int: "whole numbers", float: "numbers", str: "strings"}


def free(default: Any) -> Any:
    """A setting that a resumed run may change, with its default."""
    return dataclasses.field(default=default, metadata=FREE)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Bounds of a number: at least `ge`, more than `gt`, at most `le`, less than `lt`; `fix`: what to write instead."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    fix: str = "write another value, or leave it out for the default"

    def check(self, value: float, key: str, where: str) -> None:
        """Raise UsageError for a number out of bounds."""
        given = [(getattr(self, name), words, holds) for name, words, holds in _RELATIONS]
        given = [rule for rule in given if rule[0] is not None]
        if not all(holds(value, bound) for bound, _, holds in given):
            must = " and ".join(f"{words} {bound:g}" for bound, words, _ in given)
            raise UsageError(f"{key} = {value} must be {must}", where=where, fix=self.fix)


@dataclass(frozen=True)
class Known:
    """Choices of a string: one of `names`, or ``module:Class`` for a user-defined class (config/plugins.py)."""

    kind: str
    names: tuple[str, ...]

    def check(self, value: str, key: str, where: str) -> None:
        """Raise UsageError for a name that is neither."""
        if value not in self.names and not MODULE_CLASS.fullmatch(value):
            fix = f"{nearest(value, self.names)} (or module:Class for your own)"
            raise UsageError(f"unknown {self.kind} '{value}'", where=where, fix=fix)


Count = Annotated[int, Bounds(ge=1)]
Whole = Annotated[int, Bounds(ge=0)]
Port = Annotated[int, Bounds(ge=0, le=65535)]
NonNegative = Annotated[float, Bounds(ge=0)]
Positive = Annotated[float, Bounds(gt=0)]
Share = Annotated[float, Bounds(ge=0, le=1)]


_hints = functools.cache(functools.partial(typing.get_type_hints, include_extras=True))


def field_types(cls: Any) -> dict[str, Any]:
    """Field -> its annotation, for every field of a dataclass."""
    return {field.name: _hints(cls)[field.name] for field in dataclasses.fields(cls)}


def check_fields(values: object, prefix: str, place: Callable[[str], str]) -> None:
    """Raise if a field of a dataclass violates its annotation.

    Args:
        values: the dataclass.
        prefix: of its fields in messages: ``post_train.``.
        place: prefix and field -> where it was written.

    Raises:
        UsageError: the first value that is out of bounds or not one of the choices.
    """
    for name, hint in field_types(type(values)).items():
        _check(getattr(values, name), hint, prefix + name, functools.partial(place, prefix + name))


def _check(value: Any, hint: Any, key: str, where: Callable[[], str]) -> None:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        _check(value, args[0], key, where)
        for rule in args[1:]:
            rule.check(value, key, where())
    elif origin is Literal and value not in args:
        raise UsageError(
            f"{key} = {value!r} is not one of {', '.join(map(str, args))}", where=where(), fix=nearest(str(value), args)
        )
    elif origin is tuple:
        for i, (item, kind) in enumerate(zip(value, _entries(args, value), strict=True)):
            _check(item, kind, f"{key}[{i}]", where)
    elif origin is dict:
        for name, item in value.items():
            _check(name, args[0], f"{key}: name", where)
            _check(item, args[1], f"{key}.{name}", where)
    elif origin in (Union, types.UnionType) and value is not None:
        _check(value, args[0], key, where)


def _entries(args: tuple[Any, ...], value: Collection[Any]) -> tuple[Any, ...]:
    """The annotation of each entry of a tuple; `coerce` refuses a wrong number of entries."""
    return (args[0],) * len(value) if args[1:] == (...,) else args


def bare_type(hint: Any) -> Any:
    """A type without bounds and choices: what a value is coerced to."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated or origin in (Union, types.UnionType):  # a union is one type or None
        return bare_type(args[0])
    return type(args[0]) if origin is Literal else hint


def choices(hint: Any) -> tuple[str, ...]:
    """The values that an annotation names, of one entry if it is a list; () if there is no list of them."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return tuple(map(str, args))
    if known := [rule.names for rule in args[1:] if isinstance(rule, Known)]:
        return known[0]
    if origin in (Annotated, Union, types.UnionType, tuple):
        return choices(args[0])
    return ("true", "false") if hint is bool else ()


def expected(hint: Any) -> str:
    """A type in a user's words."""
    bare = bare_type(hint)
    if bare in _NAMES:
        return _NAMES[bare]
    origin, args = typing.get_origin(bare), typing.get_args(bare)
    if origin is tuple:
        count = "" if args[1:] == (...,) else f"{len(args)} "
        return f"a list of {count}{_PLURALS.get(bare_type(args[0]), 'values')}"
    if origin is dict:
        return "a table of numbers" if bare_type(args[1]) is float else "a table"
    return str(bare)


def coerce(value: Any, hint: Any, *, key: str, where: str) -> Any:
    """``value`` as type ``hint``: whole numbers pass as numbers, lists become tuples; nothing else is converted.

    Raises:
        UsageError: another type, or a number that is not finite.
    """
    if value is None and type(None) in typing.get_args(hint):
        return None
    bare = bare_type(hint)
    origin, args = typing.get_origin(bare), typing.get_args(bare)
    if bare is Any:
        _plain(value, key=key, where=where)
        return value
    if origin is tuple and isinstance(value, list | tuple) and len(kinds := _entries(args, value)) == len(value):
        pairs = enumerate(zip(value, kinds, strict=True))
        return tuple(coerce(item, kind, key=f"{key}[{i}]", where=where) for i, (item, kind) in pairs)
    if origin is dict and isinstance(value, dict):
        return {str(name): coerce(item, args[1], key=f"{key}.{name}", where=where) for name, item in value.items()}
    if bare is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # a whole number beyond every float
            number = math.inf
        if not math.isfinite(number):
            raise UsageError(f"{key} is not finite, or too large", where=where, fix="write a finite number")
        return number
    if bare in (bool, int, str) and type(value) is bare:
        return value
    if bare is Path and isinstance(value, str | Path):
        return Path(value)
    kind = expected(hint)
    raise UsageError(f"{key} = {value!r} has the wrong type: expected {kind}", where=where, fix=f"write {kind}")


def parse_text(text: str, hint: Any) -> Any:
    """A value written on a command line or in the environment: TOML if it parses as TOML, else a plain string.

    A string setting takes the text unchanged (``--set eval.split=val``); a list may be written without brackets and
    quotes (``--set eval.episodes=99,199``).
    """
    bare, value = bare_type(hint), _toml(text)
    if typing.get_origin(bare) is tuple:
        if isinstance(value, list):
            return value
        return [parse_text(part.strip(), typing.get_args(bare)[0]) for part in text.split(",") if part.strip()]
    if bare is str:
        return value if isinstance(value, str) else text
    return text if value is None else value


def _toml(text: str) -> Any:
    """The value of a TOML text, or None if it is not TOML (which has no null)."""
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
