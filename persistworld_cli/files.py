"""Atomic writes of files and folders, and conversion of values to JSON. Needs no torch.

A file is written under a hidden name in the same folder, synced, then renamed: after a kill, a power cut or a full disk
either the old file or the complete new one exists. New files get the umask's mode. A failed write raises `CannotWrite`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from persistworld_cli.errors import PersistWorldError, UsageError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)
_NOT_SYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)  # folders of some network file systems
_PARTIAL = re.compile(r"\.(?P<stem>.*)\.\d+\.(?P<kind>partial|parts|old)(?P<suffix>(\.[^.]*)?)")
_ROOM = 1 << 16  # bytes; with less free, any failed write is a full disk


class CannotWrite(PersistWorldError):
    """The disk is full or not writable."""


@contextmanager
def writing(path: Path, fix: str = "", closed: str = "") -> Iterator[None]:
    """Turn an OSError of the block, which only writes `path`, into a CannotWrite.

    Args:
        path: file or folder.
        fix: how to fix a full disk.
        closed: how to fix missing permissions.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno in NO_ROOM:
            fix = fix or "free some disk and try again"
        elif error.errno in _NO_RIGHTS:
            fix = closed or "check its permissions and those of its folder"
        else:
            fix = "check the disk, and what is at this path"
        raise CannotWrite(f"cannot be written: {_reason(error, path)}", where=str(path), fix=fix) from error


def _reason(error: OSError, path: Path) -> str:
    """The reason in a few words; numpy, torch and safetensors describe a full disk differently."""
    if error.errno is not None:
        return os.strerror(error.errno)
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    if shutil.disk_usage(folder).free < _ROOM:
        return os.strerror(errno.ENOSPC)
    return (str(error).splitlines() or [repr(error)])[0]


@contextmanager
def whole_file(path: Path, fix: str = "") -> Iterator[Path]:
    """An empty file to write to, which replaces `path` when the block succeeds and is removed when it fails.

    The block must only write. The file has `path`'s suffix, which some libraries need.

    Args:
        path: the file; missing folders are made.
        fix: how to fix a full disk.

    Raises:
        CannotWrite: the disk is full or not writable.
    """
    partial = _beside(path, "partial")
    try:
        with writing(path, fix):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)  # of a killed process with the same id
            with partial.open("xb") as file:
                rights = os.fstat(file.fileno()).st_mode & 0o777
            yield partial
            if partial.stat().st_mode & 0o777 != rights:  # safetensors makes its files private
                partial.chmod(rights)
            sync(partial)
            partial.replace(path)
            sync(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def whole_folder(path: Path, fix: str = "") -> Iterator[Path]:
    """An empty folder to write into, which replaces `path` when the block succeeds; as `whole_file`."""
    partial, old = _beside(path, "partial"), _beside(path, "old")
    try:
        with writing(path, fix):
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in (partial, old):  # of a killed process with the same id
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir()
            yield partial
            for place in [*partial.rglob("*"), partial]:
                sync(place)
            if path.exists():  # a folder cannot be renamed onto one that is not empty
                path.rename(old)
            try:
                partial.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
            sync(path.parent)
    except CannotWrite as error:  # of a file in it
        raise CannotWrite(
            error.what, where=str(error.where).replace(str(partial), str(path)), fix=error.fix
        ) from error.__cause__
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, for its parts. Raises CannotWrite."""
    scratch = _beside(path, "parts")
    try:
        with writing(path):
            scratch.mkdir(parents=True)
            yield scratch
    except CannotWrite as error:
        raise CannotWrite(error.what, where=str(path), fix=error.fix) from error.__cause__
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.stem}.{os.getpid()}.{kind}{path.suffix}")


def sync(path: Path) -> None:
    """fsync a file, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in _NOT_SYNCED:
            raise
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove the partial files of killed processes from a folder that no other process writes to."""
    for left in list(folder.iterdir()) if folder.is_dir() else ():
        if not (found := _PARTIAL.fullmatch(left.name)):
            continue
        place = folder / (found["stem"] + found["suffix"])
        if found["kind"] == "old" and not place.exists():  # killed between its two renames
            left.rename(place)
        else:
            remove(left)


def remove(path: Path) -> None:
    """Remove a file, link or whole folder; errors are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def write_text(path: Path, text: str, fix: str = "") -> None:
    """Write a text in UTF-8, atomically. Raises CannotWrite."""
    with whole_file(path, fix) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any, *, indent: int | None = 1, fix: str = "") -> None:
    """Write anything that `jsonable` takes as JSON, atomically. Raises CannotWrite."""
    text = json.dumps(jsonable(data), indent=indent, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n", fix)


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Natural sort key: '9' < '10', '0008' < '0011'."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts], name


def require_free(path: Path, *, force: bool, marker: str = "") -> None:
    """Raise before the work starts if its output cannot be written.

    Args:
        path: the file or folder.
        force: whether it may be replaced.
        marker: for a folder, a file that it must contain; a folder without this file is never replaced.

    Raises:
        UsageError: it exists and may not be replaced.
        PersistWorldError: its folder is not writable.
    """
    if not path.exists():
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise PersistWorldError(f"'{above}' is not writable", where=str(path), fix="give another --output")
        return
    if path.is_dir() != bool(marker) or (marker and not (path / marker).is_file()):
        what = "a folder" if path.is_dir() else "a file"
        raise UsageError(f"it is {what} of another kind", where=str(path), fix="give another --output")
    if not force:
        raise UsageError("it exists already", where=str(path), fix="give another --output, or replace it: --force")


def jsonable(value: Any) -> Any:
    """Any value as plain JSON: arrays, numpy's numbers, dataclasses, sets, paths; NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    if hasattr(value, "tolist"):  # before float, which numpy's float64 is too
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else jsonable(_plain(value))


def hash_of(value: Any) -> str:
    """Twelve hex digits that identify a value of JSON's types or dataclasses."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()[:12]


def hash_files(files: Iterable[tuple[Path, str]]) -> str:
    """SHA-256 of files in order, each with the name to include in the hash ("": no name)."""
    digest = hashlib.sha256()
    for path, name in files:
        if name:
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Convert a value that JSON has no type for."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, set | frozenset):  # in one order in every process
        return sorted(value, key=str)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested tables by dotted names."""
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return rows
