"""`pi-rollout --against sim`: how well success in the world model predicts success in the simulator.

The same policy acts from the same starts in both. Three comparisons: the judge's verdicts on imagined images
with the simulator's truth, the judge's verdicts on simulated images with the same truth (this shows the judge's own
errors), and Pearson's r of progress.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from persistworld_cli.policies.bundled_world.simulator import SimRollout
from persistworld_cli.policies.judge import Verdict
from persistworld_cli.statistics.ranking import confusion, pearson


@dataclass(frozen=True)
class Simulated:
    """A rollout in the simulator, and the judge's verdict on its images."""

    rolled: SimRollout
    verdict: Verdict

    def entry(self) -> dict[str, Any]:
        """Its entry in the rollout's JSON."""
        trace, truth = self.rolled.rollout.trace, self.rolled.truth
        return {
            "success": truth.success if truth else None,
            "progress": round(truth.progress, 4) if truth else None,
            "judged_success": self.verdict.success,
            "judged_progress": self.verdict.progress,
            "judged": self.verdict.reason,
            "reset_error": self.rolled.reset_error,
            "joint_pos": trace.joint_pos,
            "joint_vel": trace.joint_vel,
            "state_fk": trace.state_fk,
            "object_positions": self.rolled.positions.tolist(),
        }


def compare(verdicts: Sequence[Verdict], simulated: Sequence[Simulated]) -> dict[str, Any]:
    """Verdicts on imagined images with the simulator's truth, over the rollouts that have one."""
    known = [(v, s.verdict, t) for v, s in zip(verdicts, simulated, strict=True) if (t := s.rolled.truth)]
    true = [truth.success for _, _, truth in known]
    imagined = [(v.progress, t.progress) for v, _, t in known if v.progress is not None]
    judged = [(s.progress, t.progress) for _, s, t in known if s.progress is not None]
    return {
        "rollouts": len(simulated),
        "imagined": _means([v.success for v, _, _ in known], [v.progress for v, _, _ in known]),
        "simulated": _means(true, [t.progress for _, _, t in known]),
        "success": confusion([v.success for v, _, _ in known], true),
        "progress": {
            "n": len(imagined),
            "pearson_r": pearson(*_columns(imagined)),
            "mean_absolute_error": _mean([abs(a - b) for a, b in imagined]),
        },
        "judge_on_simulated": {
            **confusion([s.success for _, s, _ in known], true),
            "pearson_r": pearson(*_columns(judged)),
        },
        "reset_error": max((s.rolled.reset_error for s in simulated), default=0.0),
    }


def _means(success: Sequence[bool | None], progress: Sequence[float | None]) -> dict[str, Any]:
    return {"success": _mean(success), "n": sum(value is not None for value in success), "progress": _mean(progress)}


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in pairs], [b for _, b in pairs]
