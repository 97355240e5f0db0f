"""Curves of a training run's metrics.jsonl over its updates, one plot per panel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from persistworld_cli.reports.curves import MODEL_COLOURS, save_figure, style_axes

_SMOOTHED_FROM = 40  # lines in a log from which a mean over neighbours is drawn over the numbers themselves


@dataclass(frozen=True)
class Panel:
    """One plot: its title, and the logged names with what to call each; on a logarithmic axis where numbers allow."""

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
    """Write a PNG of the panels that have data; none without data.

    Args:
        path: PNG to write.
        title: over everything.
        history: lines of metrics.jsonl, each with ``step``.
        panels: what to draw.
        columns: panels per row.
    """
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
    """One panel; points where there are few."""
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
