"""Curves as PNG files: metrics over the horizon, changes of rollouts, the log of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")  # before pyplot, since there may be no display

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from persistworld_cli.files import whole_file
from persistworld_cli.reports.tables import heading, signed_span

MODEL_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377")  # safe for colour-blind readers (Paul Tol)
_SMOOTHED_FROM = 40  # with at least this many log lines, a moving mean is drawn over the numbers
REFERENCE = {"floor": ("#888888", "--"), "ceiling": ("#888888", ":")}


def horizon_curves(path: Path, result: Mapping[str, Any]) -> None:
    """Write a PNG of the metrics over the horizon: a row of plots per metric, a column per camera group.

    Reads from ``eval.json``: ``horizon[group][label][model] = {mean, low, high}``, ``times_s``.
    """
    groups, metrics = result["groups"], result["metrics"]
    figure, axes = plt.subplots(
        len(metrics), len(groups), figsize=(5.2 * len(groups), 2.7 * len(metrics)), sharex=True, squeeze=False
    )
    for column, group in enumerate(groups):
        for row, metric in enumerate(metrics):
            _horizon(axes[row, column], result, group, metric)
        axes[0, column].set_title(f"{group} cameras")
        axes[-1, column].set_xlabel("time in the rollout (s)")
    n = result["n"]
    figure.suptitle(
        f"{n['rollouts']} rollouts of {n['episodes']} episodes; bands: 95% bootstrap over episodes", fontsize=10
    )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.02 + 0.08 / len(metrics), 1, 1))
    save_figure(figure, path)


def _horizon(axes: Axes, result: Mapping[str, Any], group: str, metric: Mapping[str, Any]) -> None:
    """One plot: floor and ceiling as grey lines, each model with its band."""
    times = np.asarray(result["times_s"])
    models = [model["label"] for model in result["models"]]
    for name, curve in result["horizon"][group][metric["label"]].items():
        mean, low, high = (_numbers([curve[key]])[0] for key in ("mean", "low", "high"))
        if name in models:
            colour = MODEL_COLOURS[models.index(name) % len(MODEL_COLOURS)]
            axes.fill_between(times, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(times, mean, color=colour, linewidth=1.8, label=name)
        else:
            colour, style = REFERENCE["floor" if name == result["floor"] else "ceiling"]
            axes.plot(times, mean, color=colour, linestyle=style, linewidth=1.2, label=name)
    axes.set_ylabel(heading(metric))
    style_axes(axes)
    axes.set_xlim(0, times[-1])


def change_plot(path: Path, result: Mapping[str, Any]) -> None:
    """Write a PNG of every rollout's change against the baseline: one dot per rollout, ordered; right is better.

    Reads from ``eval.json``: ``changes[group][label] = [new - base, ...]``.
    """
    groups, metrics = result["groups"], result["metrics"]
    figure, axes = plt.subplots(
        len(groups), len(metrics), figsize=(3.1 * len(metrics), 0.9 + 2.0 * len(groups)), squeeze=False, sharey=True
    )
    for row, group in enumerate(groups):
        for column, metric in enumerate(metrics):
            plot = axes[row, column]
            sign = 1.0 if metric["higher_is_better"] else -1.0
            values = [sign * v for v in result["changes"][group][metric["label"]] if v is not None]
            gains = np.sort(np.asarray(values, dtype=float))
            plot.axvline(0, color="#444444", linewidth=0.8)
            plot.scatter(gains, np.arange(len(gains)), c=np.where(gains > 0, "#228833", "#cc3311"), s=14, linewidths=0)
            paired = next(p for p in result["paired"] if p["cameras"] == group and p["metric"] == metric["label"])
            plot.set_title(f"{paired['wins']} won, {paired['losses']} lost", fontsize=9)
            edge = 1.1 * max(float(np.abs(gains).max(initial=0.0)), 1e-9)
            plot.set_xlim(-edge, edge)
            plot.set_yticks([])
            plot.xaxis.set_major_locator(MaxNLocator(5))
            plot.tick_params(labelsize=8)
            style_axes(plot)
            plot.spines["left"].set_visible(False)
            if row == len(groups) - 1:
                plot.set_xlabel("gain in " + " ".join(p for p in (metric["label"], metric["unit"]) if p), fontsize=9)
        axes[row, 0].set_ylabel(f"{group}\nrollouts", fontsize=9)
    base, new = (model["label"] for model in result["models"])
    figure.suptitle(f"{new} against {base}: one dot per rollout, right of the line is better", fontsize=10)
    figure.tight_layout()
    save_figure(figure, path)


def uncertainty_plot(path: Path, result: Mapping[str, Any]) -> None:
    """Write a PNG of seed variance against error: one dot per episode and interaction (``uncertainty.rows``)."""
    groups, models = result["groups"], [model["label"] for model in result["models"]]
    rows = {(row["model"], row["cameras"]): row for row in result["uncertainty"]["rows"]}
    figure, axes = plt.subplots(
        len(groups), len(models), figsize=(4.6 * len(models) + 0.8, 3.5 * len(groups)), squeeze=False, layout="tight"
    )
    n = result["n"]
    step_s = n["frames_per_step"] / n["rate_hz"]
    for line, group in enumerate(groups):
        for column, model in enumerate(models):
            plot, row = axes[line, column], rows[model, group]
            variance, error = (_numbers(row["points"][key]) for key in ("variance", "error"))
            time = np.broadcast_to((np.arange(variance.shape[1]) + 1) * step_s, variance.shape)
            dots = plot.scatter(variance, error, c=time, s=12, cmap="viridis", linewidths=0)
            _spread_out(plot, variance, error)
            rho, within = signed_span(row["rho"], row["low"], row["high"]), signed_span(row["within_step"])
            plot.set_title(f"{model}, {group}\nrho {rho}, within a step {within}", fontsize=9)
            plot.set_xlabel("variance between seeds (latents)", fontsize=9)
            plot.set_ylabel("squared error (images)", fontsize=9)
            style_axes(plot)
            figure.colorbar(dots, ax=plot, label="time in the rollout (s)")
    dots_are = (
        f"{result['uncertainty']['pairs']} starts, {result['uncertainty']['seeds']} seeds, one dot per start and step"
    )
    figure.suptitle(f"seed variance against error: {dots_are}", fontsize=10)
    save_figure(figure, path)


def style_axes(axes: Axes) -> None:
    """A faint grid, no frame at the top and the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _spread_out(plot: Axes, across: NDArray[np.float64], up: NDArray[np.float64]) -> None:
    """Use a logarithmic axis if the numbers span more than a decade, with few small tick labels."""
    for axis, scale, values in ((plot.xaxis, plot.set_xscale, across), (plot.yaxis, plot.set_yscale, up)):
        known = values[np.isfinite(values)]
        if known.size and known.min() > 0 and known.max() > 10 * known.min():
            scale("log")
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter("{x:.2g}")
            axis.set_minor_formatter(NullFormatter())
        else:
            axis.set_major_locator(MaxNLocator(5))
    plot.tick_params(labelsize=8)


def _numbers(rows: Sequence[Sequence[float | None]]) -> NDArray[np.float64]:
    """Nested lists with None as an array with NaN."""
    return np.array([[np.nan if value is None else value for value in row] for row in rows])


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG and close it. Raises CannotWrite."""
    try:
        with whole_file(path) as partial:
            figure.savefig(partial, dpi=130, format="png")
    finally:
        plt.close(figure)


@dataclass(frozen=True)
class Panel:
    """One plot: its title, and the logged names with their labels; on a logarithmic axis if the numbers allow it."""

    title: str
    series: Mapping[str, str]
    log: bool = False


POST_TRAIN_PANELS = (
    Panel("reward of the candidates", {"reward": "reward"}),
    Panel("spread of the reward in a group", {"group_spread": "std"}),
    Panel("trained against sampling policy", {"theta_old": "|D_theta - D_old|"}),
    Panel("trained against reference", {"theta_reference": "|D_theta - D_ref|"}),
    Panel("held-out closed loop", {"val_reward": "sampling policy", "val_base": "base"}),
    Panel("candidates / record", {"sharpness": "sharpness", "motion": "motion"}),
    Panel("use of actions: ln(wrong / right)", {"action_margin": "sampling policy", "action_margin_base": "base"}),
    Panel(
        "referees outside the reward",
        {"val_sharpness_gap": "sharpness gap", "val_st_lpips": "st_lpips", "val_objects_kept": "objects kept"},
    ),
)
PRETRAIN_PANELS = (
    Panel("denoising loss", {"loss": "training", "val_loss": "held out, averaged weights"}, log=True),
    Panel("gradient norm", {"grad_norm": "before clipping"}, log=True),
    Panel("use of actions: ln(wrong / right)", {"action_margin": "averaged weights"}),
    Panel("held-out closed loop", {"val_reward": "averaged weights", "val_base": "first weights"}),
)


def training_curves(
    path: Path, title: str, history: Sequence[Mapping[str, float]], panels: Sequence[Panel], columns: int = 3
) -> None:
    """Write a PNG of the panels that have data in ``history``, the lines of metrics.jsonl; none without data."""
    drawn = [panel for panel in panels if any(name in line for line in history for name in panel.series)]
    if not drawn:
        return
    columns = min(columns, len(drawn))
    rows = -(-len(drawn) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.0 * rows), squeeze=False)
    for place, axis in enumerate(axes.flat):
        if place < len(drawn):
            _draw(axis, drawn[place], history)
        else:
            axis.set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    save_figure(figure, path)


def _draw(axis: Axes, panel: Panel, history: Sequence[Mapping[str, float]]) -> None:
    """Draw one panel, with markers if there are few points."""
    for (name, label), colour in zip(panel.series.items(), MODEL_COLOURS, strict=False):
        steps = np.array([line["step"] for line in history if name in line])
        values = np.array([line[name] for line in history if name in line], dtype=float)
        if len(values) < _SMOOTHED_FROM:
            axis.plot(steps, values, color=colour, linewidth=1.4, marker="o", markersize=3, label=label)
            continue
        width = len(values) // 20
        mean = np.convolve(values, np.ones(width) / width, mode="valid")
        axis.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
        axis.plot(steps[width // 2 : width // 2 + len(mean)], mean, color=colour, linewidth=1.8, label=label)
    known = np.array([line[name] for line in history for name in panel.series if name in line])
    if panel.log and known.min() > 0:
        axis.set_yscale("log")
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel("update", fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.tick_params(which="both", labelsize=8)
    style_axes(axis)
    axis.legend(fontsize=8, frameon=False)
