"""Linear layers as a CPU computes them fastest in float32, with the same numbers (to rounding).

torch gives float32 products to MKL, which on AMD's processors uses half of what they can do. With AVX-512 it is 160 to
200 GFLOP/s on two cores of an EPYC where oneDNN, which torch uses for convolutions, reaches 300 to 440 (any shape of
the tiny preset; n 40 calls each): there a linear layer is a 1 x 1 convolution over its rows, whose layout is that of
channels last, so nothing is moved to call it one. With AVX2 alone oneDNN is no faster, and the kernel of
`native.linear` is. In bfloat16 torch uses oneDNN anyway.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from persistworld_cli.models.cpu.exchange import exchange
from persistworld_cli.models.cpu.native import linear as native_linear

FEW = 128  # rows for which the call itself is what takes the time


@torch.compiler.assume_constant_result
def onednn_is_faster() -> bool:
    """Whether this processor's float32 products are better given to oneDNN."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W' + bias: (..., C) by (C', C) to (..., C')."""
    if native_linear.fits(x, weight):
        own: torch.Tensor = native_linear.linear(x, weight, bias)
        return own
    small = torch.is_autocast_enabled("cpu") or x.dtype is not torch.float32 or x.device.type != "cpu"
    # a convolution keeps its input for the backward pass even where its weights are frozen; a Linear does not
    frozen = torch.is_grad_enabled() and not weight.requires_grad
    if small or frozen or x.numel() < FEW * weight.shape[1] or not onednn_is_faster():
        return functional.linear(x, weight, bias)
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, C, rows, 1), channels last
    out = functional.conv2d(rows, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class FastLinear(nn.Linear):
    """A Linear that computes as `product` does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) to (..., C')."""
        return product(x, self.weight, self.bias)

    def compute(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The same with another weight in this one's place."""
        return product(x, weight, self.bias)


def make_linears_fast(module: nn.Module) -> None:
    """Let every Linear of `module` compute as a `FastLinear`; weights and names stay."""
    exchange(module, {nn.Linear: FastLinear})
