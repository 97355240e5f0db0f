"""A leaderboard of policies: what was imagined of each, against what really came of it.

A policy's score is the mean over tasks of the share of its judged rollouts that succeeded. Against real results only
tasks that both sides have count, so that the scores compare the same.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from persistworld_cli.errors import PersistWorldError, nearest
from persistworld_cli.read_files import read_json, reading, reason
from persistworld_cli.statistics.paired import wilson
from persistworld_cli.statistics.ranking import mmrv, pearson

SIMULATOR = "sim"  # --real sim: what `pi-rollout --against sim` found
_COLUMNS = ("policy", "task", "success")


@dataclass
class Tally:
    """Rollouts of one policy in one task."""

    success: list[bool] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)
    cannot_tell: int = 0
    incomplete: int = 0


@dataclass(frozen=True)
class Real:
    """A real success rate (0 .. 1), and over how many trials; None if that is not told."""

    success: float
    n: int | None


Table = dict[str, dict[str, Tally]]  # policy -> task -> rollouts
Results = dict[str, dict[str, Real]]


def read_runs(runs: Sequence[str]) -> tuple[Table, Results]:
    """Rollouts of several runs of `pi-rollout`, and what the simulator said where it was asked.

    Args:
        runs: folders or their ``rollouts.json``, ``NAME=PATH`` to call a run's policy by another name. A rollout's own
            JSON file counts where it lies beside: a person may have judged it there.

    Raises:
        PersistWorldError: a file that is not there or none of a run's.
    """
    imagined: Table = {}
    simulated: dict[str, dict[str, list[bool]]] = {}
    for run in runs:
        name, path = _named(run)
        told = _read(path)
        policy, task = name or str(told.get("policy")), str(told.get("task"))
        tally = imagined.setdefault(policy, {}).setdefault(task, Tally())
        for entry in told["rollouts"]:
            _count(tally, _own(path, entry))
            if entry.get("sim_success") is not None:
                simulated.setdefault(policy, {}).setdefault(task, []).append(bool(entry["sim_success"]))
    real = {
        policy: {task: Real(float(np.mean(values)), len(values)) for task, values in tasks.items()}
        for policy, tasks in simulated.items()
    }
    return imagined, real


def _named(run: str) -> tuple[str, Path]:
    """``NAME=PATH`` or ``PATH`` -> name ('' for none) and the run's file."""
    name, equals, rest = run.partition("=")
    path = Path(rest if equals and not Path(run).exists() else run).expanduser()
    path = path / "rollouts.json" if path.is_dir() else path
    if not path.is_file():
        raise PersistWorldError(
            "no rollouts.json here", where=str(path), fix="give the output folder of persistworld pi-rollout"
        )
    return (name if equals and str(path).startswith(rest) else ""), path


def _read(path: Path) -> dict[str, Any]:
    what, fix = "not a run's rollouts.json", "give the output folder of persistworld pi-rollout"
    with reading(what, path, fix):
        told = read_json(path, what, fix)
        rollouts = told.get("rollouts")
        if not isinstance(rollouts, list) or not isinstance(told.get("policy"), str):
            raise ValueError("no policy, task or rollouts")
        if not isinstance(told.get("task"), str) or not all(isinstance(entry, dict) for entry in rollouts):
            raise ValueError("no policy, task or rollouts")
        for entry in rollouts:
            _check(entry)
        return told


def _check(entry: Mapping[str, Any]) -> None:
    """Raise ValueError where a rollout does not say how it ended as it should."""
    success, progress = entry.get("success"), entry.get("progress")
    if success is not None and not isinstance(success, bool):
        raise ValueError(f"success is {success!r}: write true, false or null")
    if progress is not None and (isinstance(progress, bool) or not isinstance(progress, int | float)):
        raise ValueError(f"progress is {progress!r}, not a number")
    if progress is not None and not 0 <= progress <= 1:
        raise ValueError(f"progress is {progress!r}, not from 0 to 1")


def _own(path: Path, entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """A rollout's own JSON, where it lies beside the run's; else its entry there."""
    own = path.parent / Path(str(entry.get("json") or "?")).name
    try:
        if not own.is_file():
            return entry
    except OSError:  # a name that no file can have
        return entry
    with reading("unreadable rollout", own):
        told = read_json(own, "unreadable rollout")
        _check(told)
    return {**entry, "success": told.get("success"), "progress": told.get("progress")}


def _count(tally: Tally, entry: Mapping[str, Any]) -> None:
    if not entry.get("complete", True):
        tally.incomplete += 1
        return
    if entry.get("success") is None:
        tally.cannot_tell += 1
    else:
        tally.success.append(bool(entry["success"]))
    if entry.get("progress") is not None:
        tally.progress.append(float(entry["progress"]))


def read_real(path: Path) -> Results:
    """Real results: a CSV file with the columns policy, task, success (0 .. 1) and maybe n.

    Raises:
        PersistWorldError: naming the line and what is wrong in it.
    """
    with reading("unreadable", path, "give a CSV file, or sim"):
        rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines(), skipinitialspace=True))
    header = list(rows[0]) if rows else []
    missing = [name for name in _COLUMNS if name not in header]
    if missing:
        found = ", ".join(str(name) for name in header) or "none"
        raise PersistWorldError(
            f"no column '{missing[0]}' (there: {found})", where=str(path), fix="first line: policy,task,success,n"
        )
    real: Results = {}
    for number, row in enumerate(rows, start=2):
        policy, task = (str(row[name] or "").strip() for name in ("policy", "task"))
        tasks = real.setdefault(policy, {})
        if task in tasks:
            raise PersistWorldError(
                f"policy '{policy}', task '{task}' a second time", where=f"{path}, line {number}", fix="keep one"
            )
        tasks[task] = _real(row, f"{path}, line {number}")
    return real


def _real(row: Mapping[str, Any], where: str) -> Real:
    try:
        success, count = float(row["success"]), str(row.get("n") or "").strip()
        trials = int(count) if count else None
    except (TypeError, ValueError) as error:
        fix = "write success from 0 to 1, and how many trials under n, or nothing"
        raise PersistWorldError(f"not a number: {reason(error)}", where=where, fix=fix) from error
    if not (math.isfinite(success) and 0 <= success <= 1) or (trials is not None and trials < 1):
        raise PersistWorldError(
            f"success {row['success']}, n {count or '-'}", where=where, fix="success from 0 to 1, n from 1"
        )
    return Real(success, trials)


def build_leaderboard(imagined: Table, real: Results | None) -> dict[str, Any]:
    """Policies in the order of their imagined success, and how well that foretells the real one.

    Args:
        imagined: what was imagined.
        real: what really happened; None: the leaderboard alone.

    Returns:
        ``policies`` (a row each), and with real results ``foretold``: n, Pearson's r of success and of progress with
        real success (None where undefined), mmrv, the same by task, and who is missing on either side.

    Raises:
        PersistWorldError: fewer than two policies with results of both kinds in the same task.
    """
    rows = [_row(policy, tasks, real) for policy, tasks in imagined.items()]
    rows.sort(key=lambda row: (row["success"] is None, -(row["success"] or 0), -(row["progress"] or 0), row["policy"]))
    if real is None:
        return {"policies": rows}
    return {"policies": rows, "foretold": _foretold(imagined, real)}


def _row(policy: str, tasks: Mapping[str, Tally], real: Results | None) -> dict[str, Any]:
    success = [value for tally in tasks.values() for value in tally.success]
    low, high = wilson(sum(success), len(success))
    row = {
        "policy": policy,
        "tasks": sorted(tasks),
        "n": len(success),
        "success": _score(tasks, "success"),
        "low": low if success else None,
        "high": high if success else None,
        "progress": _score(tasks, "progress"),
        "cannot_tell": sum(tally.cannot_tell for tally in tasks.values()),
        "incomplete": sum(tally.incomplete for tally in tasks.values()),
    }
    if real is None:
        return row
    known = {task: one for task, one in real.get(policy, {}).items() if task in tasks}
    trials = [one.n for one in known.values() if one.n is not None]
    whole = sum(trials) if known and len(trials) == len(known) else None
    rate = float(np.mean([one.success for one in known.values()])) if known else None
    wins = sum(one.success * (one.n or 0) for one in known.values())
    span = wilson(wins, whole) if whole else (None, None)
    return {**row, "real": rate, "real_low": span[0], "real_high": span[1], "real_n": whole}


def _score(tasks: Mapping[str, Tally], what: str) -> float | None:
    """Mean over tasks of a share; None without any."""
    shares = [float(np.mean(values)) for tally in tasks.values() if (values := getattr(tally, what))]
    return float(np.mean(shares)) if shares else None


def _foretold(imagined: Table, real: Results) -> dict[str, Any]:
    shared = {
        policy: sorted(task for task in imagined[policy] if task in real[policy] and imagined[policy][task].success)
        for policy in imagined
        if policy in real
    }
    both = [policy for policy, tasks in shared.items() if tasks]
    if len(both) < 2:
        raise PersistWorldError(
            f"{len(both)} policies have judged rollouts and real results in the same task: two at least are needed",
            where=f"imagined: {', '.join(sorted(imagined)) or 'none'}; real: {', '.join(sorted(real)) or 'none'}",
            fix=_names_fix(imagined, real),
        )
    names = sorted({task for policy in both for task in shared[policy]})
    common = [task for task in names if all(task in shared[policy] for policy in both)]
    scored = common or names  # without a task that all have, each policy counts on its own
    tasks = []
    for task in names:
        having = [policy for policy in both if task in shared[policy]]
        if len(having) > 1:
            tasks.append({"task": task, **_compared(imagined, real, having, [task])})
    return {
        **_compared(imagined, real, both, scored),
        "policies": both,
        "on_tasks": scored,
        "same_tasks": bool(common),
        "tasks": tasks,
        "without_real": sorted(set(imagined) - set(both)),
        "without_imagined": sorted(set(real) - set(both)),
    }


def _compared(imagined: Table, real: Results, policies: Sequence[str], tasks: Sequence[str]) -> dict[str, Any]:
    """r and MMRV of policies by their means over tasks."""
    own = {policy: [task for task in tasks if task in imagined[policy] and task in real[policy]] for policy in policies}
    tallies = {policy: {task: imagined[policy][task] for task in own[policy]} for policy in policies}
    success = [_score(tallies[policy], "success") or 0.0 for policy in policies]
    progress = [_score(tallies[policy], "progress") for policy in policies]
    truth = [float(np.mean([real[policy][task].success for task in own[policy]])) for policy in policies]
    whole = [value for value in progress if value is not None]
    return {
        "n": len(policies),
        "pearson_r": pearson(success, truth),
        "pearson_r_progress": pearson(whole, truth) if len(whole) == len(truth) else None,
        "mmrv": mmrv(success, truth),
        "constant": [side for side, values in (("imagined", success), ("real", truth)) if np.ptp(values) == 0],
    }


def _names_fix(imagined: Table, real: Results) -> str:
    unknown = next((policy for policy in imagined if policy not in real), None)
    if unknown is None or not real:
        return "give runs of more policies, in tasks that have real results"
    return f"call a run as the real results do (NAME=PATH); '{unknown}': {nearest(unknown, real)}"
