"""Draw the model card's curves: `python presets/tiny/curves.py VAE_RUN BASE_RUN POST_RUN curves.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def series(run: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a logged number."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    kept = [(line["step"], line[name]) for line in lines if name in line]
    return [s for s, _ in kept], [v for _, v in kept]


def smooth(values: list[float], width: int) -> np.ndarray:
    """Running mean."""
    width = max(1, min(width, len(values)))
    return np.convolve(values, np.ones(width) / width, mode="valid")


def main(vae: str, base: str, post: str, out: str) -> None:
    """Three panels: VAE, base, post-training."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), constrained_layout=True)
    panels = [
        (axes[0], vae, "psnr", "VAE: PSNR of the training batch, dB", 5),
        (axes[1], base, "loss", "base: denoising loss", 10),
        (axes[2], post, "reward", "post-training: reward of the candidates", 5),
    ]
    for axis, run, name, title, width in panels:
        steps, values = series(run, name)
        axis.plot(steps, values, color="0.8", linewidth=0.8)
        axis.plot(steps[len(steps) - len(smooth(values, width)) :], smooth(values, width), color="C0", label="smoothed")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    steps, values = series(base, "val_loss")
    axes[1].plot(steps, values, "o-", color="C1", label="held out (averaged weights)")
    axes[1].legend(fontsize=8)
    axes[1].set_yscale("log")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
