"""How well one set of results predicts another: confusion matrix, correlation, and violations of the ranking.

Plain functions of numbers; n pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

SAME = 1e-6  # shares that differ by less are equal: rounding must not be correlated


def pearson(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's r of n pairs of shares; None (undefined) with fewer than two pairs or if a side is constant."""
    if len(a) < 2 or constant(a) or constant(b):
        return None
    return float(stats.pearsonr(a, b).statistic)


def constant(shares: Sequence[float]) -> bool:
    """Whether shares are all equal, up to rounding."""
    return bool(np.ptp(shares) < SAME)


def mmrv(imagined: Sequence[float], real: Sequence[float]) -> float:
    """Mean maximum rank violation (SIMPLER, arXiv 2405.05941, section on metrics); 0 is best.

    If `imagined` and `real` order a pair of policies differently, the violation is their distance in `real`. Each
    policy counts its worst pair; the result is the mean over policies. Orders are strict, as in the paper: a tie on one
    side only is a violation.
    """
    x, y = np.asarray(imagined, dtype=np.float64), np.asarray(real, dtype=np.float64)
    disagree = (x[:, None] < x[None]) != (y[:, None] < y[None])
    return float((np.abs(y[:, None] - y[None]) * disagree).max(axis=1).mean())


def confusion(predicted: Sequence[bool | None], true: Sequence[bool]) -> dict[str, Any]:
    """The confusion matrix of n decided pairs, how many are undecided, and the accuracy (None without a pair)."""
    pairs = [(a, b) for a, b in zip(predicted, true, strict=True) if a is not None]
    return {
        "n": len(pairs),
        "undecided": len(predicted) - len(pairs),
        "true_positive": sum(a and b for a, b in pairs),
        "false_positive": sum(a and not b for a, b in pairs),
        "false_negative": sum(b and not a for a, b in pairs),
        "true_negative": sum(not a and not b for a, b in pairs),
        "accuracy": sum(a == b for a, b in pairs) / len(pairs) if pairs else None,
    }
