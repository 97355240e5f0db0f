"""Linear layers as a CPU computes them fastest in float32, with the same numbers (to rounding).

torch gives float32 products to MKL, which on AMD's processors uses half of what they can do: 160 to 200 GFLOP/s on two
cores of an EPYC where oneDNN, which torch uses for convolutions, reaches 300 to 440 (any shape of the tiny preset; n 40
calls each). A linear layer is a 1 x 1 convolution over its rows, and its layout is that of channels last, so nothing is
moved to call it one. In bfloat16 torch uses oneDNN anyway.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from persistworld_cli.models.exchange import exchange

FEW = 128  # rows for which the call itself is what takes the time


def onednn_is_faster() -> bool:
    """Whether this processor's float32 products are better given to oneDNN."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


class ConvLinear(nn.Linear):
    """A Linear that on a CPU in float32 computes as a 1 x 1 convolution over its rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) to (..., C')."""
        return self.compute(x, self.weight)

    def compute(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The same with another weight in this one's place."""
        small = torch.is_autocast_enabled("cpu") or x.dtype is not torch.float32 or x.device.type != "cpu"
        # a convolution keeps its input for the backward pass even where its weights are frozen; a Linear does not
        frozen = torch.is_grad_enabled() and not weight.requires_grad
        if small or frozen or x.numel() < FEW * self.in_features:
            return functional.linear(x, weight, self.bias)
        rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, C, rows, 1), channels last
        out = functional.conv2d(rows, weight[:, :, None, None], self.bias)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def linears_as_convolutions(module: nn.Module) -> None:
    """Let every Linear of `module` compute as a `ConvLinear` where that is faster; weights and names stay."""
    if onednn_is_faster():
        exchange(module, {nn.Linear: ConvLinear})
