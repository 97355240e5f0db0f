"""Tables of results, from their dictionaries, so that a saved JSON can be shown again.

Metric names come from the result's labels, so ``lpips (untrained)`` keeps its name.
"""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import Box
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.markup import escape
from rich.measure import Measurement, measure_renderables
from rich.table import Table
from rich.text import Text

from persistworld_cli.console import file_console
from persistworld_cli.files import whole_file

BARELY = 0.05  # dB: a smaller gain has no practical use, whatever its interval
COLOURS = {"better": "green", "worse": "red"}

_MORE = 4  # decimals that a small change may have beyond the usual ones
_SHORTEST = 12  # columns of a text whose words are folded

UNTRAINED_NOTE = "lpips (untrained): the settings choose a random backbone; not comparable with LPIPS."


_EDGELESS = Box("    \n    \n ── \n    \n ── \n    \n    \n    \n")  # a rule below the header and between sections


class FittedTable(Table):
    """A table that is as wide as its content where that fits, and never cuts a cell.

    In less width, texts and headings wrap between words, and numbers keep their lines; if that does not suffice, words
    are folded. Title and caption use the whole width.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = copy.copy(self)
        shown.title = shown.caption = None
        room = options.max_width - 2 * (len(self.columns) - 1)
        shown.columns = [copy.copy(column) for column in self.columns]
        for column, width in zip(shown.columns, self._fit(console, options, room), strict=True):
            column.width = width
        if self.title:
            yield console.render_str(str(self.title), style="bold")
        yield from Table.__rich_console__(shown, console, options)
        if self.caption:
            yield console.render_str(str(self.caption), style="dim")

    def _fit(self, console: Console, options: ConsoleOptions, room: int) -> list[int]:
        """The width of each column: the widest give way, first where they can wrap, then where words can be folded."""
        widths, wrapped, folded = [], [], []
        for column in self.columns:
            header = Measurement.get(console, options, column.header if self.show_header else "")
            cells = measure_renderables(console, options, list(column.cells) or [""])
            whole = column.justify == "right" or column.no_wrap
            widths.append(max(header.maximum, cells.maximum))
            wrapped.append(max(header.minimum, cells.maximum if whole else cells.minimum))
            folded.append(cells.maximum if whole else min(_SHORTEST, wrapped[-1]))
        for least in (wrapped, folded, [1] * len(widths)):
            while sum(widths) > room and (able := [i for i, width in enumerate(widths) if width > least[i]]):
                widths[max(able, key=lambda i: widths[i])] -= 1
        return widths


def new_table(
    title: str | None, left: Sequence[str], right: Sequence[str] = (), caption: str | None = None
) -> FittedTable:
    """An empty table with columns of texts (``left``), then of numbers (``right``)."""
    table = FittedTable(title=title, caption=caption, box=_EDGELESS, padding=(0, 1, 0, 0), pad_edge=False)
    table.show_edge = False
    for name in (*left, *right):
        side: JustifyMethod = "left" if name in left else "right"
        table.add_column(name, justify=side, overflow="fold", vertical="top")
    return table


def digits(label: str) -> int:
    """Significant decimals: 2 for dB, 4 for the small numbers of an untrained LPIPS, else 3."""
    return 2 if label.startswith("psnr") else 4 if "untrained" in label else 3


def number(value: float | None, label: str, *, signed: bool = False, more: int = 0) -> str:
    """A metric's value as text, with ``more`` decimals than usual; ``-`` for None."""
    return "-" if value is None else f"{value:{'+' if signed else ''}.{digits(label) + more}f}"


def heading(metric: Mapping[str, Any]) -> str:
    """``psnr dB↑``: label, unit and the better direction."""
    return f"{metric['label']} {metric['unit']}".rstrip() + ("↑" if metric["higher_is_better"] else "↓")


def eval_table(result: Mapping[str, Any]) -> Table:
    """The benchmark's table of ``eval.json``: for each camera group and metric, the floor, the models, the ceiling, and
    the change from the first model to the last.
    """
    models = list(dict.fromkeys(row["model"] for row in result["table"]))
    compared = ["change", "win rate"] if result["paired"] else []
    table = new_table(_title(result), ["cameras"], [*map(escape, models), *compared], _caption(result))
    for column, model in zip(table.columns[1:], models, strict=False):
        column.style = "dim" if model in (result["floor"], result["ceiling"]) else ""
    paired = {(row["cameras"], row["metric"]): row for row in result["paired"]}
    for group in result["groups"]:
        table.add_row(Text(group, "bold"), *[""] * (len(table.columns) - 1))
        rows = {row["model"]: row for row in result["table"] if row["cameras"] == group}
        for metric in result["metrics"]:
            label = metric["label"]
            cells: list[RenderableType] = [number(rows[model][label], label) for model in models]
            cells += _change(paired[group, label], label) if compared else []
            table.add_row(escape(heading(metric)), *cells)
        table.add_section()
    return table


def _change(row: Mapping[str, Any], label: str) -> list[RenderableType]:
    """Change with verdict and interval, and win rate, in the colour of the verdict; no decided change reads as 0."""
    style, more = COLOURS.get(row["verdict"], ""), 0
    while style and more < _MORE and float(number(row["change"], label, more=more)) == 0:
        more += 1
    parts = (row[key] for key in ("change", "change_low", "change_high"))
    middle, low, high = (number(part, label, signed=True, more=more) for part in parts)
    return [Text(f"{middle} {row['verdict']}\n[{low}, {high}]", style), Text(win_rate(row), style)]


def percent(value: float | None, low: float | None = None, high: float | None = None, after: str = "") -> str:
    """``81%``, with text after it, and its interval ``[57, 93]`` in a second line; ``-`` for None."""
    if value is None:
        return "-"
    span = "" if low is None or high is None else f"\n[{100 * low:.0f}, {100 * high:.0f}]"
    return f"{100 * value:.0f}%{after}{span}"


def win_rate(row: Mapping[str, Any]) -> str:
    """``81% of 16``, and its interval below."""
    rollouts = row["rollouts"]
    return percent(row["win_rate"], row["win_low"], row["win_high"], f" of {rollouts}") if rollouts else "-"


def diagnostics_table(result: Mapping[str, Any]) -> Table:
    """Diagnostics that means over pixels and time hide: drift, action following, seed variance against error.

    Args:
        result: ``eval.json``'s dictionary.
    """
    following, uncertainty, fvd = (result[key] for key in ("action_following", "uncertainty", "fvd"))
    models = [model["label"] for model in result["models"]]
    title = "Diagnostics: mean [95% interval over episodes]"
    table = new_table(title, ["cameras"], [escape(model) for model in models], _diagnostics_caption(result))
    for group in result["groups"]:

        def own(rows: Iterable[Mapping[str, Any]], model: str, group: str = group) -> Mapping[str, Any]:
            return next(row for row in rows if (row["model"], row["cameras"]) == (model, group))

        table.add_row(Text(group, "bold"), *[""] * len(models))
        drift = result["drift_per_s"][group]["psnr"]
        spans = [signed_span(drift[m]["mean"], drift[m]["low"], drift[m]["high"]) for m in models]
        table.add_row("drift, psnr dB per second", *map(Text, spans))
        for kind in following["kinds"]:
            margins = [_margin(result, group, model, kind) for model in models]
            table.add_row(f"gain over {kind} actions, {following['metric']} dB", *margins)
        if fvd["rows"]:
            table.add_row(f"{fvd['label']} ↓", *(number(own(fvd["rows"], m)["value"], "psnr") for m in models))
        if uncertainty["rows"]:
            rhos = [own(uncertainty["rows"], model) for model in models]
            spans = [f"{signed_span(r['rho'], r['low'], r['high'])} ({signed_span(r['within_step'])})" for r in rhos]
            table.add_row("variance and error, rho (within a step)", *map(Text, spans))
        table.add_section()
    return table


def eval_tables(result: Mapping[str, Any]) -> list[Table]:
    """What `eval` shows of its ``eval.json``."""
    return [eval_table(result), diagnostics_table(result)]


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
        lines.append("change: 95% bootstrap interval over episodes; its verdict also takes Wilcoxon's test (p < 0.05).")
        lines.append("win rate: share of rollouts, 95% Wilson interval.")
        lines += [f"reward, {cameras} cameras: {words}" for cameras, words in reward_words(result).items()]
    if any("untrained" in metric["label"] for metric in result["metrics"]):
        lines.append(UNTRAINED_NOTE)
    return "\n".join(lines)


def reward_words(result: Mapping[str, Any]) -> dict[str, str]:
    """The verdict on the training reward in words, by camera group; one entry if all groups agree."""
    words = {row["cameras"]: row["words"] for row in result["paired"] if row["metric"] == "reward"}
    return {"all": next(iter(words.values()))} if len(set(words.values())) == 1 else words


def steps_tables(result: Mapping[str, Any]) -> list[Table]:
    """The rollouts of a ``replay.json``, a row per step and model with the metrics."""
    tables: list[Table] = []
    metrics = result["metrics"]
    for replay in result["replays"]:
        headings = [escape(heading(metric)) for metric in metrics]
        table = new_table(escape(replay["title"]), ["model"], ["step", "time", *headings])
        for row in replay["rows"]:
            cells = [number(row[metric["label"]], metric["label"]) for metric in metrics]
            table.add_row(escape(row["model"]), str(row["step"]), f"{row['time_s']:.1f} s", *cells)
        tables.append(table)
    return tables


def plain(*tables: RenderableType, width: int = 80) -> str:
    """Tables as plain text, for files."""
    text = io.StringIO()
    file_console(text, width).print(spaced(tables))
    return text.getvalue()


def spaced(tables: Iterable[RenderableType]) -> Group:
    """Tables with an empty line between them."""
    return Group(*[part for table in tables for part in (Text(), table)][1:])


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys; None becomes an empty cell. Raises CannotWrite."""
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
