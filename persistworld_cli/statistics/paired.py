"""Paired statistics of two models on the same rollouts.

A rollout of one model is compared with the other model's rollout of the same episode, start and noise. Rollouts of one
episode (other starts or seeds) resemble each other, so intervals resample whole *episodes*, and verdicts rest on
episodes, not on rollouts or frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

FloatArray = NDArray[np.float64]
ALPHA = 0.05
FEWEST = 6  # with n episodes all on one side, the two-sided sign test gives 2 * 0.5^n: above 0.05 up to n = 5


def mean(values: FloatArray, axis: int) -> FloatArray:
    """Mean without NaNs; NaN if there is no other value."""
    there = np.isfinite(values)
    total, count = np.where(there, values, 0.0).sum(axis=axis), there.sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def wilson(wins: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share ``wins / n`` (wins may count ties as halves). (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    z = float(scipy_stats.norm.ppf(0.5 + confidence / 2))
    share = wins / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of the sign test of decided pairs; 1 without pairs."""
    return float(scipy_stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def wilcoxon(differences: FloatArray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test of paired differences (n,) without zeros; 1 if all are zero."""
    kept = differences[differences != 0]
    return float(scipy_stats.wilcoxon(kept).pvalue) if kept.size else 1.0


def _episode_sums(values: FloatArray, episodes: Sequence[str]) -> tuple[list[str], FloatArray, FloatArray]:
    """Episodes in order of first appearance, and each episode's sum and count (E, m) of values (n, m) without NaN."""
    names = list(dict.fromkeys(episodes))
    member = np.array([[episode == name for episode in episodes] for name in names], dtype=np.float64)
    known = np.isfinite(values)
    return names, member @ np.where(known, values, 0.0), member @ known.astype(np.float64)


def episode_means(values: FloatArray, episodes: Sequence[str]) -> tuple[list[str], FloatArray]:
    """Mean of each episode's rollouts without NaN: (n, ...) -> names, (E, ...) in order of first appearance."""
    names, total, count = _episode_sums(values.reshape(len(values), -1), episodes)
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return names, means.reshape(len(names), *values.shape[1:])


def cluster_bootstrap(
    values: FloatArray, episodes: Sequence[str], *, samples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> tuple[FloatArray, FloatArray]:
    """Percentile interval of the mean, by resampling whole episodes with replacement.

    Args:
        values: (n, ...) one entry per rollout; NaN after the end of a recording.
        episodes: n episode ids, the clusters.
        samples, seed: of the bootstrap.
        confidence: coverage of the interval.

    Returns:
        (low, high), each of the shape ``values.shape[1:]``; both are NaN if there is no value.
    """
    names, total, count = _episode_sums(values.reshape(len(values), -1), episodes)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=samples)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (draws @ total) / (draws @ count)
    edges = np.full((2, means.shape[1]), np.nan)
    known = np.isfinite(means).any(axis=0)
    tail = (1 - confidence) / 2
    edges[:, known] = np.nanquantile(means[:, known], [tail, 1 - tail], axis=0)
    return edges[0].reshape(values.shape[1:]), edges[1].reshape(values.shape[1:])


def spearman(a: FloatArray, b: FloatArray) -> float:
    """Spearman's rank correlation of pairs (n,) without NaN; NaN below 3 pairs or if a side is constant."""
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    if a.size < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(scipy_stats.spearmanr(a, b).statistic)


def bootstrap_interval(
    statistic: Callable[[NDArray[np.int64]], float],
    episodes: Sequence[str],
    *,
    samples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """As `cluster_bootstrap`, for any statistic of rows.

    Args:
        statistic: row indices (with repeats) -> number; NaN (undefined) is left out.
        episodes: the episode of each row.
        samples, seed, confidence: as for `cluster_bootstrap`.

    Returns:
        (low, high); both are NaN with fewer than 2 episodes.
    """
    names = list(dict.fromkeys(episodes))
    members = [np.flatnonzero([episode == name for episode in episodes]) for name in names]
    if len(names) < 2:
        return math.nan, math.nan
    draws = np.random.default_rng(seed).integers(len(names), size=(samples, len(names)))
    values = np.array([statistic(np.concatenate([members[pick] for pick in draw])) for draw in draws])
    known = values[np.isfinite(values)]
    if not known.size:
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    return low, high


@dataclass(frozen=True)
class Paired:
    """One metric of two models over the same rollouts; "better" accounts for the metric's direction.

    Attributes:
        rollouts, episodes: how many of each.
        wins, losses, ties: rollouts in which the new model is better, worse, the same.
        win_rate: (wins + ties/2) / rollouts, with its Wilson interval ``win_low .. win_high``.
        sign_p, wilcoxon_p: two-sided, over rollouts.
        wilcoxon_p_episodes: two-sided, over the means of episodes.
        base, new: mean of each model.
        change: mean of new - base, in the metric's own unit and sign.
        change_low, change_high: its 95% bootstrap interval over episodes.
        verdict: better | worse | undecided | too few.
        words: the verdict as a sentence.
    """

    rollouts: int
    episodes: int
    wins: int
    losses: int
    ties: int
    win_rate: float
    win_low: float
    win_high: float
    sign_p: float
    wilcoxon_p: float
    wilcoxon_p_episodes: float
    base: float
    new: float
    change: float
    change_low: float
    change_high: float
    verdict: str
    words: str


def _verdict(episodes: int, low: float, high: float, p: float, better_up: bool) -> tuple[str, str]:
    """Verdict and sentence, from the interval of the change and the p over episodes."""
    if episodes < FEWEST:
        many = "1 episode" if episodes == 1 else f"{episodes} episodes"
        return "too few", (
            f"too few to decide: with {many}, even if all agree, chance alone gives that "
            f"{100 * min(1.0, 2 * 0.5**episodes):.0f}% of the time; use at least {FEWEST}"
        )
    if low <= 0 <= high or math.isnan(low):
        return "undecided", f"no difference shown with {episodes} episodes (p = {p:.2g})"
    if p >= ALPHA:
        return "undecided", (f"undecided with {episodes} episodes: the interval excludes zero, but p = {p:.2g}")
    word = "better" if (low > 0) == better_up else "worse"
    return word, f"{word} (p = {p:.2g} over {episodes} episodes)"


def compare(
    base: FloatArray,
    new: FloatArray,
    episodes: Sequence[str],
    *,
    higher_is_better: bool,
    samples: int = 2000,
    seed: int = 0,
) -> Paired:
    """Compare two models rollout by rollout.

    Args:
        base, new: (n,) one number per rollout; pairs with a NaN are left out.
        episodes: n episode ids.
        higher_is_better: the metric's direction.
        samples, seed: of the bootstrap.
    """
    both = np.isfinite(base) & np.isfinite(new)
    names = [name for name, kept in zip(episodes, both, strict=True) if kept]
    base, new = base[both], new[both]
    difference = new - base
    gain = difference if higher_is_better else -difference
    n, wins, losses = len(gain), int((gain > 0).sum()), int((gain < 0).sum())
    ties = n - wins - losses
    low = high = math.nan
    means = episode_means(difference, names)[1] if n else difference
    if n:
        low, high = (float(edge) for edge in cluster_bootstrap(difference, names, samples=samples, seed=seed))
    p_episodes = wilcoxon(means)
    win_low, win_high = wilson(wins + ties / 2, n)
    verdict, words = _verdict(len(means), low, high, p_episodes, higher_is_better)
    return Paired(
        rollouts=n,
        episodes=len(means),
        wins=wins,
        losses=losses,
        ties=ties,
        win_rate=(wins + ties / 2) / n if n else math.nan,
        win_low=win_low,
        win_high=win_high,
        sign_p=sign_test(wins, losses),
        wilcoxon_p=wilcoxon(difference),
        wilcoxon_p_episodes=p_episodes,
        base=float(base.mean()) if n else math.nan,
        new=float(new.mean()) if n else math.nan,
        change=float(difference.mean()) if n else math.nan,
        change_low=low,
        change_high=high,
        verdict=verdict,
        words=words,
    )
