"""Does the model use its actions? Held-out clips denoised with their own actions, and with those of other clips.

A model that ignores actions has the same loss under any of them. The margin of a clip is ln(loss with another clip's
actions / loss with its own), with the same noise: 0 if actions are ignored, 0.02 if wrong ones cost 2%. The logarithm
weights clips of all noise levels equally.

Shapes: n clips.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from persistworld_cli.config.settings import PretrainSettings
from persistworld_cli.data.clips.mixture import ClipMixture
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.objective.denoising import clip_losses

CLIPS, BATCH = 32, 8  # fixed held-out clips
SEED = 123
MARGIN, ERROR = "action_margin", "action_margin_se"
BASE, FALL, FALL_ERROR = "action_margin_base", "action_margin_fall", "action_margin_fall_se"


@dataclass(frozen=True)
class HeldOutLosses:
    """Losses (n,) of the clips with their own actions (`right`) and with another clip's (`wrong`)."""

    right: NDArray[np.float64]
    wrong: NDArray[np.float64]

    @property
    def margins(self) -> NDArray[np.float64]:
        """(n,) ln(wrong / right)."""
        return np.asarray(np.log(self.wrong) - np.log(self.right))

    def numbers(self) -> dict[str, float]:
        """The mean margin and its standard error, to log."""
        mean, error = mean_and_error(self.margins)
        return {MARGIN: mean, ERROR: error}


def mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and standard error of (n,)."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def held_out_losses(
    model: WorldModel,
    source: ClipMixture,
    options: PretrainSettings,
    autocast: Callable[[], AbstractContextManager[object]],
) -> HeldOutLosses:
    """Losses of the current weights on the same `CLIPS` held-out clips, under the same draws, each time.

    Args:
        model: in evaluation mode.
        source: held-out clips.
        options: noise levels of the loss.
        autocast: precision of the forward passes.
    """
    with autocast():
        return HeldOutLosses(*(clip_by_clip(model, source, options, wrong=wrong) for wrong in (False, True)))


@torch.no_grad()
def clip_by_clip(
    model: WorldModel, source: ClipMixture, options: PretrainSettings, *, wrong: bool = False
) -> NDArray[np.float64]:
    """Loss (n,) of each of the fixed clips; with ``wrong`` actions, those of the clip before it in its batch."""
    losses = []
    for k in range(CLIPS // BATCH):
        batch = source.batch(SEED, k, BATCH)
        actions = batch.actions.roll(1, 0) if wrong else batch.actions
        losses.append(clip_losses(model, batch, options, SEED, k * BATCH, actions))
    return torch.cat(losses).double().cpu().numpy()


def against_base(now: HeldOutLosses, base: NDArray[np.float64]) -> dict[str, float]:
    """The margin of the initial weights, and by how much it fell since, paired over the clips."""
    fall, error = mean_and_error(base - now.margins)
    return {BASE: float(base.mean()), FALL: fall, FALL_ERROR: error}
