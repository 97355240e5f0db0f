"""Temporal convolutions as two-dimensional ones: the same numbers, faster on a CPU, and safe in bfloat16 there.

The blocks' (3, 1, 1) convolutions mix frames only. torch's CPU kernel for the weight gradient of such a convolution
gives NaN in bfloat16 (seen with torch 2.13); folded to (frames, pixels) it is an ordinary 2-D convolution.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class TemporalConv(nn.Conv3d):
    """A Conv3d of kernel (k, 1, 1), stride 1, computed over (B, C, T, H * W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) to (B, C', T, H, W)."""
        folded = functional.conv2d(x.flatten(3), self.weight.squeeze(-1), self.bias, padding=(int(self.padding[0]), 0))
        return folded.unflatten(3, x.shape[3:])


def fold_temporal_convs(module: nn.Module) -> None:
    """Let every fitting Conv3d of `module` compute as a `TemporalConv`; weights and their names stay."""
    for child in module.modules():
        if type(child) is nn.Conv3d and child.kernel_size[1:] == (1, 1) and child.stride == (1, 1, 1):
            child.__class__ = TemporalConv
