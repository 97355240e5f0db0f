"""The input files of a run, as its config.json records them: path and content."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.resume import PATHS, USES
from persistworld_cli.config.weight_names import content_of
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import hash_files

_READ_WHOLE = 64 * 2**20  # bytes; of larger ones, size and time of change are recorded: hashing takes too long


def describe_inputs(task: str, settings: Mapping[str, Mapping[str, Any]], request: Mapping[str, Any]) -> dict[str, Any]:
    """``setting -> {path, sha256 | bytes and modified}`` of every file or folder on this machine.

    A hub repository or a missing file has no entry: only its name is compared.
    """
    if task not in USES:
        return {}
    found = {}
    for key in PATHS:
        table, _, name = key.partition(".")
        value = request.get(name) if table == "request" else settings[table][name]
        if value and isinstance(value, str) and (entry := _describe(key, value, settings)):
            found[key] = entry
    return found


def _describe(key: str, value: str, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Path and content of one setting's file or folder; None unless it is on this machine."""
    try:
        path = resolve_path(value)
    except PersistWorldError:
        return None  # its reader reports it
    if not path.exists():
        return None
    path = path.absolute()
    entry: dict[str, Any] = {"path": value if value.startswith("bundled:") else str(path)}
    if key == "world.raw":  # may grow
        return entry
    if key == "world.dataset":  # may grow; only the scale of its actions changes a model's inputs
        stat = path / "meta" / "stat.json"
        own = not settings["model"]["stat"] and stat.is_file()
        return entry | ({"sha256": hash_files([(stat, "meta/stat.json")])} if own else {})
    try:
        return entry | describe_content(path)
    except OSError:  # a running training replaced it; other failures are reported by its reader
        return entry


def describe_content(path: Path) -> dict[str, Any]:
    """The content of a file, or of a folder without its card: ``{sha256}``, or ``{bytes, modified}`` if it is large."""
    files = content_of(path)
    stats = [file.stat() for file in files]
    size = sum(one.st_size for one in stats)
    if size <= _READ_WHOLE:
        return {"sha256": hash_files((file, str(file.relative_to(path)) if file != path else "") for file in files)}
    newest = max(one.st_mtime for one in stats)
    return {"bytes": size, "modified": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(newest))}
