"""Does a model know when it is wrong? The variance between seeds of one rollout against its error.

Rollouts of one episode and start that differ only in their noise are compared interaction by interaction. Their
variance needs no recording; if it ranks like the error, it shows where a rollout can be trusted. Both grow with time,
so the rank correlation within each interaction is given too.

Shape legend: as in `recording`; R seeds, G (episode, start) pairs, V cameras.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.evaluation.results import EvalData
from persistworld_cli.statistics.paired import FEWEST, FloatArray, bootstrap_interval, mean, spearman

NEEDED = "needs at least 2 seeds of a rollout: --seed 0 --seed 1"


def seed_groups(data: EvalData) -> dict[tuple[str, int], list[int]]:
    """(episode, start) -> indices of its rollouts, where there are at least two seeds."""
    groups: dict[tuple[str, int], list[int]] = {}
    for index, item in enumerate(data.items):
        groups.setdefault((item.episode, item.start), []).append(index)
    return {key: rows for key, rows in groups.items() if len(rows) > 1}


def seed_variance(latents: NDArray[np.floating], cameras: int) -> FloatArray:
    """Variance between seeds: latents (R, S, L, C, h, w), cameras stacked along h -> (S, V).

    The unbiased variance of each latent value of the new frames, averaged over frames, channels and positions.
    """
    new = latents[:, :, 1:].astype(np.float64)
    spread = new.var(axis=0, ddof=1)  # (S, L-1, C, h, w)
    parts = np.split(spread, cameras, axis=-2)
    return np.stack([part.mean(axis=(1, 2, 3, 4)) for part in parts], axis=1)


def step_errors(data: EvalData, model: str, rows: list[int]) -> FloatArray:
    """Mean squared error (S, V) of the images, over frames and seeds; NaN after the end of the recording."""
    psnr = np.stack([data.rollouts[model][row].scores["psnr"] for row in rows]).astype(np.float64)  # (R, F, V)
    error = 10.0 ** (-psnr / 10.0)
    by_step = error.reshape(len(rows), -1, data.settings.model.num_frames - 1, error.shape[-1])
    return mean(mean(by_step, 2), 0)


def uncertainty_result(data: EvalData) -> dict[str, Any]:
    """Variance, error and their rank correlation for every model and camera group.

    Returns:
        ``{"seeds", "pairs", "note", "rows": [{model, cameras, rho, low, high, within_step, ...}]}``; with one seed
        there are no rows, and ``note`` gives the reason.
    """
    groups = seed_groups(data)
    if not groups:
        return {"seeds": 1, "pairs": 0, "note": NEEDED, "rows": []}
    cameras = len(data.settings.world.cameras)
    episodes = [episode for episode, _ in groups]
    rows = []
    for model in data.labels:
        spread, error = [], []
        for members in groups.values():
            latents = np.stack([data.latents(model, data.items[index]) for index in members])
            spread.append(seed_variance(latents, cameras))
            error.append(step_errors(data, model, members))
        for group, own in data.groups.items():
            a, b = (mean(np.stack(part)[..., list(own)], -1) for part in (spread, error))  # (G, S) each
            rows.append({"model": model, "cameras": group, **_correlate(a, b, episodes, data.settings.eval.bootstrap)})
    enough = len(set(episodes)) >= FEWEST
    note = "" if enough else f"too few to decide: {len(set(episodes))} episodes, use at least {FEWEST}"
    return {"seeds": min(len(m) for m in groups.values()), "pairs": len(groups), "note": note, "rows": rows}


def _correlate(spread: FloatArray, error: FloatArray, episodes: list[str], samples: int) -> dict[str, Any]:
    """Spearman's rho over all (pair, step) points with its interval over episodes, and within each step."""
    spread = np.where(np.isfinite(error), spread, np.nan)
    low, high = bootstrap_interval(
        lambda rows: spearman(spread[rows].ravel(), error[rows].ravel()), episodes, samples=samples
    )
    within = np.array([spearman(a, b) for a, b in zip(spread.T, error.T, strict=True)])
    return {
        "rho": spearman(spread.ravel(), error.ravel()),
        "low": low,
        "high": high,
        "within_step": float(mean(within, 0)),
        "rho_by_step": within,
        "variance": mean(spread, 0),
        "error": mean(error, 0),
        "points": {"variance": spread, "error": error},
    }
