"""Tables of results, from their dictionaries, so that a saved JSON can be shown again.

Metric names come from the result's labels, so ``lpips (untrained)`` keeps its name.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from persistworld_cli.console import file_console
from persistworld_cli.files import whole_file

BARELY = 0.05  # dB: a smaller gain has no practical use, whatever its interval
COLOURS = {"better": "green", "worse": "red"}

UNTRAINED_NOTE = "lpips (untrained): the settings choose a random backbone; not comparable with LPIPS."


def new_table(title: str, left: Sequence[str], right: Sequence[str], caption: str | None = None) -> Table:
    """An empty table with columns of texts (``left``), then of numbers (``right``)."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def digits(label: str) -> int:
    """Significant decimals: 2 for dB, 4 for the small numbers of an untrained LPIPS, else 3."""
    return 2 if label.startswith("psnr") else 4 if "untrained" in label else 3


def number(value: float | None, label: str, *, signed: bool = False) -> str:
    """A metric's value as text; ``-`` for None."""
    return "-" if value is None else f"{value:{'+' if signed else ''}.{digits(label)}f}"


def heading(metric: Mapping[str, Any]) -> str:
    """``psnr dB ↑``: label, unit and the better direction."""
    arrow = "↑" if metric["higher_is_better"] else "↓"
    return " ".join(part for part in (metric["label"], metric["unit"], arrow) if part)


def eval_table(result: Mapping[str, Any]) -> Table:
    """The benchmark's table of ``eval.json``: floor, models, ceiling, change and win rate per camera group."""
    metrics = result["metrics"]
    table = new_table(_title(result), ["cameras", ""], [heading(metric) for metric in metrics], _caption(result))
    for group in result["groups"]:
        rows = [row for row in result["table"] if row["cameras"] == group]
        for index, row in enumerate(rows):
            reference = row["model"] in (result["floor"], result["ceiling"])
            cells = [number(row[metric["label"]], metric["label"]) for metric in metrics]
            table.add_row(
                escape(group) if index == 0 else "", escape(row["model"]), *cells, style="dim" if reference else None
            )
        for name, texts in _paired_rows(result, group):
            table.add_row("", name, *texts)
        table.add_section()
    return table


def _paired_rows(result: Mapping[str, Any], group: str) -> list[tuple[str, list[Text]]]:
    """Change, win rate and verdict of each metric in one camera group; nothing without a comparison."""
    paired = {row["metric"]: row for row in result["paired"] if row["cameras"] == group}
    if not paired:
        return []
    change, wins, verdicts = [], [], []
    for metric in result["metrics"]:
        row, label = paired[metric["label"]], metric["label"]
        style = COLOURS.get(row["verdict"], "")
        span = f"[{number(row['change_low'], label, signed=True)}, {number(row['change_high'], label, signed=True)}]"
        change.append(Text(f"{number(row['change'], label, signed=True)}\n{span}", style))
        wins.append(Text(win_rate(row), style))
        verdicts.append(Text(row["verdict"], style))
    return [("  change", change), ("  win rate", wins), ("  verdict", verdicts)]


def percent(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """``81%``, ``81% [57, 93]``, or ``-``."""
    if value is None:
        return "-"
    return f"{100 * value:.0f}%" + ("" if low is None or high is None else f" [{100 * low:.0f}, {100 * high:.0f}]")


def win_rate(row: Mapping[str, Any]) -> str:
    """``81% [57, 93] of 16``."""
    if not row["rollouts"]:
        return "-"
    return f"{percent(row['win_rate'], row['win_low'], row['win_high'])} of {row['rollouts']}"


def diagnostics_table(result: Mapping[str, Any]) -> Table:
    """Diagnostics that means over pixels and time hide: drift, action following, seed variance against error.

    Args:
        result: ``eval.json``'s dictionary.
    """
    following, uncertainty, fvd = (result[key] for key in ("action_following", "uncertainty", "fvd"))
    columns = ["drift\npsnr dB per second"]
    columns += [f"gain over {kind} actions\n{following['metric']} dB" for kind in following["kinds"]]
    columns += [f"{fvd['label']} ↓"] if fvd["rows"] else []
    columns += ["variance and error\nrho (within a step)"] if uncertainty["rows"] else []
    title = "Diagnostics: mean [95% interval over episodes]"
    table = new_table(title, ["cameras", ""], columns, _diagnostics_caption(result))
    for group in result["groups"]:
        for index, model in enumerate(model["label"] for model in result["models"]):
            drift = result["drift_per_s"][group]["psnr"][model]
            cells = [Text(signed_span(drift["mean"], drift["low"], drift["high"]))]
            cells += [_margin(result, group, model, kind) for kind in following["kinds"]]
            cells += [
                Text(number(r["value"], "psnr")) for r in fvd["rows"] if (r["model"], r["cameras"]) == (model, group)
            ]
            cells += [
                Text(f"{signed_span(r['rho'], r['low'], r['high'])} ({signed_span(r['within_step'])})")
                for r in uncertainty["rows"]
                if (r["model"], r["cameras"]) == (model, group)
            ]
            table.add_row(escape(group) if index == 0 else "", escape(model), *cells)
        table.add_section()
    return table


def signed_span(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """``+1.50``, ``+1.50 [+1.40, +1.60]``, or ``-``."""
    middle, below, above = (number(part, "psnr", signed=True) for part in (value, low, high))
    return middle if value is None or (low is None and high is None) else f"{middle} [{below}, {above}]"


def _margin(result: Mapping[str, Any], group: str, model: str, kind: str) -> Text:
    following = result["action_following"]
    row = next(
        row
        for row in following["rows"]
        if (row["model"], row["actions"], row["cameras"], row["metric"]) == (model, kind, group, following["metric"])
    )
    style = {"follows": "green", "better under wrong actions": "red"}.get(row["verdict"], "")
    barely = ", barely" if row["verdict"] == "follows" and row["margin"] < BARELY else ""
    return Text(f"{signed_span(row['margin'], row['low'], row['high'])}\n{row['verdict']}{barely}", style)


def _diagnostics_caption(result: Mapping[str, Any]) -> str:
    following, uncertainty, fvd = (result[key] for key in ("action_following", "uncertainty", "fvd"))
    lines = []
    if following["kinds"]:
        lines.append(
            f"gain: the first {following['steps']} interactions under the recorded actions, minus the same under "
            "another episode's actions (swapped) or no motion (null)."
        )
    if following["note"]:
        lines.append(f"action following: {following['note']}.")
    if fvd["rows"]:
        floor = ", ".join(
            f"{row['cameras']} {number(row['value'], 'psnr')}" for row in fvd["rows"] if row["model"] == result["floor"]
        )
        lines.append(f"{fvd['label']}: torchvision's network, not the I3D of papers; {result['floor']}: {floor}.")
        if fvd["note"]:
            lines.append(f"{fvd['label']}: {fvd['note']}.")
    if uncertainty["rows"]:
        lines.append(
            f"rho: Spearman's, of the variance between {uncertainty['seeds']} seeds and the squared error, step by "
            "step; both grow with time, so rho within a step is given too."
        )
    if uncertainty["note"]:
        lines.append(f"uncertainty: {uncertainty['note']}.")
    return "\n".join(lines)


def benchmark_name(stamp: Mapping[str, Any]) -> str:
    """``bundled v2``, with the changes from it: ``droid v2 (SUBSET: 3 of 50 episodes), changed in ...``."""
    part, changed = stamp.get("subset"), stamp["changed"]
    name = f"{stamp['name']} v{stamp['version']}"
    if part:
        name += f" (SUBSET: {part['episodes']} of {part['of']} episodes)"
    return name + (f", changed in {', '.join(changed)}" if changed else "")


def _title(result: Mapping[str, Any]) -> str:
    n = result["n"]
    seconds = n["steps"] * n["frames_per_step"] / n["rate_hz"]
    stamp = result.get("benchmark")
    name = f"Benchmark {benchmark_name(stamp)}: " if stamp else "No benchmark: "
    return (
        f"{name}{n['rollouts']} rollouts of {n['episodes']} episodes, {n['steps']} steps = {seconds:.1f} s, "
        f"{n['sampler']} {n['sampling_steps']} steps"
    )


def _caption(result: Mapping[str, Any]) -> str:
    """What the brackets mean, and the verdict on the reward in words."""
    lines = []
    if result["paired"]:
        names = " against ".join(escape(model["label"]) for model in reversed(result["models"]))
        lines.append(f"{names}: same episodes, same noise.")
        lines.append("change: 95% bootstrap interval over episodes; win rate: share of rollouts, 95% Wilson interval;")
        lines.append("verdict: from the first interval and Wilcoxon's test over episodes (p < 0.05).")
        lines += [f"reward, {cameras} cameras: {words}" for cameras, words in reward_words(result).items()]
    if any("untrained" in metric["label"] for metric in result["metrics"]):
        lines.append(UNTRAINED_NOTE)
    return "\n".join(lines)


def reward_words(result: Mapping[str, Any]) -> dict[str, str]:
    """The verdict on the training reward in words, by camera group; one entry if all groups agree."""
    words = {row["cameras"]: row["words"] for row in result["paired"] if row["metric"] == "reward"}
    return {"all": next(iter(words.values()))} if len(set(words.values())) == 1 else words


def steps_table(title: str, metrics: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row per step of a replay: ``step``, ``time_s``, ``model``, then metrics by label."""
    table = new_table(title, ["model"], ["step", "time", *map(heading, metrics)])
    for row in rows:
        cells = [number(row[metric["label"]], metric["label"]) for metric in metrics]
        table.add_row(escape(row["model"]), str(row["step"]), f"{row['time_s']:.1f} s", *cells)
    return table


def plain(table: RenderableType, width: int = 140) -> str:
    """A table (or several) as plain text, for files and pages."""
    text = io.StringIO()
    file_console(text, width).print(table)
    return text.getvalue()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys; None becomes an empty cell. Raises CannotWrite."""
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
