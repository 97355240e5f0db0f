"""Peak signal-to-noise ratio of an image."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

CAP_DB = 100.0  # of identical images, so that means over frames stay finite


def psnr(pred: Tensor, target: Tensor) -> Tensor:
    """PSNR in dB of images (..., C, H, W) in [0, 1], over pixels and channels: (...) float32, at most ``CAP_DB``."""
    return _decibel((pred.double() - target.double()).square().mean(dim=(-3, -2, -1)))


def _decibel(error: Tensor) -> Tensor:
    """Mean squared error -> dB, capped (at an error of 1e-10)."""
    return (-10.0 * torch.log10(error.clamp_min(10.0 ** (-CAP_DB / 10.0)))).float()


class Psnr:
    """`psnr` as a registered reward."""

    label = "psnr"
    unit = "dB"
    higher_is_better = True

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        """Images (M,3,H,W) and (T,3,H,W), M a multiple of T -> (M,) dB."""
        return psnr(pred.unflatten(0, (target.shape[0], -1)), target.unsqueeze(1)).flatten()

    def maps(self, pred: Tensor, target: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mean squared error in each cell of the grid: (M, *grid).

        Not its logarithm: that of a cell without anything in it varies most, and weighs least in the image's PSNR.
        """
        error = (pred.unflatten(0, (target.shape[0], -1)) - target.unsqueeze(1)).square().flatten(0, 1)
        return functional.adaptive_avg_pool2d(error.mean(dim=1, keepdim=True), grid)[:, 0]

    def slope(self, value: Tensor) -> Tensor:
        """Derivative of a PSNR of `value` dB by the mean squared error: -10 / (ln 10 * error)."""
        return -10.0 / (math.log(10.0) * 10.0 ** (-value / 10.0))

    def describe(self) -> dict[str, object]:
        """Exact parameters."""
        return {"label": self.label, "data_range": 1.0, "cap_db": CAP_DB}
