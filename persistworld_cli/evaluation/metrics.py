"""Scores of predicted frames, and the two lines between which every model must lie.

Floor: the frame at the rollout's start, copied for the whole horizon. Ceiling: the recording through the VAE, decoded
in exactly the runs that predictions are decoded in. Shape legend: as in `recording`; B rollouts, K = L-1 new frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persistworld_cli.data.store import EpisodeStore
from persistworld_cli.evaluation.masks import masked_psnr, moving_mask
from persistworld_cli.evaluation.recording import Recording, crop_to, to_unit
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.rewards.score import Scorer

MOVING = "psnr_moving"
MOVING_LABEL = "psnr (moving)"
SHOWN = ("ssim", "psnr", "lpips")  # always reported, whatever the reward is


@dataclass(frozen=True)
class MetricInfo:
    """How to show a metric: its label, its unit, and which way is better."""

    label: str
    unit: str
    higher_is_better: bool


def metric_infos(scorer: Scorer) -> dict[str, MetricInfo]:
    """Every metric that `score_frames` gives, in the order of tables; the scorer's, then PSNR where something moves."""
    infos = {
        name: MetricInfo(metric.label, metric.unit, metric.higher_is_better)
        for name, metric in scorer.registered.items()
    }
    infos[MOVING] = MetricInfo(MOVING_LABEL, "dB", True)
    return infos


def score_frames(scorer: Scorer, pred: Tensor, target: Tensor, first: Tensor) -> dict[str, Tensor]:
    """The scorer's metrics, and PSNR over the pixels that moved since the rollout's start (`masks.moving_mask`).

    Args:
        scorer: the metrics.
        pred, target: (B, K, V, 3, H, W) in [0, 1].
        first: (B, V, 3, H, W), the recorded frame at the rollout's start.

    Returns:
        name -> (B, K, V); ``psnr_moving`` is NaN where nothing moved.
    """
    scores = scorer.metrics(pred, target)
    pred, target, first = (part.to(scorer.device) for part in (pred, target, first))
    scores[MOVING] = masked_psnr(pred, target, moving_mask(target, first[:, None]))
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
def score_pictures(
    scorer: Scorer, recordings: Sequence[Recording], draw: Callable[[int], Tensor], steps: int, rows: int
) -> Scores:
    """Score pictures that ``draw`` gives for each interaction against the recordings.

    Args:
        scorer: the metrics.
        recordings: B of them.
        draw: interaction -> pictures (B, K, V, 3, H, W) in [0, 1]; called in order, until every recording has ended.
        steps, rows: S and L.

    Returns:
        name -> (B, F, V).
    """
    fresh = rows - 1
    cameras = recordings[0].frames.shape[1]
    out = blank_scores([*scorer.names, MOVING], len(recordings), steps * fresh, cameras)
    first = to_unit([recording.first for recording in recordings])
    for step in range(steps):
        frames = slice(step * fresh, (step + 1) * fresh)
        valid = np.stack([recording.valid[frames] for recording in recordings])
        if not valid.any():
            break
        target = to_unit([recording.frames[frames] for recording in recordings])
        height, width = target.shape[-2:]
        pred = crop_to(draw(step), height, width, where="model.vae, world.height, world.width")
        write_scores(out, score_frames(scorer, pred, target, first), frames, valid)
    return out


def floor_scores(scorer: Scorer, recordings: Sequence[Recording], steps: int, rows: int) -> Scores:
    """Scores of copying the frame at the start over the whole horizon: name -> (B, F, V)."""
    first = to_unit([recording.first for recording in recordings])
    still = first[:, None].expand(-1, rows - 1, *first.shape[1:])
    return score_pictures(scorer, recordings, lambda step: still, steps, rows)


def ceiling_scores(
    scorer: Scorer,
    recordings: Sequence[Recording],
    model: WorldModel,
    store: EpisodeStore,
    split: str,
    steps: int,
    rows: int,
    chunk: int,
) -> Scores:
    """Scores of the recording through the VAE: name -> (B, F, V). Predictions can hardly be drawn better."""

    def draw(step: int) -> Tensor:
        latents = torch.stack(
            [store.latents(split, rec.item.episode, rec.row_ids(step, rows).tolist()) for rec in recordings]
        )
        return model.decode_latents(latents.to(model.device), chunk)[:, 1:]

    return score_pictures(scorer, recordings, draw, steps, rows)
