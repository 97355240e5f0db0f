"""Tables of policies' rollouts, from their dictionaries: judged success, agreement with the simulator, leaderboard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from persistworld_cli.reports.tables import new_table, percent


def rollout_tables(result: Mapping[str, Any]) -> list[RenderableType]:
    """A row per rollout; with the simulator, also the confusion matrices and a summary in words.

    Args:
        result: ``rollouts.json``.
    """
    against, judge = result.get("against_sim"), result["judge"]
    title = escape(f"{result['policy']} ({result['actions']}) in task {result['task']}")
    numbers = ["steps", *(["success", "progress"] if judge else [])]
    numbers += ["success, simulated", "progress, simulated"] if against else []
    table = new_table(f"{title}, judged by {escape(judge)}" if judge else title, ["rollout"], numbers)
    table.add_column("what the judge saw" if judge else "video", overflow="fold")
    for row in result["rollouts"]:
        cells = [f"episode {row['episode']}, frame {row['start']}, seed {row['seed']}", str(row["steps"])]
        cells += [_yes(row["success"]), _share(row["progress"])] if judge else []
        cells += [_yes(row.get("sim_success")), _share(row.get("sim_progress"))] if against else []
        seen = row.get("judged") if judge else Path(row["video"]).name
        state = "" if row["complete"] else "incomplete"
        table.add_row(*map(Text, cells), Text("; ".join(filter(None, (state, seen)))))
    return [table, _confusion(against), Text(_words(against))] if against else [table]


def _confusion(against: Mapping[str, Any]) -> Table:
    """The confusion matrices: the judge on imagined and on simulated images, each against the simulator's truth."""
    columns = ["n", "true pos.", "false pos.", "false neg.", "true neg.", "undecided", "accuracy", "progress r"]
    table = new_table("Predicted success against the simulator's own state", ["judged from"], columns)
    for name, one, r in (
        ("imagined images", against["success"], against["progress"]["pearson_r"]),
        ("simulated images", against["judge_on_simulated"], against["judge_on_simulated"]["pearson_r"]),
    ):
        keys = ("n", "true_positive", "false_positive", "false_negative", "true_negative", "undecided")
        table.add_row(name, *(str(one[key]) for key in keys), percent(one["accuracy"]), _r(r))
    return table


def _words(against: Mapping[str, Any]) -> str:
    imagined, simulated, gap = against["imagined"], against["simulated"], against["progress"]["mean_absolute_error"]
    lines = [
        f"success imagined {percent(imagined['success'])} of {imagined['n']}, "
        f"simulated {percent(simulated['success'])} of {simulated['n']}; "
        f"progress {_share(imagined['progress'])} and {_share(simulated['progress'])}, {_share(gap)} apart on average."
    ]
    if against["progress"]["pearson_r"] is None:
        lines.append("r is undefined: fewer than two rollouts, or one side is constant.")
    lines.append(f"The simulator was reset within {against['reset_error']:.1g} (m, rad) of the recording.")
    return "\n".join(lines)


def leaderboard_tables(result: Mapping[str, Any]) -> list[RenderableType]:
    """Policies by imagined success, and how well it predicts real success (`policies.leaderboard`)."""
    predicted, side = result.get("predicted"), "simulated" if result["simulated"] else "real"
    columns = ["imagined success", "progress", "undecided, incomplete", *([f"{side} success"] if predicted else [])]
    title, caption = "Leaderboard: success [95% Wilson interval]", "means over tasks; intervals as if of one task"
    table = new_table(title, ["policy", "tasks"], columns, caption)
    mixed = len({row["actions"] for row in result["policies"]}) > 1
    for row in result["policies"]:
        name = f"{row['policy']} ({row['actions']})" if mixed else row["policy"]
        cells = [percent(row["success"], row["low"], row["high"], f" of {row['n']}"), _share(row["progress"])]
        cells += [f"{row['undecided']}, {row['incomplete']}"]
        cells += [percent(row["real"], row["real_low"], row["real_high"], f" of {row['real_n']}")] if predicted else []
        table.add_row(*map(Text, [name, ", ".join(row["tasks"]), *cells]))
    shown: list[RenderableType] = [table, *([_prediction(predicted, side)] if predicted else [])]
    said = "\n".join([*_unfair(result), *(_warnings(predicted, side) if predicted else [])])
    return [*shown, Text(said)] if said else shown


def _unfair(result: Mapping[str, Any]) -> list[str]:
    """What makes the rows less comparable than they look."""
    lines = []
    if unjudged := [f"{row['policy']} ({row['unjudged']})" for row in result["policies"] if row["unjudged"]]:
        lines.append(
            f"Rollouts without a judge: {', '.join(unjudged)}. Roll out with --judge, or write true or false "
            "into their JSON files."
        )
    for one in result["differences"]:
        values = ", ".join(f"{policy} {value}" for policy, value in one["values"].items())
        lines.append(f"Not only the policies differ: {one['key']} in task {one['task']}: {values}.")
    return lines


def _prediction(predicted: Mapping[str, Any], side: str) -> Table:
    table = new_table(
        f"How well imagined success predicts {side} success",
        ["tasks"],
        ["policies", "r", "r of progress", "MMRV", "error"],
        "r: Pearson's, 1 is best; MMRV: mean maximum rank violation (SIMPLER), 0 is best; error: mean absolute, of "
        "success; [95% bootstrap interval over rollouts, policies fixed]",
    )
    rows = [("all", predicted)] + [(one["task"], one) for one in predicted["tasks"] if len(predicted["tasks"]) > 1]
    for name, one in rows:
        spans = {key: f"\n[{low:.2f}, {high:.2f}]" for key, (low, high) in one["intervals"].items() if low is not None}
        r, progress = _r(one["pearson_r"]) + spans.get("pearson_r", ""), _r(one["pearson_r_progress"])
        apart = [f"{one[key]:.3f}{spans.get(key, '')}" for key in ("mmrv", "mean_absolute_error")]
        table.add_row(*map(Text, (name, str(one["n"]), r, progress, *apart)))
    return table


def _warnings(predicted: Mapping[str, Any], side: str) -> list[str]:
    constant = [side if one == "real" else one for one in predicted["constant"]]
    lines = [f"r is undefined: all policies have the same {one} success." for one in constant]
    if predicted["n"] < 4:
        lines.append(f"{predicted['n']} policies: r over so few says little.")
    if not predicted["same_tasks"]:
        lines.append("No task has results of all policies: each policy is scored on its own tasks.")
    for key, what in (("without_real", f"{side} results"), ("without_imagined", "judged rollouts")):
        if predicted[key]:
            lines.append(f"Left out, without {what} in the same task: {', '.join(predicted[key])}.")
    return lines


def _yes(value: bool | None) -> str:
    return "?" if value is None else "yes" if value else "no"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _r(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.3f}"
