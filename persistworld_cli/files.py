"""Files and folders that are there whole or not at all: written beside their place, then renamed. No torch.

Also what goes into them: any value as JSON can hold it, a hash of one, and natural order of names.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from persistworld_cli.errors import PersistWorldError, UsageError


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key under which digits count as numbers: '9' < '10', '0008' < '0011'; any two names compare."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts], name


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, renamed onto it at the end: a reader finds the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON beside and rename."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(data))


def require_free(path: Path, *, force: bool, marker: str = "") -> None:
    """Raise where `path` cannot be written, before the work is done that would be written there.

    Args:
        path: file or folder that will be written.
        force: whether a file there may be replaced.
        marker: a file that a folder must hold to be replaced: no other folder is ever removed.

    Raises:
        UsageError: what is there may not be replaced.
        PersistWorldError: it lies in no folder that can be written to.
    """
    if not path.exists():
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise PersistWorldError(
                f"nothing can be written in '{above}'", where=str(path), fix="give another --output"
            )
        return
    if path.is_dir() != bool(marker) or (marker and not (path / marker).is_file()):
        what = "a folder" if path.is_dir() else "a file"
        raise UsageError(f"there is {what} of another kind already", where=str(path), fix="give another --output")
    if not force:
        raise UsageError("it is there already", where=str(path), fix="give another --output, or replace it: --force")


@contextmanager
def written_beside(path: Path, *, force: bool = False, marker: str = "") -> Iterator[Path]:
    """A name beside `path` to write to; it takes `path`'s place when the block ends well, and is removed otherwise.

    Args:
        path, force, marker: as for `require_free`.

    Raises:
        UsageError, PersistWorldError: as `require_free`, and a full disk.
    """
    require_free(path, force=force, marker=marker)
    beside, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        _let_others_read(beside)
        if path.is_dir():  # a folder cannot be renamed onto one that is not empty
            path.rename(old)
        beside.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise PersistWorldError(
            f"cannot be written: {str(error).splitlines()[0]}",
            where=str(path),
            fix="free some disk, or give another --output",
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        with suppress(OSError):
            beside.unlink()


def _let_others_read(path: Path) -> None:
    """Give files the rights that new files have here: safetensors leaves its own to their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in path.iterdir() if path.is_dir() else (path,):
        file.chmod(0o666 & ~mask)


def jsonable(value: Any) -> Any:
    """Dataclasses, arrays, tuples and numpy numbers as plain JSON values; NaN and infinities as None."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def hash_of(value: Any) -> str:
    """Twelve hex digits of anything that JSON can write (dataclasses too)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    """Dataclasses and arrays for `hash_of`."""
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)
