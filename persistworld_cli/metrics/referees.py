"""Referees: metrics without weight in the reward, which reveal reward hacking.

Training exploits what a reward does not measure: blur, with a pixel distance; a lost object, in an image that is mostly
table. A metric outside the reward reveals it. To add one, write a class like `SharpnessGap` and add a line to
`REFEREES`, or name your own as ``module:Class`` in ``post_train.referees``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from persistworld_cli.config.plugins import make_plugin
from persistworld_cli.metrics.st_lpips import EXTRA, StLpips, find_weights

logger = logging.getLogger(__name__)


class Referee(Protocol):
    """Interface of a referee.

    Attributes:
        label: its name in logs; in metrics.jsonl, ``val_LABEL``.
        higher_is_better: direction of improvement.

    A referee of certain datasets may also have ``check_dataset(root)``, which raises PersistWorldError for others.
    """

    label: str
    higher_is_better: bool

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        """Images (M,3,H,W) against recorded (T,3,H,W), as for `registry.Metric` -> (M,) float32, finite."""
        ...


def sharpness(images: Tensor) -> Tensor:
    """Root mean square difference of neighbouring pixels: (..., 3, H, W) -> (...).

    Squared, because blur does not change an edge's sum of absolute differences.
    """
    axes = (-3, -2, -1)
    return (images.diff(dim=-1).square().mean(dim=axes) + images.diff(dim=-2).square().mean(dim=axes)).sqrt()


class SharpnessGap:
    """|ln(sharpness / the recording's sharpness)| as a referee: 0 for equal sharpness, larger is worse."""

    label = "sharpness_gap"
    higher_is_better = False

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        """Images (M,3,H,W) and (T,3,H,W) in [0,1], M a multiple of T -> (M,)."""
        known = sharpness(target).repeat_interleave(pred.shape[0] // target.shape[0])
        drawn = sharpness(pred)
        return torch.log(drawn.clamp_min(1e-6) / known.clamp_min(1e-6)).abs().float()


REFEREES: Mapping[str, Callable[[torch.device], Referee]] = {
    SharpnessGap.label: lambda device: SharpnessGap(),
    StLpips.label: StLpips,
}


def load_referees(names: Sequence[str], device: torch.device, dataset: Path | None = None) -> dict[str, Referee]:
    """Label -> referee, for a processed dataset if one is given.

    Shift-tolerant LPIPS is skipped, with a note, if its package is not installed.

    Raises:
        UsageError: no such referee, module or class (as `make_plugin`), or it is not for this dataset.
    """
    loaded: dict[str, Referee] = {}
    for name in names:
        if name not in REFEREES:
            needs = ("label", "higher_is_better", "__call__")
            fix = "a referee has label, higher_is_better and __call__(pred, target)"
            made = make_plugin(name, REFEREES, kind="referee", where="post_train.referees", needs=needs, fix=fix)
        elif name == StLpips.label and find_weights() is None:
            logger.info("%s is not installed and is skipped as a referee: %s", name, EXTRA)
            continue
        else:
            made = REFEREES[name](device)
        if dataset and (check := getattr(made, "check_dataset", None)):
            check(dataset)
        loaded[made.label] = made
    return loaded
