"""Poses far outside the percentiles that actions are scaled by: they are clipped, and the model does not see the rest.

Shapes: D numbers of a pose.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.data.clips.store import ActionStat

FAR, OFTEN = 0.25, 0.05  # by how much of the range a pose is outside, and in what share of the poses, to be reported

logger = logging.getLogger(__name__)


class ClippedPoses:
    """Counts the poses of rollouts, and warns once.

    One in fifty lies outside by definition, at most 5% of the poses of nine real DROID episodes, none by a tenth
    of the range; 0.9% of the bundled world's poses by over a quarter.

    Args:
        stat: the percentiles.
    """

    def __init__(self, stat: ActionStat) -> None:
        self._stat, self._poses, self._warned = stat, 0, False
        self._far = np.zeros(len(stat.p01), dtype=int)
        self._most = np.zeros(len(stat.p01))

    def watch(self, poses: NDArray[np.float64]) -> None:
        """Count poses (..., D); warn if many are far outside."""
        if self._warned:
            return
        stat = self._stat
        outside = np.maximum(stat.p01 - poses, poses - stat.p99).reshape(-1, len(stat.p01))
        self._poses += len(outside)
        self._far += (outside > FAR * np.maximum(stat.p99 - stat.p01, 1e-8)).sum(axis=0)
        self._most = np.maximum(self._most, outside.max(axis=0))
        lines = [
            f"\n  {stat.names[i] if stat.names else f'number {i + 1}'}: {self._far[i]} of {self._poses} poses, "
            f"up to {self._most[i]:.3g} outside {stat.p01[i]:.4g} .. {stat.p99[i]:.4g}"
            for i in np.flatnonzero(self._far > OFTEN * self._poses).tolist()
        ]
        if lines:
            self._warned = True
            logger.warning(
                "warning: states far outside those of the training are clipped, and the model does not see the rest:%s",
                "".join(lines),
            )
