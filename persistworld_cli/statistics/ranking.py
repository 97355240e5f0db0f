"""How well one set of results foretells another: agreement, correlation, and violations of the order.

Plain functions of numbers; n pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def pearson(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's r of n pairs; None with fewer than two, or where a side is constant (it is undefined then)."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))


def mmrv(imagined: Sequence[float], real: Sequence[float]) -> float:
    """Mean maximum rank violation (SIMPLER, arXiv 2405.05941, section on metrics); 0 is best.

    A pair of policies whose order by `imagined` is not that by `real` costs their distance in `real`; each policy
    counts its worst pair, and the mean is taken over policies. Orders are strict, as in the paper: policies that are
    level on one side alone disagree.
    """
    x, y = np.asarray(imagined, dtype=np.float64), np.asarray(real, dtype=np.float64)
    disagree = (x[:, None] < x[None]) != (y[:, None] < y[None])
    return float((np.abs(y[:, None] - y[None]) * disagree).max(axis=1).mean())


def agreement(foretold: Sequence[bool | None], true: Sequence[bool]) -> dict[str, Any]:
    """The 2x2 table of n pairs, those left out that were not told, and the share that agrees (None without any)."""
    pairs = [(a, b) for a, b in zip(foretold, true, strict=True) if a is not None]
    count = {
        "both_succeed": sum(a and b for a, b in pairs),
        "only_foretold": sum(a and not b for a, b in pairs),
        "only_true": sum(b and not a for a, b in pairs),
        "both_fail": sum(not a and not b for a, b in pairs),
    }
    same = count["both_succeed"] + count["both_fail"]
    return {
        "n": len(pairs),
        "not_told": len(foretold) - len(pairs),
        **count,
        "agreement": same / len(pairs) if pairs else None,
    }
