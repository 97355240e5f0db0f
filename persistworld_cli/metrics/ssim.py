"""Structural similarity, by scikit-image's definition, for a batch of images on their device.

`skimage.metrics.structural_similarity(a, b, channel_axis=..., data_range=1)`: a uniform 7x7 window, sample
covariances (N/(N-1)), K1 0.01, K2 0.03, the map cropped by the window's radius, its mean over pixels and
channels. (Wang et al. 2004 use a Gaussian window; papers on robot world models report scikit-image's default.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from persistworld_cli.errors import PersistWorldError

WINDOW = 7
K1, K2 = 0.01, 0.03
CHUNK = {"cpu": 1 << 17, "cuda": 1 << 24}  # numbers at a time: twice as fast within a CPU's cache


def _sums(x: Tensor, dim: int, window: int) -> Tensor:
    """Sum over every whole window along one dimension, by halving: six times as fast as pooling."""
    if window == 1:
        return x
    half, count = window // 2, x.shape[dim] - window + 1
    halves = _sums(x, dim, half)
    both = halves.narrow(dim, 0, count) + halves.narrow(dim, half, count)
    return both.add_(x.narrow(dim, window - 1, count)) if window % 2 else both


def _box(image: Tensor, window: int) -> Tensor:
    """Mean over every whole window: rows, then columns (a box filter is separable). (M,C,H,W) -> (M,C,H-w+1,W-w+1)."""
    return _sums(_sums(image, -2, window), -1, window) / window**2


def ssim_map(pred: Tensor, target: Tensor, *, window: int = WINDOW) -> Tensor:
    """SSIM of every whole window of images in [0, 1].

    Computed in float64: variances are differences of nearly equal numbers, and C2 = 9e-4 magnifies their error.

    Args:
        pred: (M, C, H, W), M a multiple of T.
        target: (T, C, H, W); target t belongs to the M/T consecutive images from t*M/T.
        window: odd side of the window in pixels.

    Returns:
        (M, C, H - window + 1, W - window + 1) float64.

    Raises:
        PersistWorldError: an image smaller than the window.
    """
    if min(pred.shape[-2:]) < window:
        raise PersistWorldError(
            f"SSIM needs images of at least {window}x{window} pixels, got {pred.shape[-2]}x{pred.shape[-1]}",
            where="world.height, world.width",
            fix="use larger images",
        )
    share = pred.shape[0] // target.shape[0]
    x, y = pred.double(), target.double()
    unbias = window**2 / (window**2 - 1)
    mean_x, mean_y = _box(x, window), _box(y, window)
    var_x = unbias * (_box(x * x, window) - mean_x * mean_x)
    var_y = unbias * (_box(y * y, window) - mean_y * mean_y)
    if share > 1:
        y, mean_y, var_y = (part.repeat_interleave(share, 0) for part in (y, mean_y, var_y))
    cov = unbias * (_box(x * y, window) - mean_x * mean_y)
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    return luminance * structure


def ssim(pred: Tensor, target: Tensor, *, window: int = WINDOW) -> Tensor:
    """SSIM of whole images, the mean of `ssim_map`: (M,) float32."""
    return ssim_map(pred, target, window=window).mean(dim=(-3, -2, -1)).to(torch.float32)


class Ssim:
    """`ssim` as a registered reward."""

    label = "ssim"
    unit = ""
    higher_is_better = True

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        """Images (M,3,H,W) and (T,3,H,W), M a multiple of T -> (M,)."""
        return torch.cat([ssim(drawn, known) for drawn, known in self._parts(pred, target)])

    def maps(self, pred: Tensor, target: Tensor, grid: tuple[int, int]) -> Tensor:
        """As `__call__`, of each cell of the grid: (M, *grid)."""
        maps = (ssim_map(drawn, known).mean(dim=1) for drawn, known in self._parts(pred, target))
        return torch.cat([functional.adaptive_avg_pool2d(part, grid).to(torch.float32) for part in maps])

    def slope(self, value: Tensor) -> Tensor:
        """As `registry.Metric`: an image's value is the mean over its cells."""
        return torch.ones_like(value)

    def _parts(self, pred: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """A few images at a time: the maps are large."""
        share = pred.shape[0] // target.shape[0]
        per = max(1, CHUNK[pred.device.type] // (share * pred[0].numel()))
        return zip(pred.split(per * share), target.split(per), strict=True)

    def describe(self) -> dict[str, object]:
        """Exact parameters."""
        return {"label": self.label, "window": WINDOW, "filter": "uniform", "k1": K1, "k2": K2, "data_range": 1.0}
