"""Rewards by name: one file and one line here for each, or the user's own class.

A metric scores single images; ``rewards.weights`` sets which ones make the reward, and their weights (negative for
lower-is-better metrics). The user's own class, given as ``module:Class``, subclasses `Metric` (docs/python.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from persistworld_cli.config.plugins import make_plugin
from persistworld_cli.config.settings import RewardSettings
from persistworld_cli.errors import UsageError
from persistworld_cli.metrics.lpips import Lpips
from persistworld_cli.metrics.psnr import Psnr
from persistworld_cli.metrics.ssim import Ssim

_LABEL = re.compile(r"[A-Za-z][\w.-]{0,39}")  # it is a key of JSON, a name in logs and a column of tables
_TAKEN = ("reward", "psnr_moving")  # other keys of results


class Metric(Protocol):
    """Interface of a reward. The user's own class is created without arguments and needs `label`, `higher_is_better`
    and `__call__`.

    Attributes:
        label: its name in tables, JSON and plots.
        unit: of its numbers ("dB"), or "".
        higher_is_better: direction of improvement, for win rates and arrows in tables.
    """

    label: str
    unit: str = ""
    higher_is_better: bool

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        """Images (M,3,H,W) against (T,3,H,W), both in [0,1], M a multiple of T -> (M,) float32, finite.

        Target t belongs to the images t*M/T .. (t+1)*M/T - 1 (candidates of one recording share it). There is
        no gradient; both are on the device of the run.
        """
        ...

    def maps(self, pred: Tensor, target: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the metric is a function of, in each cell of a grid: (M, rows, columns) float32, for credit per patch.

        The image's value is a function of the mean over the cells, and `slope` its derivative. Here every cell has the
        image's value, for metrics without places.
        """
        return self(pred, target)[:, None, None].expand(-1, *grid)

    def slope(self, value: Tensor) -> Tensor:
        """Derivative of the image's value by the mean over the cells of its `maps`, where it has this value."""
        return torch.ones_like(value)

    def describe(self) -> dict[str, object]:
        """Everything that two results must share to be comparable; stored in the JSON."""
        return {"label": self.label, "class": f"{type(self).__module__}:{type(self).__qualname__}"}


REWARDS: dict[str, Callable[[RewardSettings, torch.device], Metric]] = {
    "lpips": Lpips.from_settings,
    "ssim": lambda settings, device: Ssim(),
    "psnr": lambda settings, device: Psnr(),
}


def make_reward(name: str, settings: RewardSettings, device: torch.device) -> tuple[str, Metric]:
    """A reward and its key in results: its name in `REWARDS`, or the label of a class ``module:Class``.

    Raises:
        UsageError: as `make_plugin`, or a label that is taken or invalid.
    """
    if name in REWARDS:
        return name, REWARDS[name](settings, device)
    where = "rewards.weights"
    fix = "subclass persistworld_cli.metrics.registry.Metric with label, higher_is_better and __call__(pred, target)"
    needs = ("label", "unit", "higher_is_better", "__call__", "maps", "slope", "describe")
    metric: Metric = make_plugin(name, REWARDS, kind="reward", where=where, needs=needs, fix=fix)
    label = str(metric.label)
    if label in (*REWARDS, *_TAKEN) or not _LABEL.fullmatch(label):
        fix = "take letters, digits, '_', '-' and '.', at most 40, and another name than " + ", ".join(
            (*REWARDS, *_TAKEN)
        )
        raise UsageError(f"the reward '{name}' has the label '{label}'", where=where, fix=fix)
    return label, metric
