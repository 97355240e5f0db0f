"""Referees: metrics that have no weight in the reward, and are watched while it rises.

What a reward pays for, training finds, by fair means or not: blur under a distance of pixels, a lost object in an image
that is mostly table. A referee that the reward does not hold tells the two apart. To add one, write a class like
`SharpnessGap` and add a line to `REFEREES`, or name your own as ``module:Class`` in ``post_train.referees``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from persistworld_cli.config.plugins import make_plugin
from persistworld_cli.metrics.sharpness import SharpnessGap
from persistworld_cli.metrics.st_lpips import EXTRA, StLpips, find_weights

logger = logging.getLogger(__name__)


class Referee(Protocol):
    """What a referee must be.

    Attributes:
        label: its name in logs; metrics.jsonl has it as ``val_LABEL``.
        higher_is_better: which way is good.
    """

    label: str
    higher_is_better: bool

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        """Images (M,3,H,W) against the record's (T,3,H,W), as of `registry.Metric` -> (M,) float32, finite."""
        ...


REFEREES: Mapping[str, Callable[[torch.device], Referee]] = {
    SharpnessGap.label: lambda device: SharpnessGap(),
    StLpips.label: StLpips,
}


def load_referees(names: Sequence[str], device: torch.device) -> dict[str, Referee]:
    """Label -> referee. Shift-tolerant LPIPS is left out, and said to be, where its package is not installed.

    Raises:
        UsageError: no such referee, module or class (as `make_plugin`).
    """
    loaded: dict[str, Referee] = {}
    for name in names:
        if name not in REFEREES:
            needs = ("label", "higher_is_better", "__call__")
            fix = "a referee has label, higher_is_better and __call__(pred, target)"
            made = make_plugin(name, REFEREES, kind="referee", where="post_train.referees", needs=needs, fix=fix)
        elif name == StLpips.label and find_weights() is None:
            logger.info("%s is not installed, and is no referee of this run: %s", name, EXTRA)
            continue
        else:
            made = REFEREES[name](device)
        loaded[made.label] = made
    return loaded
