"""The rewards by name: one file and one line here for each.

A metric scores images one by one; which of them make the reward, and with what weight, is a setting
(``rewards.weights``). Lower-is-better metrics simply carry a negative weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from persistworld_cli.config.settings import RewardSettings
from persistworld_cli.metrics.lpips import Lpips
from persistworld_cli.metrics.psnr import Psnr
from persistworld_cli.metrics.ssim import Ssim


class Metric(Protocol):
    """What a registered reward must be.

    Attributes:
        label: the name that every table, JSON and plot shows.
        unit: the unit after a number ("dB"), or "".
        higher_is_better: which way is good, for win rates and for the arrows in tables.
    """

    label: str
    unit: str
    higher_is_better: bool

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        """Images (M,3,H,W) against (T,3,H,W), both in [0,1], M a multiple of T -> (M,) float32.

        Target t belongs to the images t*M/T .. (t+1)*M/T - 1 (candidates of one recording share it).
        """
        ...

    def maps(self, pred: Tensor, target: Tensor, grid: tuple[int, int]) -> Tensor:
        """The same in each cell of a grid of rows x columns: (M, rows, columns) float32, for credit by place.

        Its mean over the cells need not be the image's value (PSNR is a logarithm); where a metric knows no places,
        every cell gets the image's.
        """
        ...

    def describe(self) -> dict[str, object]:
        """Everything that two results must share to be comparable (goes into the JSON)."""
        ...


REWARDS: dict[str, Callable[[RewardSettings, torch.device], Metric]] = {
    "lpips": Lpips.from_settings,
    "ssim": lambda settings, device: Ssim(),
    "psnr": lambda settings, device: Psnr(),
}
