"""Continue the finished work in a folder. Changed settings are refused before anything is written, unless
``--continue-with-changes`` is given: then the folder records from which update on which settings were used.

The folder's config.json is the record of its run. ``settings_history.json`` is written at the first change: a list of
``{from, unit, at, run, changed, settings, request, inputs}``, whose first entry describes the run as it started.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persistworld_cli.command_line import relative, to_continue, unused_folder, with_changes, with_output
from persistworld_cli.config.requests import CONFIG, TaskRequest
from persistworld_cli.config.resume import USES, Change, Changes, find_changes, with_todays_names
from persistworld_cli.console import note
from persistworld_cli.errors import UsageError
from persistworld_cli.files import write_json
from persistworld_cli.policies.summary_file import SUMMARY_FILE, read_summary
from persistworld_cli.read_files import as_object, parse_json, read_json, reading

HISTORY = "settings_history.json"
_DAMAGED = "the record of the folder's run cannot be read"
_NO_RECORD = "take another --output, or remove the file to continue without comparing settings"
_TRAININGS = ("pretrain", "pretrain-vae", "post-train")
_IN_HISTORY = ("settings", "request", "inputs")  # of a record


@dataclass(frozen=True)
class FinishedWork:
    """The finished work in a folder: a count, its unit, and both in words."""

    count: int
    unit: str
    words: str


def saved_states(output: Path) -> dict[tuple[int, int], Path]:
    """The states of a run, by updates and time of saving (ns)."""
    found = ((path, _step(path)) for path in (output / "state").glob("step-*"))
    return {(step, path.stat().st_mtime_ns): path for path, step in found if step is not None}


def last_logged(output: Path) -> int | None:
    """The last update in a training's log; None if there is none, or the line is incomplete."""
    try:
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def find_finished_work(task: str, output: Path) -> FinishedWork | None:
    """What a task would continue in a folder; None if there is nothing."""
    if task in _TRAININGS:
        states = saved_states(output)
        return _trained(states[max(states)], max(states)[0]) if states else None
    if task in USES or task == "verify":
        count = sum(not path.name.startswith(".") for path in (output / "rollouts").glob("*/*.npz"))
        return FinishedWork(count, "rollouts", f"{count} finished rollouts") if count else None
    return None


def what_remains(request: TaskRequest) -> str:
    """After an interruption: what was saved, and the command to run."""
    work, command = find_finished_work(request.task, request.output), to_continue(request.command)
    if request.task == "pi-rollout" and (rollouts := _rolled(request.output)):
        return f"{request.task}: stopped; {relative(request.output)} holds {rollouts}. To start again:\n    {command}"
    if work is None and request.task != "extract-latents":
        return f"{request.task}: stopped; nothing was saved to continue with. To start again:\n    {command}"
    saved = f"{relative(request.output)} holds {work.words}" if work else "finished episodes are kept"
    return f"{request.task}: stopped; {saved}. To continue:\n    {command}"


def _rolled(output: Path) -> str:
    """What an interrupted `pi-rollout` saved, in words; "" if nothing."""
    result, config = output / SUMMARY_FILE, output / CONFIG
    if not result.is_file() or not config.is_file() or result.stat().st_mtime_ns < config.stat().st_mtime_ns:
        return ""  # of an earlier run
    entries = read_summary(result, "run it again")["rollouts"]
    cut = sum(not entry.get("complete", True) for entry in entries)
    return f"{len(entries)} rollouts" + (f", {cut} of them incomplete" if cut else "")


def _step(state: Path) -> int | None:
    """Updates of a saved state, by its folder's name; None for another folder."""
    digits = state.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else None


def _trained(state: Path, step: int) -> FinishedWork:
    """The work that a saved state holds."""
    saved = time.localtime(state.stat().st_mtime)
    return FinishedWork(step, "updates", f"update {step}, saved at {time.strftime('%Y-%m-%d %H:%M:%S', saved)}")


@dataclass(frozen=True)
class EarlierRun:
    """The run that a folder holds, or that is resumed from elsewhere.

    Attributes:
        work: what it finished.
        record: its config.json.
        changes: how the new run differs.
        history: its settings so far, oldest first; [] if they never changed.
    """

    work: FinishedWork
    record: dict[str, Any]
    changes: Changes
    history: list[dict[str, Any]]


def find_earlier_run(record: Mapping[str, Any], output: Path) -> EarlierRun | None:
    """Find the run that a new one continues; print what has changed, and refuse changes that would mix results.

    Args:
        record: the new run, as config.json will hold it.
        output: its folder.

    Returns:
        None if there is nothing to continue.

    Raises:
        UsageError: a setting that changes the result differs, or the folder holds another task's work.
    """
    task, request = str(record["task"]), record["request"]
    source, state = output, None
    if task in _TRAININGS and request.get("resume_from"):
        source, state = _source(Path(request["resume_from"]))
    if any(find_finished_work(known, output) for known in USES):
        _require_same_task(task, output, request.get("command", ()))
    if task not in USES or request.get("resume") is False:
        return None
    work = find_finished_work(task, source)
    if state is not None and state.exists() and (step := _step(state)) is not None:
        work = _trained(state, step)
    if work is None:
        return None
    before = _read_record(source)
    if before is None:
        if source == output and task in _TRAININGS:
            note(f"{source} has no {CONFIG}: the settings that made its {work.words} are unknown")
        return None
    if before.get("task") != task:
        return None  # its state does not fit, which the reader of the state reports
    changes = find_changes(task, before, record)
    if changes.refused and not request.get("with_changes"):
        raise _refusal(changes.refused, work, source, output, request.get("command", ()))
    for label, found in (
        ("changed on request", changes.refused),
        ("changed", changes.free),
        ("not known to the saved run", [c for c in changes.unknown if c.old is None]),
        ("no longer a setting", [c for c in changes.unknown if c.old is not None]),
    ):
        for change in found:
            note(f"{label} since {work.words}: {change}")
    return EarlierRun(work, before, changes, _read_history(source))


def keep_history(earlier: EarlierRun | None, record: Mapping[str, Any], output: Path) -> None:
    """Add the new settings to the history if they have changed; called when the new run is about to start.

    Args:
        earlier: what `find_earlier_run` found.
        record: the new run.
        output: its folder.
    """
    path = output / HISTORY
    if earlier is None:
        path.unlink(missing_ok=True)  # of a run that is replaced
        return

    def entry(of: Mapping[str, Any], count: int, changed: Mapping[str, Any]) -> dict[str, Any]:
        when = {"from": count, "unit": earlier.work.unit, "at": of.get("started"), "run": of.get("run")}
        return when | {"changed": changed} | {name: of.get(name) for name in _IN_HISTORY}

    history = earlier.history
    if differ := earlier.changes.refused + earlier.changes.free:
        changed = {change.key: [change.old, change.new] for change in differ}
        history = [*(history or [entry(earlier.record, 0, {})]), entry(record, earlier.work.count, changed)]
    if history:
        write_json(path, history)


def _require_same_task(task: str, output: Path, command: Sequence[str]) -> None:
    """Refuse the folder of another task's finished work: its config.json is needed to continue that work."""
    own = _read_record(output)
    other = task if own is None else str(own.get("task"))
    if other != task and (work := find_finished_work(other, output)) is not None:
        raise UsageError(
            f"the folder holds the work of {other} ({work.words}), this is {task}",
            where=relative(output),
            fix=f"use another folder:\n    {with_output(command, unused_folder(output))}",
        )


def _source(path: Path) -> tuple[Path, Path | None]:
    """The run's folder that ``--resume-from`` means, and the state if it names one."""
    folder = path.parent if path.suffix == ".pt" else path
    return (folder.parent.parent, folder) if folder.name.startswith("step-") else (folder, None)


def _refusal(
    refused: Sequence[Change], work: FinishedWork, source: Path, output: Path, command: Sequence[str]
) -> UsageError:
    """What has changed, old and new, and the two ways to continue."""
    lines = "\n    ".join(str(change) for change in refused)
    other = "leave --resume-from out to start a new run, or "
    if source == output:
        other = f"start another run:\n    {with_output(command, unused_folder(output))}\n  or "
    kept_apart = "; finished rollouts that still fit are reused" if work.unit == "rollouts" else ""
    return UsageError(
        f"the run in '{relative(source)}' ({work.words}) has other settings:\n    {lines}",
        where=relative(source / CONFIG),
        fix=f"{other}continue from here with the new ones{kept_apart}:\n    {with_changes(command)}",
    )


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a folder's run; None if there is none.

    Raises:
        PersistWorldError: it is damaged.
    """
    path = folder / CONFIG
    if not path.exists():
        return None
    with reading(_DAMAGED, path, _NO_RECORD):
        data = read_json(path, _DAMAGED, _NO_RECORD)
        tables = as_object(data.get("settings", {}))
        if not all(isinstance(entries, dict) for entries in tables.values()):
            raise ValueError("no tables of settings")
        return with_todays_names(data)


def _read_history(folder: Path) -> list[dict[str, Any]]:
    """The settings so far. Raises PersistWorldError as `_read_record`."""
    path = folder / HISTORY
    if not path.exists():
        return []
    with reading(_DAMAGED, path, _NO_RECORD):
        data = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(data, list):
            raise ValueError("not a list")
        return [with_todays_names(as_object(entry)) for entry in data]
