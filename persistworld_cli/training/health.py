"""Health of post-training: does the reward rise, for the right reason, and does the held-out closed loop agree.

A reward may stall (no spread, identical policies) or rise for the wrong reason (blur, no motion): each case has a
number here; `warnings` watches them. Shapes as in `candidates`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from persistworld_cli.training.candidates import Candidates


def candidate_health(
    made: Candidates, kept: Tensor, cameras: Sequence[str], labels: Mapping[str, str]
) -> dict[str, float]:
    """Reward by metric and camera, spread in the groups, margin of the kept ones, sharpness and motion, time shares.

    Args:
        made: scored candidates.
        kept: (G, m + n) indices of those that are trained on.
        cameras: names, in stacking order.
        labels: metric -> label (`Scorer.labels`).
    """
    best = made.reward.gather(1, kept.to(made.reward.device))
    spread = made.reward.std(dim=1)
    means = {
        "reward": made.reward,
        **{f"reward_{labels[name]}": value for name, value in made.metrics.items()},
        **{
            f"{labels[name]}/{camera}": value[..., index]
            for name, value in made.metrics.items()
            for index, camera in enumerate(cameras)
        },
        "group_spread": spread,
        "groups_without_spread": (spread < 1e-6).float(),
        "kept_margin": best.max(1).values - best.min(1).values,
        "sharpness": _gradient(made.images, -1),
        "motion": _gradient(made.images, 1),
        "recorded_sharpness": _gradient(made.recorded, -1),
        "recorded_motion": _gradient(made.recorded, 1),
    }
    numbers = dict(zip(means, torch.stack([value.mean() for value in means.values()]).tolist(), strict=True))
    for name in ("sharpness", "motion"):
        numbers[name] /= max(1e-9, numbers.pop(f"recorded_{name}"))
    total = sum(made.seconds.values())
    return {**numbers, "seconds": total, **{f"share_{name}": value / total for name, value in made.seconds.items()}}


def _gradient(images: Tensor, dim: int) -> Tensor:
    """Absolute differences of neighbours: along the width they measure sharpness, along the frames motion."""
    return images.diff(dim=dim).abs()


@dataclass
class CollapseGuard:
    """Detects a collapse: closed-loop validation falls `checks` times in a row and is below the base.

    checks: 0 disables the guard. best: highest score so far; state: the policies that had it.
    """

    checks: int
    scores: list[float] = field(default_factory=list)
    best: float = float("-inf")
    state: dict[str, Any] | None = None

    def see(self, score: float, state: dict[str, Any]) -> bool:
        """Record a check: its reward minus the base's, and the policies (copied if best). True: collapsed."""
        self.scores.append(score)
        if score > self.best:
            self.best, self.state = score, copy.deepcopy(state)
        last = self.scores[-self.checks - 1 :]
        falls = all(b < a for a, b in pairwise(last))
        return self.checks > 0 and len(last) == self.checks + 1 and falls and score < 0

    def rolled_back(self) -> None:
        """After a rollback: the next check is compared with the best one."""
        self.scores = [self.best]

    def snapshot(self) -> dict[str, Any]:
        """To resume from."""
        return {"scores": self.scores, "best": self.best, "state": self.state}

    def load(self, saved: dict[str, Any]) -> None:
        """Load what `snapshot` returned."""
        self.scores, self.best, self.state = list(saved["scores"]), saved["best"], saved["state"]
