"""Rank policies by world-model success rate, and correlate it with real success.

A policy's score is the mean over tasks of the success rate of its judged rollouts. The comparison with real results
uses only tasks that both sides have.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.errors import PersistWorldError, nearest
from persistworld_cli.policies.action_spaces import DEFAULT_ACTIONS
from persistworld_cli.policies.summary_file import SUMMARY_FILE, read_summary, read_verdict
from persistworld_cli.read_files import reading, reason
from persistworld_cli.statistics.paired import wilson
from persistworld_cli.statistics.ranking import constant, mmrv, pearson

RESAMPLES = 1000
SIMULATOR = "sim"  # --real sim: the results of `pi-rollout --against sim`
# of a run: what success depends on besides the policy
CONDUCT = ("judge", "steps", "gripper", "arm", "weights", "sampling")
_COLUMNS = ("policy", "task", "success")
_FOLDER = "give the output folder of persistworld pi-rollout"


@dataclass
class Tally:
    """Rollouts of one policy in one task.

    Attributes:
        actions: their action space.
        conduct: `CONDUCT` of their run, as far as it says.
        seen: (episode, start, seed) of each, as far as they say.
        unjudged: complete ones that no judge saw.
        simulated: successes in the simulator.
    """

    actions: str = DEFAULT_ACTIONS
    conduct: dict[str, Any] = field(default_factory=dict)
    seen: set[tuple[Any, ...]] = field(default_factory=set)
    success: list[bool] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)
    undecided: int = 0
    unjudged: int = 0
    incomplete: int = 0
    simulated: list[bool] = field(default_factory=list)

    def add(self, entry: Mapping[str, Any], judged: bool) -> None:
        """Add one rollout, and whether its run had a judge. Raises ValueError where it is here already."""
        if "episode" in entry:
            which = tuple(entry.get(key) for key in ("episode", "start", "seed"))
            if which in self.seen:
                raise ValueError("episode {}, frame {}, seed {}".format(*which))
            self.seen.add(which)
        if entry.get("sim_success") is not None:
            self.simulated.append(bool(entry["sim_success"]))
        if not entry.get("complete", True):
            self.incomplete += 1
            return
        if entry.get("success") is None and judged:
            self.undecided += 1
        elif entry.get("success") is None:
            self.unjudged += 1
        else:
            self.success.append(entry["success"])
        if entry.get("progress") is not None:
            self.progress.append(float(entry["progress"]))


@dataclass(frozen=True)
class Real:
    """A real success rate (0 .. 1) and its number of trials; None if unknown."""

    success: float
    n: int | None


Table = dict[str, dict[str, Tally]]  # policy -> task -> rollouts
Results = dict[str, dict[str, Real]]


def read_runs(runs: Sequence[str]) -> tuple[Table, Results]:
    """Rollouts of several runs of `pi-rollout`, and the simulator's results for them if there are any.

    Args:
        runs: folders or their ``rollouts.json``; ``NAME=PATH`` gives the policy of a run another name. The JSON file of
            a single rollout takes precedence, since a person may have judged the rollout there.

    Raises:
        PersistWorldError: a file is missing or is not of such a run; or a policy's runs differ in action space or
            `CONDUCT`, or have the same rollout.
    """
    imagined: Table = {}
    for run in runs:
        name, path = _named(run)
        found = read_summary(path, _FOLDER)
        policy, actions = name or found["policy"], found.get("actions", DEFAULT_ACTIONS)  # older runs: velocities
        tasks = imagined.setdefault(policy, {})
        if other := next((tally.actions for tally in tasks.values() if tally.actions != actions), None):
            what = f"policy '{policy}' answers {other} in one run and {actions} in another"
            raise PersistWorldError(what, where=str(path), fix="give each its own name: NAME=FOLDER")
        conduct = _conduct(found)
        tally = tasks.setdefault(found["task"], Tally(actions, conduct))
        if other := next((key for key in conduct if tally.conduct.get(key, conduct[key]) != conduct[key]), None):
            what = f"policy '{policy}' has {other} {tally.conduct[other]} in one run and {conduct[other]} in another"
            raise PersistWorldError(what, where=str(path), fix="give each its own name: NAME=FOLDER")
        for entry in found["rollouts"]:
            try:
                tally.add(_own(path, entry), "judge" not in found or found["judge"] is not None)
            except ValueError as twice:
                what = f"policy '{policy}' has the same rollout twice: {twice}"
                raise PersistWorldError(what, where=str(path), fix="leave one run out, or NAME=FOLDER") from twice
    real = {
        policy: {task: Real(float(np.mean(one.simulated)), len(one.simulated)) for task, one in tasks.items()}
        for policy, all_tasks in imagined.items()
        if (tasks := {task: one for task, one in all_tasks.items() if one.simulated})
    }
    return imagined, real


def _conduct(found: Mapping[str, Any]) -> dict[str, Any]:
    """`CONDUCT` of a run as flat, comparable values; older runs say less."""
    conduct: dict[str, Any] = {key: found[key] for key in ("judge", "steps") if key in found}
    weights = found.get("weights")
    if isinstance(weights, dict):
        conduct["weights"] = " + ".join(str(digest)[:8] for digest in weights.values() if digest)
    for name in ("gripper", "arm", "sampling"):
        if isinstance(table := found.get(name), dict):
            conduct |= {f"{name}.{key}": value for key, value in table.items()}
    return conduct


def _named(run: str) -> tuple[str, Path]:
    """``NAME=PATH`` or ``PATH`` -> the name ('' if not given) and the run's file."""
    name, rest = "", run
    if "=" in run and not Path(run).exists():
        name, _, rest = run.partition("=")
    path = Path(rest).expanduser()
    path = path / SUMMARY_FILE if path.is_dir() else path
    if not path.is_file():
        raise PersistWorldError("no rollouts.json here", where=str(path), fix=_FOLDER)
    return name, path


def _own(path: Path, entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """A rollout's own JSON file if there is one; else its entry in the run's file."""
    own = path.parent / Path(str(entry.get("json") or "?")).name
    try:
        if not own.is_file():
            return entry
    except OSError:  # an invalid file name
        return entry
    return {**entry, **read_verdict(own)}


def read_real(path: Path) -> Results:
    """Real results: a CSV file with the columns policy, task, success (0 .. 1) and optionally n.

    Raises:
        PersistWorldError: a line is invalid; the message names it.
    """
    with reading("unreadable", path, "give a CSV file, or sim"):
        rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines(), skipinitialspace=True))
    header = list(rows[0]) if rows else []
    missing = [name for name in _COLUMNS if name not in header]
    if missing:
        what = f"no column '{missing[0]}' (there: {', '.join(str(name) for name in header) or 'none'})"
        raise PersistWorldError(what, where=str(path), fix="first line: policy,task,success,n")
    real: Results = {}
    for number, row in enumerate(rows, start=2):
        where = f"{path}, line {number}"
        policy, task = (str(row[name] or "").strip() for name in ("policy", "task"))
        tasks = real.setdefault(policy, {})
        if task in tasks:
            raise PersistWorldError(f"policy '{policy}', task '{task}' appears twice", where=where, fix="keep one")
        tasks[task] = _real(row, where)
    return real


def _real(row: Mapping[str, Any], where: str) -> Real:
    fix = "write success from 0 to 1, n from 1 (how many trials) or nothing"
    try:
        success, count = float(row["success"]), str(row.get("n") or "").strip()
        trials = int(count) if count else None
    except (TypeError, ValueError) as error:
        raise PersistWorldError(f"not a number: {reason(error)}", where=where, fix=fix) from error
    if not 0 <= success <= 1 or (trials is not None and trials < 1):
        raise PersistWorldError(f"success {row['success']}, n {count or '-'}", where=where, fix=fix)
    return Real(success, trials)


def build_leaderboard(imagined: Table, real: Results | None, *, simulated: bool = False) -> dict[str, Any]:
    """Policies ordered by imagined success, and how well it predicts real success.

    Args:
        imagined: rollouts in the world model.
        real: real results; None: the leaderboard alone.
        simulated: they are the simulator's.

    Returns:
        ``simulated``, ``policies`` (a row each), ``differences``, and with real results ``predicted``: n, Pearson's r
        of success and of progress with real success (None where undefined), mmrv, mean absolute error of success,
        their 95% intervals (`_intervals`), the same by task, and policies that one side lacks.

    Raises:
        PersistWorldError: fewer than two policies with results of both kinds in the same task.
    """
    rows = [_row(policy, tasks, real) for policy, tasks in imagined.items()]
    differing = differences(imagined)
    rows.sort(key=lambda row: (row["success"] is None, -(row["success"] or 0), -(row["progress"] or 0), row["policy"]))
    result: dict[str, Any] = {"simulated": simulated, "policies": rows, "differences": differing}
    return result if real is None else {**result, "predicted": _prediction(imagined, real)}


def differences(imagined: Table) -> list[dict[str, Any]]:
    """What else than the policy differs between runs of one task: task, key, and the value of each policy."""
    found = []
    for task in dict.fromkeys(task for tasks in imagined.values() for task in tasks):
        own = {policy: tasks[task].conduct for policy, tasks in imagined.items() if task in tasks}
        for key in dict.fromkeys(key for conduct in own.values() for key in conduct):
            values = {policy: conduct[key] for policy, conduct in own.items() if key in conduct}
            if any(value != next(iter(values.values())) for value in values.values()):
                found.append({"task": task, "key": key, "values": values})
    return found


def _row(policy: str, tasks: Mapping[str, Tally], real: Results | None) -> dict[str, Any]:
    success = [value for tally in tasks.values() for value in tally.success]
    low, high = wilson(sum(success), len(success)) if success else (None, None)
    row = {
        "policy": policy,
        "actions": next(iter(tasks.values())).actions,
        "tasks": sorted(tasks),
        "n": len(success),
        "success": _score(tasks.values(), "success"),
        "low": low,
        "high": high,
        "progress": _score(tasks.values(), "progress"),
        "undecided": sum(tally.undecided for tally in tasks.values()),
        "unjudged": sum(tally.unjudged for tally in tasks.values()),
        "incomplete": sum(tally.incomplete for tally in tasks.values()),
    }
    if real is None:
        return row
    known = [one for task, one in real.get(policy, {}).items() if task in tasks]
    trials = sum(one.n or 0 for one in known) if all(one.n for one in known) else 0
    low, high = wilson(sum(one.success * (one.n or 0) for one in known), trials) if trials else (None, None)
    rate = float(np.mean([one.success for one in known])) if known else None
    return {**row, "real": rate, "real_low": low, "real_high": high, "real_n": trials or None}


def _score(tallies: Iterable[Tally], what: str) -> float | None:
    """Mean of a share over tasks; None without values."""
    shares = [float(np.mean(values)) for tally in tallies if (values := getattr(tally, what))]
    return float(np.mean(shares)) if shares else None


def _prediction(imagined: Table, real: Results) -> dict[str, Any]:
    shared = {
        policy: tasks
        for policy, own in imagined.items()
        if (tasks := sorted(task for task in own if task in real.get(policy, {}) and own[task].success))
    }
    if len(shared) < 2:
        raise PersistWorldError(
            f"{len(shared)} policies have judged rollouts and real results in the same task: at least two are needed",
            where=f"imagined: {', '.join(sorted(imagined)) or 'none'}; real: {', '.join(sorted(real)) or 'none'}",
            fix=_names_fix(imagined, real),
        )
    names = sorted({task for tasks in shared.values() for task in tasks})
    common = [task for task in names if all(task in tasks for tasks in shared.values())]
    by_task = {task: [policy for policy, tasks in shared.items() if task in tasks] for task in names}
    scored = common or names  # without a common task, each policy is scored on its own tasks
    return {
        **_correlate(imagined, real, list(shared), scored),
        "policies": list(shared),
        "on_tasks": scored,
        "same_tasks": bool(common),
        "tasks": [
            {"task": task, **_correlate(imagined, real, having, [task])}
            for task, having in by_task.items()
            if len(having) > 1
        ],
        "without_real": sorted(set(imagined) - set(shared)),
        "without_imagined": sorted(set(real) - set(shared)),
    }


def _correlate(imagined: Table, real: Results, policies: Sequence[str], tasks: Sequence[str]) -> dict[str, Any]:
    """r, MMRV and error of policies by their means over tasks, with intervals."""
    rng, drawn = np.random.default_rng(0), RESAMPLES
    success, progress, truth, again, truth_again = [], [], [], [], []
    for policy in policies:
        own = [task for task in tasks if task in imagined[policy] and task in real[policy]]
        tallies, results = [imagined[policy][task] for task in own], [real[policy][task] for task in own]
        success.append(_score(tallies, "success") or 0.0)
        progress.append(_score(tallies, "progress"))
        truth.append(float(np.mean([one.success for one in results])))
        rates = [(float(np.mean(tally.success)), len(tally.success)) for tally in tallies if tally.success]
        again.append(np.mean([_resampled(rng, *rate, drawn) for rate in rates], axis=0) if rates else np.zeros(drawn))
        truth_again.append(np.mean([_resampled(rng, one.success, one.n, drawn) for one in results], axis=0))
    whole = [value for value in progress if value is not None]
    return {
        "n": len(policies),
        "pearson_r": pearson(success, truth),
        "pearson_r_progress": pearson(whole, truth) if len(whole) == len(truth) else None,
        "mmrv": mmrv(success, truth),
        "mean_absolute_error": _error(success, truth),
        "intervals": _intervals(np.array(again).T, np.array(truth_again).T),
        "constant": [side for side, values in (("imagined", success), ("real", truth)) if constant(values)],
    }


def _error(success: Sequence[float], truth: Sequence[float]) -> float:
    return float(np.mean(np.abs(np.subtract(success, truth))))


def _resampled(rng: np.random.Generator, rate: float, n: int | None, samples: int) -> NDArray[np.float64]:
    """A success rate of n trials, its trials drawn again with replacement (samples,); the rate where n is unknown."""
    return rng.binomial(n, rate, samples) / n if n else np.full(samples, rate)


def _intervals(success: NDArray[np.float64], truth: NDArray[np.float64]) -> dict[str, list[float | None]]:
    """95% bootstrap intervals of r, MMRV and error, from rates (samples, policies) whose rollouts were drawn again.

    The policies are fixed. Both sides are drawn independently, also where a simulated rollout has the start of an
    imagined one, so intervals are rather too wide.
    """
    pairs = [(list(a), list(b)) for a, b in zip(success, truth, strict=True)]
    found = {
        "pearson_r": [r for pair in pairs if (r := pearson(*pair)) is not None],
        "mmrv": [mmrv(*pair) for pair in pairs],
        "mean_absolute_error": [_error(*pair) for pair in pairs],
    }
    return {
        name: [float(end) for end in np.percentile(values, (2.5, 97.5))] if values else [None, None]
        for name, values in found.items()
    }


def _names_fix(imagined: Table, real: Results) -> str:
    unknown = next((policy for policy in imagined if policy not in real), None)
    if unknown is None or not real:
        return "give runs of more policies, in tasks that have real results"
    return f"give the run the name in the real results (NAME=PATH); '{unknown}': {nearest(unknown, real)}"
