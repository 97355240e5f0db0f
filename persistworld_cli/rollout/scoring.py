"""Scores of predicted frames.

Shape legend: B rollouts, K = L-1 new frames of an interaction, V cameras, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from persistworld_cli.config.settings import WorldSettings
from persistworld_cli.metrics.masks import BLUR, MOTION, MOVING_SMALLEST, masked_psnr, masked_ssim, moving_mask
from persistworld_cli.metrics.psnr import CAP_DB
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.metrics.user_masks import MaskSet
from persistworld_cli.rollout.images import to_uint8, to_unit

MOVING = "psnr_moving"
MOVING_LABEL = "psnr (moving)"
SHOWN = ("ssim", "psnr", "lpips")  # always reported, whatever the reward is
Scores = dict[str, NDArray[np.float32]]  # name -> (F, V), or (B, F, V)


@dataclass(frozen=True)
class MetricInfo:
    """How to show a metric: its label, its unit, and which way is better."""

    label: str
    unit: str
    higher_is_better: bool


@dataclass(frozen=True)
class ScoringOptions:
    """How images are prepared for the metrics, and which pixels are also measured alone.

    Attributes:
        crop: pixels left out at the top, bottom, left and right.
        levels: "": predictions in [0, 1] as decoded; "nearest" or "down": rounded to 8 bit first.
        motion: a pixel that differs by more from the rollout's start has moved.
        masks: sets of masks that the user gave.
    """

    crop: tuple[int, ...] = (0, 0, 0, 0)
    levels: str = ""
    motion: float = MOTION
    masks: tuple[MaskSet, ...] = ()

    def cut(self, images: Tensor) -> Tensor:
        """Images or masks (..., H, W) without the margins."""
        top, bottom, left, right = self.crop
        h, w = images.shape[-2:]
        return images[..., top : h - bottom, left : w - right]

    def shown(self, pred: Tensor) -> Tensor:
        """Predictions (..., 3, H, W) as the metrics see them."""
        if self.levels:
            pred = to_unit(to_uint8(pred, self.levels))
        return self.cut(pred)

    def describe(self) -> dict[str, Any]:
        """Exact parameters of the masked metrics, for result files."""
        moving = {"label": MOVING_LABEL, "threshold": self.motion, "blur": BLUR}
        shared = {"smallest": MOVING_SMALLEST, "data_range": 1.0, "cap_db": CAP_DB}
        return {MOVING: moving | shared, **{f"masks@{masks.name}": shared | masks.describe() for masks in self.masks}}


PLAIN = ScoringOptions()


def metric_infos(scorer: Scorer, scoring: ScoringOptions = PLAIN) -> dict[str, MetricInfo]:
    """Every metric that `score_frames` gives, in the order of tables."""
    shown = [name for name in SHOWN if name in scorer.registered]
    infos = {
        name: MetricInfo(metric.label, metric.unit, metric.higher_is_better)
        for name, metric in ((name, scorer.registered[name]) for name in dict.fromkeys([*shown, *scorer.registered]))
    }
    infos[MOVING] = MetricInfo(MOVING_LABEL, "dB", True)
    for masks in scoring.masks:
        infos[f"psnr@{masks.name}"] = MetricInfo(f"psnr ({masks.name})", "dB", True)
        infos[f"ssim@{masks.name}"] = MetricInfo(f"ssim ({masks.name})", "", True)
    return infos


def camera_groups(world: WorldSettings) -> dict[str, tuple[int, ...]]:
    """Name -> indices of its cameras, of the groups that have cameras."""
    return {name: cameras for name, cameras in (("exterior", world.exterior), ("wrist", world.wrist)) if cameras}


def score_frames(
    scorer: Scorer,
    pred: Tensor,
    target: Tensor,
    first: Tensor,
    scoring: ScoringOptions = PLAIN,
    marked: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The scorer's metrics, PSNR over the pixels that moved since the rollout's start (`masks.moving_mask`), and PSNR
    and SSIM over the pixels that the user marked.

    Args:
        scorer: the metrics.
        pred, target: (B, K, V, 3, H, W) in [0, 1].
        first: (B, V, 3, H, W), the recorded frame at the rollout's start.
        scoring: crop, colour range, motion.
        marked: name of a mask set -> bool (B, K, V, H, W).

    Returns:
        name -> (B, K, V); the masked ones are NaN where (almost) nothing moved or was marked.
    """
    pred, target, first = scoring.shown(pred), scoring.cut(target), scoring.cut(first)
    scores = scorer.metrics(pred, target)
    pred, target, first = (scorer.place(part) for part in (pred, target, first))
    scores[MOVING] = masked_psnr(pred, target, moving_mask(target, first[:, None], threshold=scoring.motion))
    for name, mask in (marked or {}).items():
        inside = scorer.place(scoring.cut(mask))
        scores[f"psnr@{name}"] = masked_psnr(pred, target, inside)
        scores[f"ssim@{name}"] = masked_ssim(pred, target, inside)
    return scores
