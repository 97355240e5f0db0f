"""The frontier of sampling settings as a table and as a plot, from ``frontier.json``'s dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from persistworld_cli.reports.curves import MODEL_COLOURS, plt, save_figure, style_axes
from persistworld_cli.reports.tables import UNTRAINED_NOTE, benchmark_name, heading, new_table, number

_STYLES = {"yes": "green", "no": "red"}
_SEEN = 4.0  # a plot shows losses down to this many times `percent` (or a quarter of the gains)


def frontier_table(result: Mapping[str, Any]) -> Table:
    """Each setting with its change against the reference and the 95% interval, by camera group."""
    n, reference, stamp, metrics = result["n"], result["reference"], result.get("benchmark"), result["metrics"]
    of = f" of benchmark {benchmark_name(stamp)}" if stamp and stamp.get("subset") else ""
    title = f"Sampling settings against {reference['name']} ({reference['calls']} network calls per clip): "
    title += f"{n['rollouts']} rollouts of {n['episodes']} episodes{of}, {n['steps']} steps, the same noise"
    table = new_table(title, ["setting"], [escape(heading(metric)) for metric in metrics], _caption(result))

    def add(row: Mapping[str, Any], cells: Mapping[str, list[Any]], within: Text, style: str | None) -> None:
        star = " *" if row["name"] == result["chosen"] else ""
        calls = f"{row['calls']} call{'s' if row['calls'] != 1 else ''}"
        figures = [Text(calls), Text(f"{row['seconds_per_interaction']:.3g} s"), within]
        beside = [*figures, *[Text()] * len(metrics)][: len(metrics)]
        name = Text(" ").join([Text(row["name"] + star, "bold"), *figures[len(metrics) :]])
        table.add_row(name, *beside, style=style)
        for group in result["groups"]:
            table.add_row(f"  {group}", *cells[group], style=style)
        table.add_section()

    figures = reference["figures"]
    shown = {group: [number(own[m["label"]], m["label"]) for m in metrics] for group, own in figures.items()}
    add(reference, shown, Text("reference"), "dim")
    for row in result["settings"]:
        losses = {(loss["cameras"], loss["metric"]): loss for loss in row["losses"]}
        cells = {group: [_cell(losses[group, m["label"]], m) for m in metrics] for group in result["groups"]}
        add(row, cells, Text(row["within"], _STYLES.get(row["within"], "")), None)
    return table


def _cell(loss: Mapping[str, Any], metric: Mapping[str, Any]) -> Text:
    """``+0.012 [+0.010, +0.014]``, coloured where the metric decides."""
    label = metric["label"]
    middle, low, high = (number(loss[key], label, signed=True) for key in ("change", "change_low", "change_high"))
    text = f"{middle}\n[{low}, {high}]" if loss["change"] is not None else "-"
    return Text(text, _STYLES.get(loss["within"], "") if metric["decides"] else "dim")


def _caption(result: Mapping[str, Any]) -> str:
    decisive = ", ".join(metric["label"] for metric in result["metrics"] if metric["decides"])
    lines = [
        "A setting: network calls per sampled clip (guidance counts twice), seconds per interaction step of a rollout "
        "(with decoding and scoring), verdict; then the change against the reference with its 95% bootstrap interval "
        "over episodes.",
        f"yes: the worse end of each interval of {decisive} is at most {result['percent']:g}% worse; no: the better "
        "end of one is worse than that; open: too few episodes to decide. *: fewest calls that qualify.",
        f"{result['conclusion']}.",
    ]
    if "untrained" in decisive:
        lines.append(UNTRAINED_NOTE)
    return "\n".join(lines)


def frontier_plot(path: Path, result: Mapping[str, Any]) -> None:
    """Gain over the reference in percent against network calls, one line per sampler with 95% bands.

    Args:
        path: PNG to write.
        result: ``frontier.json``'s dictionary.
    """
    groups, metrics = result["groups"], [metric for metric in result["metrics"] if metric["decides"]]
    figure, axes = plt.subplots(
        len(metrics), len(groups), figsize=(5.4 * len(groups), 2.7 * len(metrics) + 0.6), sharex=True, squeeze=False
    )
    for line, metric in enumerate(metrics):
        for column, group in enumerate(groups):
            _panel(axes[line, column], result, group, metric)
    for plot in axes[-1]:
        plot.set_xlabel("network calls per clip")
    n, reference = result["n"], result["reference"]
    figure.suptitle(
        f"against {reference['name']} ({reference['calls']} calls), up is better; {n['rollouts']} rollouts of "
        f"{n['episodes']} episodes, bands: 95% over episodes",
        fontsize=10,
    )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(len(labels), 6), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    save_figure(figure, path)


def _lines(result: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Settings of one line: the same sampler and the same varied values, by calls."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["settings"]:
        sampler, comma, others = row["name"].partition(",")
        lines.setdefault(sampler.rpartition(" ")[0] + comma + others, []).append(row)
    single = [row for row in result["settings"] if row["sampling"]["steps"] == 1]
    for rows in lines.values():  # with one step all samplers are the same: each line begins there
        for row in single:
            alike = all(row["sampling"][key] == rows[0]["sampling"][key] for key in ("guidance", "sigma_max"))
            if row not in rows and alike:
                rows.insert(0, row)
    return {name: sorted(rows, key=lambda row: int(row["calls"])) for name, rows in lines.items()}


def _panel(plot: Axes, result: Mapping[str, Any], group: str, metric: Mapping[str, Any]) -> None:
    """One metric of one camera group."""
    percent, seen = result["percent"], [0.0]
    plot.axhspan(-percent, 0, color="#228833", alpha=0.08, linewidth=0)
    plot.axhline(0, color="#444444", linewidth=0.8)
    for index, (name, rows) in enumerate(_lines(result).items()):
        colour, calls = MODEL_COLOURS[index % len(MODEL_COLOURS)], [row["calls"] for row in rows]
        losses = [_loss(row, group, metric["label"]) for row in rows]
        gain, worse, better = (
            -np.array([loss[key] for loss in losses], dtype=float) for key in ("loss", "loss_high", "loss_low")
        )
        style = ("-", "--", ":", "-.")[index // len(MODEL_COLOURS) % 4] + "osD^v"[index % 5]
        width = 2.6 - 0.3 * (index % 5)  # overlapping lines stay visible
        plot.plot(calls, gain, style, markersize=2 + 1.6 * width, linewidth=width, color=colour, label=name)
        plot.fill_between(calls, worse, better, color=colour, alpha=0.13, linewidth=0)
        seen += [float(value) for value in [*worse, *better] if np.isfinite(value)]
    chosen = next((row for row in result["settings"] if row["name"] == result["chosen"]), None)
    if chosen and (loss := _loss(chosen, group, metric["label"])["loss"]) is not None:
        plot.plot([chosen["calls"]], [-loss], "k*", markersize=11, zorder=5, label="chosen")
    high = max(seen)
    low = max(min(seen), -max(_SEEN * percent, 0.25 * high))
    plot.set_ylim(low - 0.06 * (high - low) - 0.1 * percent, high + 0.06 * (high - low) + 0.1 * percent)
    plot.set_xscale("log", base=2)
    plot.xaxis.set_major_formatter(ScalarFormatter())
    plot.xaxis.set_minor_formatter(NullFormatter())
    plot.set_xticks(sorted({row["calls"] for row in result["settings"]}))
    figure = number(result["reference"]["figures"][group][metric["label"]], metric["label"])
    unit = f" {metric['unit']}" if metric["unit"] else ""
    plot.set_title(f"{metric['label']}, {group} cameras (reference {figure}{unit})", fontsize=9)
    plot.set_ylabel("gain, %", fontsize=9)
    plot.tick_params(labelsize=8)
    style_axes(plot)


def _loss(row: Mapping[str, Any], group: str, label: str) -> Mapping[str, Any]:
    return next(loss for loss in row["losses"] if (loss["cameras"], loss["metric"]) == (group, label))
