"""How far a predicted image's sharpness is from the record's: blur and noise both count."""

from __future__ import annotations

import torch
from torch import Tensor


def sharpness(images: Tensor) -> Tensor:
    """Root mean square difference of neighbouring pixels: (..., 3, H, W) -> (...).

    Squared, since an edge that is blurred has the same sum of absolute differences as before.
    """
    axes = (-3, -2, -1)
    return (images.diff(dim=-1).square().mean(dim=axes) + images.diff(dim=-2).square().mean(dim=axes)).sqrt()


class SharpnessGap:
    """|ln(sharpness / the record's sharpness)| as a referee: 0 for as sharp as the record, larger is worse."""

    label = "sharpness_gap"
    higher_is_better = False

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        """Images (M,3,H,W) and (T,3,H,W) in [0,1], M a multiple of T -> (M,)."""
        known = sharpness(target).repeat_interleave(pred.shape[0] // target.shape[0])
        drawn = sharpness(pred)
        return torch.log(drawn.clamp_min(1e-6) / known.clamp_min(1e-6)).abs().float()
