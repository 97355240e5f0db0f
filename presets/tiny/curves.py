"""Draw the model card's curves: `python presets/tiny/curves.py BASE_RUN LAST_RUN POST_RUN curves.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes


def series(run: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Updates and values of a logged number."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    kept = [(line["step"], line[name]) for line in lines if name in line]
    return np.array([step for step, _ in kept]), np.array([value for _, value in kept])


def draw(axis: Axes, steps: np.ndarray, values: np.ndarray, width: int, colour: str) -> None:
    """A curve and its running mean over `width` values."""
    width = max(1, min(width, len(values)))
    axis.plot(steps, values, color="0.8", linewidth=0.8)
    axis.plot(steps[width - 1 :], np.convolve(values, np.ones(width) / width, mode="valid"), color=colour)


def main(base: str, last: str, post: str, out: str) -> None:
    """Two panels: the base with its last stretch, post-training."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), constrained_layout=True)
    done = 0
    for run, colour, name in ((base, "C0", "constant rate"), (last, "C2", "last stretch")):
        steps, values = series(run, "loss")
        draw(left, steps + done, values, 10, colour)
        held, loss = series(run, "val_loss")
        left.plot(held + done, loss, "o-", color=colour, markersize=4, label=f"held out, averaged weights, {name}")
        done += steps[-1]
    left.set_title("base: denoising loss", fontsize=10)
    left.set_yscale("log")
    left.legend(fontsize=8)
    draw(right, *series(post, "reward"), 10, "C0")
    right.set_title("post-training: reward of the candidates", fontsize=10)
    for axis in (left, right):
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
