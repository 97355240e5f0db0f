"""`pi-rollout --against sim`: how well what is imagined foretells what happens, the simulator being what happens.

The same policy acts from the same starts in both. Three comparisons: the judge on imagined images against the truth
(what one wants to know), the judge on simulated images against the truth (the judge's own part in that), and the
progress of both, as Pearson's r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from persistworld_cli.config.settings import Settings
from persistworld_cli.policies.bundled_world.scene import RecordedStart
from persistworld_cli.policies.bundled_world.simulator import SimRollout, roll_in_simulator
from persistworld_cli.policies.controller import PolicyView
from persistworld_cli.policies.judge import Judge, Verdict
from persistworld_cli.policies.judges import ask_judge
from persistworld_cli.policies.source import open_policies
from persistworld_cli.rollout.recording import Start
from persistworld_cli.statistics.ranking import agreement, pearson


@dataclass(frozen=True)
class Simulated:
    """What the simulator made of one start, and what the judge says to the simulator's images."""

    rolled: SimRollout
    judged: Verdict

    def entry(self) -> dict[str, Any]:
        """For the rollout's JSON."""
        rollout, truth = self.rolled.rollout, self.rolled.truth
        return {
            "success": truth.success if truth else None,
            "progress": round(truth.progress, 4) if truth else None,
            "judged_success": self.judged.success,
            "judged_progress": self.judged.progress,
            "judged": self.judged.reason,
            "restored_off": self.rolled.restored_off,
            "joint_pos": rollout.trace.joint_pos,
            "joint_vel": rollout.trace.joint_vel,
            "state_fk": rollout.trace.state_fk,
            "object_positions": self.rolled.positions.tolist(),
        }


def simulate(
    settings: Settings,
    start: Start,
    recorded: RecordedStart,
    policy: str,
    view: PolicyView,
    steps: int,
    judge: Judge,
    judge_name: str,
) -> Simulated:
    """Roll a policy out in the simulator and judge what is seen there. Raises PersistWorldError: the policy failed."""
    with open_policies(policy, settings.policy, 1) as (acting,):
        rolled = roll_in_simulator(settings, start, recorded, acting, view, steps)
    evidence = rolled.rollout.evidence(settings.world.cameras, recorded.objects)
    return Simulated(rolled, ask_judge(judge, evidence, judge_name))


def compare(verdicts: Sequence[Verdict], simulated: Sequence[Simulated]) -> dict[str, Any]:
    """What was imagined (its verdicts) against what was simulated, over the rollouts whose instruction has a rule."""
    known = [(v, s, s.rolled.truth) for v, s in zip(verdicts, simulated, strict=True) if s.rolled.truth is not None]
    true = [truth.success for *_, truth in known if truth]
    shared = [(v.progress, t.progress) for v, _, t in known if t and v.progress is not None]
    steady = [(s.judged.progress, t.progress) for _, s, t in known if t and s.judged.progress is not None]
    return {
        "rollouts": len(simulated),
        "imagined": _rates([v.success for v, *_ in known], [v.progress for v, *_ in known]),
        "simulated": _rates(true, [t.progress for *_, t in known if t]),
        "success": agreement([v.success for v, *_ in known], true),
        "progress": {"n": len(shared), "pearson_r": pearson(*_columns(shared)), "mean_gap": _gap(shared)},
        "judge_on_simulated": {
            **agreement([s.judged.success for _, s, _ in known], true),
            "pearson_r": pearson(*_columns(steady)),
        },
        "restored_off": max((s.rolled.restored_off for s in simulated), default=0.0),
    }


def _rates(success: Sequence[bool | None], progress: Sequence[float | None]) -> dict[str, Any]:
    told = [value for value in success if value is not None]
    reached = [value for value in progress if value is not None]
    return {
        "success": float(np.mean(told)) if told else None,
        "n": len(told),
        "progress": float(np.mean(reached)) if reached else None,
    }


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def _gap(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Mean absolute difference."""
    return float(np.mean([abs(a - b) for a, b in pairs])) if pairs else None
