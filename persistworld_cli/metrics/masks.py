"""Masks of the pixels that matter: what moved in the recording, and the saturated colours of its objects.

A table fills most of an image, so means over pixels hide a lost block. Masks come from the *recording* only, so every
model is scored on the same pixels.

Shape legend: N frames, V cameras, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from persistworld_cli.metrics.ssim import WINDOW, ssim_map

MOTION = 0.08  # of the full range: above video compression noise, below a block's contrast with the table
BLUR = 3  # side in pixels of the square that averages a difference before it is compared with MOTION
MOVING_SMALLEST = 8  # pixels: fewer say nothing about an image
SATURATION = 0.5  # recorded pixels at least as colourful as this count as coloured
VALUE = 0.15  # below it hue is noise
SATURATION_OF_OBJECT = 0.65  # with known object colours: at least this part of the object's own saturation
HUE_OF_OBJECT = 20.0  # degrees from a known object's hue: shading and light change it by less


def moving_mask(frames: Tensor, start: Tensor, *, threshold: float = MOTION) -> Tensor:
    """Pixels that differ from the rollout's first frame: the arm, what it moved, and what that uncovered.

    The difference is averaged over 3x3 pixels first, so that single noisy pixels do not count.

    Args:
        frames: (..., 3, H, W) recorded images in [0, 1].
        start: (..., 3, H, W), broadcast against ``frames``: the image at the rollout's start.
        threshold: of the largest channel's difference.

    Returns:
        bool (..., H, W).
    """
    gap = (frames - start).abs().amax(dim=-3)
    smooth = functional.avg_pool2d(
        gap.flatten(0, -3)[:, None], BLUR, stride=1, padding=BLUR // 2, count_include_pad=False
    )
    return (smooth[:, 0] > threshold).view(gap.shape)


def masked_psnr(pred: Tensor, target: Tensor, mask: Tensor, *, smallest: int = MOVING_SMALLEST) -> Tensor:
    """PSNR in dB (data range 1, at most 100) over masked pixels only.

    Args:
        pred, target: (..., 3, H, W) in [0, 1].
        mask: bool (..., H, W).
        smallest: fewer masked pixels than this give NaN: nothing moved.

    Returns:
        (...) float32.
    """
    error = (pred.double() - target.double()).square().mean(dim=-3)
    count = mask.sum(dim=(-2, -1))
    mean = (error * mask).sum(dim=(-2, -1)) / count.clamp_min(1)
    value = -10.0 * torch.log10(mean.clamp_min(1e-10))
    return torch.where(count >= smallest, value, torch.nan).float()


def masked_ssim(pred: Tensor, target: Tensor, mask: Tensor, *, smallest: int = MOVING_SMALLEST) -> Tensor:
    """SSIM (`metrics.ssim`) averaged over the windows whose middle pixel is masked.

    Args:
        pred, target: (B, ..., 3, H, W) in [0, 1].
        mask: bool (B, ..., H, W).
        smallest: fewer such windows than this give NaN.

    Returns:
        (B, ...) float32.
    """
    edge = WINDOW // 2
    inner = mask[..., edge:-edge, edge:-edge]
    count = inner.sum(dim=(-2, -1))
    total = torch.zeros(count.shape, dtype=torch.float64, device=pred.device)
    for row in range(pred.shape[0]):  # the maps are large
        maps = ssim_map(pred[row].flatten(0, -4), target[row].flatten(0, -4)).mean(dim=1)
        total[row] = (maps.view(inner[row].shape) * inner[row]).sum(dim=(-2, -1))
    return torch.where(count >= smallest, total / count.clamp_min(1), torch.nan).float()


def hsv(rgb: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Hue in degrees [0, 360), saturation and value in [0, 1] of RGB (..., 3) in [0, 1]. Greys have hue 0."""
    pixels = np.asarray(rgb, dtype=np.float64)
    value = pixels.max(axis=-1)
    chroma = value - pixels.min(axis=-1)
    safe = np.where(chroma > 0, chroma, 1.0)
    red, green, blue = np.moveaxis(pixels, -1, 0)
    sector = np.select(
        [value == red, value == green], [(green - blue) / safe, (blue - red) / safe + 2.0], (red - green) / safe + 4.0
    )
    hue = np.where(chroma > 0, (60.0 * sector) % 360.0, 0.0)
    return hue, np.where(value > 0, chroma / np.where(value > 0, value, 1.0), 0.0), value


def hue_distance(a: NDArray[np.float64], b: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Distance around the colour wheel in degrees, 0 .. 180."""
    return np.abs((a - b + 180.0) % 360.0 - 180.0)


def object_mask(frames: NDArray[np.uint8], colours: Sequence[Sequence[float]] | None = None) -> NDArray[np.bool_]:
    """Saturated coloured pixels of recorded images.

    Without ``colours`` every pixel with saturation >= 0.5 and value >= 0.15 counts; a wooden table may be among them.
    With ``colours`` (RGB in [0, 1], ``objects[].rgb`` of the bundled world's ``meta/episodes.jsonl``) a pixel must also
    lie within 20 degrees of one of their hues and have 0.65 of that colour's saturation (shading scales all channels
    alike and changes neither; a wooden table is less saturated).

    Args:
        frames: uint8 (..., 3).
        colours: the episode's object colours, or None.

    Returns:
        bool, ``frames.shape[:-1]``.
    """
    hue, saturation, value = hsv(frames.astype(np.float64) / 255.0)
    coloured = (saturation >= SATURATION) & (value >= VALUE)
    if colours is None:
        return coloured
    near = np.zeros_like(coloured)
    for colour in colours:
        own_hue, own_saturation, _ = (float(part) for part in hsv(np.asarray(colour, dtype=np.float64)))
        near |= (hue_distance(hue, own_hue) <= HUE_OF_OBJECT) & (saturation >= SATURATION_OF_OBJECT * own_saturation)
    return coloured & near
