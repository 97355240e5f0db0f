"""``rollouts.json``, the summary of a run of `pi-rollout`: read by its next run, the leaderboard and the launcher.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persistworld_cli.read_files import read_json, reading

SUMMARY_FILE = "rollouts.json"
_WHAT = "not a run's rollouts.json"


def read_summary(path: Path, fix: str) -> dict[str, Any]:
    """A run's summary, with policy, task and a list of rollouts.

    Args:
        path: the file.
        fix: what to do if it is none.

    Raises:
        PersistWorldError: it cannot be read, or a value is missing or wrong.
    """
    found = read_json(path, _WHAT, fix)
    with reading(_WHAT, path, fix):
        rollouts = found.get("rollouts")
        named = isinstance(found.get("policy"), str) and isinstance(found.get("task"), str)
        if not named or not isinstance(rollouts, list) or not all(isinstance(entry, dict) for entry in rollouts):
            raise ValueError("no policy, task or rollouts")
        for entry in rollouts:
            _check(entry)
    return found


def read_verdict(path: Path) -> dict[str, Any]:
    """Success and progress in a rollout's own JSON file, where a person may have written them.

    Raises:
        PersistWorldError: the file cannot be read, or a value is wrong.
    """
    what = "unreadable rollout"
    found = read_json(path, what)
    with reading(what, path):
        _check(found)
    return {key: found.get(key) for key in ("success", "progress")}


def _check(entry: Mapping[str, Any]) -> None:
    """Raise ValueError where a rollout's success or progress has a wrong value."""
    success, progress = entry.get("success"), entry.get("progress")
    if success is not None and not isinstance(success, bool):
        raise ValueError(f"success is {success!r}: write true, false or null")
    if progress is not None and (isinstance(progress, bool) or not isinstance(progress, int | float)):
        raise ValueError(f"progress is {progress!r}, not a number")
    if progress is not None and not 0 <= progress <= 1:
        raise ValueError(f"progress is {progress!r}, not from 0 to 1")


def earlier_run(output: Path) -> tuple[str, list[Path]]:
    """What an earlier run left in a folder: "3 rollouts of policy 'hold'", and its files; ("", []) if there is none.

    Raises:
        PersistWorldError: its summary is damaged, so its files are not known.
    """
    path = output / SUMMARY_FILE
    if not path.is_file():
        return "", []
    found = read_summary(path, "remove the folder's rollouts, or use another --output")
    kinds = {"video": ".mp4", "sheet": ".png", "json": ".json"}  # a file that names another one is not believed
    named = [Path(str(entry.get(kind))) for entry in found["rollouts"] for kind in kinds]
    own = [output / name.name for name in named if name.suffix in kinds.values() and "\0" not in name.name]
    files = [path, path.with_suffix(".txt"), *(file for file in own if file.is_file())]
    return f"{len(found['rollouts'])} rollouts of policy '{found['policy']}'", files
