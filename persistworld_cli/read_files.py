"""Read untrusted files: any defect becomes one error that names the file. Needs no torch.

A file may be truncated, overwritten, of another kind or hold unexpected types, for which libraries raise dozens of
exceptions. `reading` turns them into a PersistWorldError; its block must only parse and check the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli

from persistworld_cli.errors import PersistWorldError, UsageError

AGAIN = "fetch the file again, or repair it"
DAMAGED_NOTES = "put the file back, or extract into another folder"
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


@contextmanager
def reading(
    what: str, path: Path | str, fix: str = AGAIN, error: type[PersistWorldError] = PersistWorldError
) -> Iterator[None]:
    """Turn whatever parsing a file raises into one error.

    Args:
        what: the start of the message: ``unreadable list of tasks``.
        path: the file.
        fix: how to fix it.
        error: the class to raise.

    Raises:
        PersistWorldError: the block failed; a PersistWorldError from the block passes unchanged.
    """
    try:
        yield
    except PersistWorldError:
        raise
    except Exception as raised:  # json, pyarrow, zipfile, pickle, numpy and torch share no base class
        raise error(f"{what}: {reason(raised)}", where=str(path), fix=fix) from raised


def reason(error: BaseException) -> str:
    """Why a file cannot be read, in one line."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, MemoryError):
        return "it declares more than fits into memory"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON, or a string in it has half a surrogate pair, which cannot be encoded again.
        RecursionError: nested too deep.
    """
    value = json.loads(text)
    require_unicode(value, text)
    return value


def require_unicode(value: Any, text: str) -> None:
    """Raise ValueError if a value parsed from a JSON text has half a surrogate pair."""
    if _HALF_PAIR.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text in it holds half a surrogate pair") from error


def read_json(
    path: Path, what: str, fix: str = AGAIN, error: type[PersistWorldError] = PersistWorldError
) -> dict[str, Any]:
    """The object in a JSON file; arguments as for `reading`.

    Raises:
        PersistWorldError: absent, not UTF-8, not JSON, nested too deep, or not an object.
    """
    with reading(what, path, fix, error):
        return as_object(parse_json(path.read_text(encoding="utf-8")))


def read_json_lines(path: Path, what: str, fix: str = AGAIN) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; empty lines are skipped.

    Raises:
        PersistWorldError: as `read_json`; it names the line.
    """
    rows = []
    with reading(what, path, fix):
        lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            with reading(f"{what}: line {number} is unreadable", path, fix):
                rows.append(as_object(parse_json(line)))
    return rows


def read_toml(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a TOML file, and its tables.

    Raises:
        UsageError: not UTF-8, not TOML, or nested too deep. PersistWorldError: it cannot be read.
    """
    with reading("cannot be read", path):
        raw = path.read_bytes()
    with reading("not TOML", path, "fix the file at that place", UsageError):
        text = raw.decode("utf-8")
        return text, tomli.loads(text)


def as_object(value: Any) -> dict[str, Any]:
    """`value`, which must be a map. Raises TypeError."""
    if not isinstance(value, Mapping):
        raise TypeError(f"it is {_kind(value)}, not a table of names and values")
    return dict(value)


def whole_number(value: Any, name: str, low: int = 0, high: int = 2**62) -> int:
    """`value`, which must be a whole number from `low` to `high`; 3.0 counts as one. Raises ValueError."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if number is None or not math.isfinite(number) or int(number) != number or not low <= number <= high:
        raise ValueError(f"{name} is {_shown(value)}, not a whole number from {low} to {high}")
    return int(number)


def positive_number(value: Any, name: str) -> float:
    """`value`, which must be a finite number above 0. Raises ValueError."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e300:
        raise ValueError(f"{name} is {_shown(value)}, not a number above 0")
    return float(value)


def fill_template(template: Any, names: Mapping[str, str | int]) -> str:
    """A path out of a template such as ``data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet``.

    `str.format` would let a file reach into objects (``{a.b}``) or ask for gigabytes (``{a:2000000000d}``).

    Args:
        template: text with the fields of `names`, each with at most a width.
        names: field -> value.

    Raises:
        ValueError: not text, a NUL, or a field that is unknown or formatted in another way.
    """
    if not isinstance(template, str):
        raise ValueError(f"a path template is {_shown(template)}, not text")

    def fill(found: re.Match[str]) -> str:
        if found[1] is None:  # {{ or }}
            return found[0][0]
        value = names[found[1]]
        return format(value, found[2] or "") if isinstance(value, int) else value

    fields = re.compile(rf"\{{\{{|\}}\}}|\{{({'|'.join(names)})(?::(0?\d{{0,2}}d?))?\}}")
    if set("{}") & set(fields.sub("", template)):
        known = ", ".join(f"{{{name}}}" for name in names)
        raise ValueError(f"path template {_shown(template)}: a field other than {known} with a width up to 99")
    path = fields.sub(fill, template)
    if "\0" in path:
        raise ValueError(f"path template {_shown(template)} holds a NUL")
    return path


def _kind(value: Any) -> str:
    """The name of a JSON value's type, for messages."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return "nothing (null)" if value is None else names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    """A value as text, shortened for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
