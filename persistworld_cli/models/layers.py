"""What this model changes in diffusers' layers: group sizes of the norms, and convolutions over frames."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def set_norm_groups(module: nn.Module, groups: int) -> None:
    """Set every GroupNorm of `module` to `groups` groups, which must divide its channels.

    diffusers' blocks fix 32 groups: 10 channels per group at SVD's 320. At 32 channels each group is one channel, and
    every norm then removes an image's mean and contrast from each channel: a small model with 32 groups cannot keep
    colours or copy a still background, however long it trains (measured: presets/tiny/README.md). Fewer groups at small
    widths keep the full-size model's proportion; weights and their names do not change.
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.GroupNorm):
            if child.num_channels % groups:
                raise ValueError(f"{name}: {child.num_channels} channels in {groups} groups")
            child.num_groups = groups


class TemporalConv(nn.Conv3d):
    """A Conv3d of kernel (k, 1, 1), stride 1, computed in two dimensions: (B, C, T, H, W) or (B, C, T, H * W).

    torch's CPU kernel for the weight gradient of the three-dimensional one gives NaN in bfloat16 (torch 2.13).
    """

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = functional.conv2d(x.flatten(3), weight.squeeze(-1), bias, padding=(int(self.padding[0]), 0))
        return out if x.ndim == 4 else out.unflatten(3, x.shape[3:])


def fold_temporal_convs(module: nn.Module) -> None:
    """Turn every suitable Conv3d of `module` into a `TemporalConv`; weights and their names do not change."""
    for child in module.modules():
        if type(child) is nn.Conv3d and child.kernel_size[1:] == (1, 1) and child.stride == (1, 1, 1):
            child.__class__ = TemporalConv
