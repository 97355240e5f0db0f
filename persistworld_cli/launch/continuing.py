"""Going on in a folder that holds finished work: the same run goes on, a changed one is refused before anything is
written, and a run that goes on with changes keeps its settings update by update.

The folder's config.json is the record of its run. ``settings_history.json`` is written at the first change: a list of
``{from, unit, at, run, changed, settings, job, inputs}``, the first entry of the run as it was begun.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persistworld_cli import again
from persistworld_cli.config.resume import USES, Change, Changes, find_changes
from persistworld_cli.console import note
from persistworld_cli.errors import UsageError
from persistworld_cli.files import write_json
from persistworld_cli.read_files import as_object, parse_json, read_json, reading
from persistworld_cli.run_files import CONFIG

HISTORY = "settings_history.json"
_DAMAGED = "the record of the folder's run cannot be read"
_NO_RECORD = "take another --output, or remove the file to go on without comparing settings"
_TRAININGS = ("pretrain", "pretrain-vae", "post-train")
_KEPT = ("settings", "job", "inputs")  # of a record, in the history


@dataclass(frozen=True)
class Kept:
    """Finished work in a folder: how much of what, and in words."""

    count: int
    unit: str
    words: str


def kept_work(task: str, output: Path) -> Kept | None:
    """What a task would go on from in a folder; None where there is nothing."""
    if task in _TRAININGS:
        names = {path.name.removeprefix("step-"): path for path in (output / "state").glob("step-*")}
        states = {int(name): path for name, path in names.items() if name.isdigit()}
        return _training(states[max(states)], max(states)) if states else None
    if task in USES:
        count = sum(not path.name.startswith(".") for path in (output / "rollouts").glob("*/*.npz"))
        return Kept(count, "rollouts", f"{count} finished rollouts") if count else None
    return None


def _training(state: Path, step: int) -> Kept:
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.stat().st_mtime))
    return Kept(step, "updates", f"update {step}, saved at {saved}")


@dataclass(frozen=True)
class Past:
    """The run that a folder holds, or that is gone on from elsewhere.

    Attributes:
        kept: its finished work.
        record: its config.json.
        changes: how what is asked for differs.
        history: its settings so far, oldest first; [] where they never changed.
    """

    kept: Kept
    record: dict[str, Any]
    changes: Changes
    history: list[dict[str, Any]]


def look_back(
    record: Mapping[str, Any], output: Path, *, with_changes: bool = False, command: Sequence[str] = ()
) -> Past | None:
    """What the folder holds of an earlier run; says what has changed since, and refuses what would mix results.

    Args:
        record: the run that is asked for, as config.json will hold it.
        output: its folder.
        with_changes: go on all the same (``--continue-with-changes``).
        command: as it was typed, for the refusal.

    Returns:
        None where there is nothing to go on from.

    Raises:
        UsageError: a setting that changes the result differs, or the folder holds another task's work.
    """
    task, job = str(record["task"]), record["job"]
    source, state = output, None
    if task in _TRAININGS and job.get("resume_from"):
        source, state = _source(Path(job["resume_from"]))
    if any(kept_work(known, output) for known in USES):
        own = _read(output / CONFIG)
        if own is not None and own.get("task") != task:
            _require_no_work(str(own.get("task")), task, output, command)
    if task not in USES or job.get("resume") is False:
        return None
    kept = kept_work(task, source)
    if state is not None and state.name.removeprefix("step-").isdigit():
        kept = _training(state, int(state.name.removeprefix("step-")))
    if kept is None:
        return None
    before = _read(source / CONFIG)
    if before is None:
        if source == output and task in _TRAININGS:
            note(f"{source} has no {CONFIG}: nobody knows with which settings its {kept.words} was made")
        return None
    if before.get("task") != task:
        return None  # its state will not fit, and that is said where it is read
    changes = find_changes(task, before, record)
    if changes.refused and not with_changes:
        raise _refusal(changes.refused, kept, source, output, record, command)
    _tell(changes, kept)
    return Past(kept, before, changes, _read_history(source))


def keep_history(past: Past | None, record: Mapping[str, Any], output: Path) -> None:
    """Write the settings by update where they have changed, once the run is sure to begin.

    Args:
        past: what `look_back` found.
        record: the run that begins.
        output: its folder.
    """
    path = output / HISTORY
    if past is None:
        path.unlink(missing_ok=True)  # of a run that is begun anew
        return
    history = past.history
    differ = past.changes.refused + past.changes.free
    if differ and not history:
        begun = {"from": 0, "unit": past.kept.unit, "at": past.record.get("started"), "run": past.record.get("run")}
        history = [begun | {"changed": {}} | {name: past.record.get(name) for name in _KEPT}]
    if differ:
        now = {"from": past.kept.count, "unit": past.kept.unit, "at": record["started"], "run": record["run"]}
        changed = {change.key: [change.old, change.new] for change in differ}
        history = [*history, now | {"changed": changed} | {name: record[name] for name in _KEPT}]
    if history:
        write_json(path, history)


def _require_no_work(other: str, task: str, output: Path, command: Sequence[str]) -> None:
    """Refuse the folder of another task that has finished work: its config.json is what it would go on with."""
    if (kept := kept_work(other, output)) is not None:
        raise UsageError(
            f"the folder holds the work of {other} ({kept.words}), this is {task}",
            where=again.shown(output),
            fix=f"take a folder of its own:\n    {again.with_output(command, again.fresh_folder(output))}",
        )


def _source(path: Path) -> tuple[Path, Path | None]:
    """The run's folder that ``--resume-from`` means, and the state where one is named."""
    folder = path.parent if path.suffix == ".pt" else path
    return (folder.parent.parent, folder) if folder.name.startswith("step-") else (folder, None)


def _refusal(
    refused: Sequence[Change], kept: Kept, source: Path, output: Path, record: Mapping[str, Any], command: Sequence[str]
) -> UsageError:
    """What has changed, old and new, and the two ways on."""
    lines = "\n    ".join(str(change) for change in refused)
    going_on = again.with_changes(command)
    if source == output:
        anew = f"begin another run:\n    {again.with_output(command, again.fresh_folder(output))}\n  or "
    else:
        anew = "leave --resume-from out to begin anew, or "
    kept_apart = "; those that are there stay, and are counted where they fit" if kept.unit == "rollouts" else ""
    return UsageError(
        f"the run in '{again.shown(source)}' ({kept.words}) has other settings:\n    {lines}",
        where=again.shown(source / CONFIG),
        fix=f"{anew}go on with the new ones from here{kept_apart}:\n    {going_on}",
    )


def _tell(changes: Changes, kept: Kept) -> None:
    """What has changed, a line each."""
    for label, found in (
        ("changed on request", changes.refused),
        ("changed", changes.free),
        ("not known to the saved run", [c for c in changes.unknown if c.old is None]),
        ("no longer a setting", [c for c in changes.unknown if c.old is not None]),
    ):
        for change in found:
            note(f"{label} since {kept.words}: {change}")


def _read(path: Path) -> dict[str, Any] | None:
    """A run's record; None where there is none.

    Raises:
        PersistWorldError: it is damaged, so that nobody can tell what it was.
    """
    if not path.exists():
        return None
    with reading(_DAMAGED, path, _NO_RECORD):
        data = read_json(path, _DAMAGED, _NO_RECORD)
        tables = as_object(data.get("settings", {}))
        if not all(isinstance(entries, dict) for entries in tables.values()):
            raise ValueError("no tables of settings")
    return data


def _read_history(folder: Path) -> list[dict[str, Any]]:
    """The settings so far. Raises PersistWorldError as `_read`."""
    path = folder / HISTORY
    if not path.exists():
        return []
    with reading(_DAMAGED, path, _NO_RECORD):
        data = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(data, list):
            raise ValueError("not a list")
    return data
