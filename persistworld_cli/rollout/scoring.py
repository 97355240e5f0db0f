"""Scores of predicted frames, and the two lines between which every model must lie.

Floor: the frame at the rollout's start, copied for the whole horizon. Ceiling: the recording through the VAE, decoded
in exactly the runs that predictions are decoded in. Shape legend: as in `recording`; B rollouts, K = L-1 new frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persistworld_cli.config.settings import SamplingSettings
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.metrics.masks import BLUR, MOTION, MOVING_SMALLEST, masked_psnr, masked_ssim, moving_mask
from persistworld_cli.metrics.psnr import CAP_DB
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.metrics.user_masks import MaskSet
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.rollout.recording import Recording, crop_to, to_uint8, to_unit

MOVING = "psnr_moving"
MOVING_LABEL = "psnr (moving)"
SHOWN = ("ssim", "psnr", "lpips")  # always reported, whatever the reward is


@dataclass(frozen=True)
class MetricInfo:
    """How to show a metric: its label, its unit, and which way is better."""

    label: str
    unit: str
    higher_is_better: bool


@dataclass(frozen=True)
class ScoringOptions:
    """How images are brought before the metrics, and on which pixels they are measured apart.

    Attributes:
        crop: pixels left out at the top, bottom, left and right.
        levels: "": predictions in [0, 1] as they are drawn; "nearest" or "down": rounded to 8 bit first.
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
        high, wide = images.shape[-2:]
        return images[..., top : high - bottom, left : wide - right]

    def shown(self, pred: Tensor) -> Tensor:
        """Predictions (..., 3, H, W) as the metrics see them."""
        if self.levels:
            pred = to_unit(to_uint8(pred, self.levels))
        return self.cut(pred)

    def names(self, scorer: Scorer) -> list[str]:
        """Every metric that `score_frames` gives."""
        return [*scorer.names, MOVING, *(f"{kind}@{masks.name}" for masks in self.masks for kind in ("psnr", "ssim"))]

    def describe(self) -> dict[str, Any]:
        """Exact parameters of the masked metrics, for result files."""
        moving = {"label": MOVING_LABEL, "threshold": self.motion, "blur": BLUR}
        shared = {"smallest": MOVING_SMALLEST, "data_range": 1.0, "cap_db": CAP_DB}
        return {MOVING: moving | shared, **{f"masks@{masks.name}": shared | masks.describe() for masks in self.masks}}


PLAIN = ScoringOptions()


def metric_infos(scorer: Scorer, scoring: ScoringOptions = PLAIN) -> dict[str, MetricInfo]:
    """Every metric that `score_frames` gives, in the order of tables; the scorer's, then those on some pixels only."""
    infos = {
        name: MetricInfo(metric.label, metric.unit, metric.higher_is_better)
        for name, metric in scorer.registered.items()
    }
    infos[MOVING] = MetricInfo(MOVING_LABEL, "dB", True)
    for masks in scoring.masks:
        infos[f"psnr@{masks.name}"] = MetricInfo(f"psnr ({masks.name})", "dB", True)
        infos[f"ssim@{masks.name}"] = MetricInfo(f"ssim ({masks.name})", "", True)
    return infos


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
    pred, target, first = (part.to(scorer.device) for part in (pred, target, first))
    scores[MOVING] = masked_psnr(pred, target, moving_mask(target, first[:, None], threshold=scoring.motion))
    for name, mask in (marked or {}).items():
        inside = scoring.cut(mask).to(scorer.device)
        scores[f"psnr@{name}"] = masked_psnr(pred, target, inside)
        scores[f"ssim@{name}"] = masked_ssim(pred, target, inside)
    return scores


Scores = dict[str, NDArray[np.float32]]


def blank_scores(names: Sequence[str], count: int, frames: int, cameras: int) -> Scores:
    """name -> (count, F, V), all NaN: "not scored"."""
    return {name: np.full((count, frames, cameras), np.nan, dtype=np.float32) for name in names}


def write_scores(into: Scores, scores: Mapping[str, Tensor], frames: slice, valid: NDArray[np.bool_]) -> None:
    """Put an interaction's scores (B, K, V) in place, NaN where ``valid`` (B, K) says that the recording has ended."""
    for name, value in scores.items():
        into[name][:, frames] = np.where(valid[:, :, None], value.cpu().numpy(), np.nan)


@torch.no_grad()
def score_images(
    scorer: Scorer,
    recordings: Sequence[Recording],
    draw: Callable[[int], Tensor],
    steps: int,
    rows: int,
    scoring: ScoringOptions = PLAIN,
) -> Scores:
    """Score images that ``draw`` gives for each interaction against the recordings.

    Args:
        scorer: the metrics.
        recordings: B of them.
        draw: interaction -> images (B, K, V, 3, H, W) in [0, 1]; called in order, until every recording has ended.
        steps, rows: S and L.
        scoring: crop, colour range, masks.

    Returns:
        name -> (B, F, V).
    """
    fresh = rows - 1
    cameras = recordings[0].frames.shape[1]
    out = blank_scores(scoring.names(scorer), len(recordings), steps * fresh, cameras)
    first = to_unit([recording.first for recording in recordings])
    for step in range(steps):
        frames = slice(step * fresh, (step + 1) * fresh)
        valid = np.stack([recording.valid[frames] for recording in recordings])
        if not valid.any():
            break
        target = to_unit([recording.frames[frames] for recording in recordings])
        height, width = target.shape[-2:]
        pred = crop_to(draw(step), height, width, where="model.vae, world.height, world.width")
        marked = {masks.name: _marked(masks, recordings, frames) for masks in scoring.masks}
        write_scores(out, score_frames(scorer, pred, target, first, scoring, marked), frames, valid)
    return out


def _marked(masks: MaskSet, recordings: Sequence[Recording], frames: slice) -> Tensor:
    """What the user marked in some frames of the recordings: bool (B, K, V, H, W)."""
    own = [masks.load(recording.item.episode, recording.frame_ids[frames]) for recording in recordings]
    return torch.from_numpy(np.stack(own))


def floor_scores(
    scorer: Scorer, recordings: Sequence[Recording], steps: int, rows: int, scoring: ScoringOptions = PLAIN
) -> Scores:
    """Scores of copying the frame at the start over the whole horizon: name -> (B, F, V)."""
    first = to_unit([recording.first for recording in recordings])
    still = first[:, None].expand(-1, rows - 1, *first.shape[1:])
    return score_images(scorer, recordings, lambda step: still, steps, rows, scoring)


def ceiling_scores(
    scorer: Scorer,
    recordings: Sequence[Recording],
    model: WorldModel,
    store: EpisodeStore,
    split: str,
    steps: int,
    rows: int,
    sampling: SamplingSettings,
    scoring: ScoringOptions = PLAIN,
) -> Scores:
    """Scores of the recording through the VAE: name -> (B, F, V). Predictions can hardly be drawn better."""

    def draw(step: int) -> Tensor:
        latents = torch.stack(
            [store.latents(split, rec.item.episode, rec.row_ids(step, rows).tolist()) for rec in recordings]
        )
        return model.draw(latents.to(model.device), sampling)[:, 1:]

    return score_images(scorer, recordings, draw, steps, rows, scoring)
