"""Convolutions as a CPU computes them fastest, with the same numbers.

`ChannelsLastConv`: with its channels last, an image need not be reordered before and after each convolution; the
shipped VAE decodes 1.5 times as fast in float32 and in bfloat16. The UNet's blocks keep that order (see `lean_blocks`).

`TemporalConv`: the same numbers, faster on a CPU, and safe in bfloat16 there.

The blocks' (3, 1, 1) convolutions mix frames only. torch's CPU kernel for the weight gradient of such a convolution
gives NaN in bfloat16 (seen with torch 2.13); folded to (frames, pixels) it is an ordinary 2-D convolution.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from persistworld_cli.models.cpu.exchange import exchange
from persistworld_cli.models.cpu.native import linear as native_linear
from persistworld_cli.models.cpu.native.convolve import block_conv, fits


class ChannelsLastConv(nn.Conv2d):
    """A Conv2d that on a CPU computes with its channels last in memory."""

    @property
    def same_size(self) -> bool:
        """Whether it is an ordinary 3 x 3 convolution, as ResNet blocks have them."""
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        return geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and self.padding_mode == "zeros"

    @property
    def of_pixels(self) -> bool:
        """Whether it is a linear layer for each pixel."""
        geometry = (self.kernel_size, self.stride, self.padding, self.groups)
        return geometry == ((1, 1), (1, 1), (0, 0), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, C', H', W')."""
        return self.compute(x, self.weight)

    def compute(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The same with another weight in this one's place."""
        if self.same_size and _kernel_fits(x, weight):
            out: torch.Tensor = block_conv(x, weight, self.bias)
            return out
        if self.of_pixels and native_linear.fits(rows := x.movedim(1, -1), flat := weight.flatten(1)):
            return native_linear.linear(rows, flat, self.bias).movedim(-1, 1)
        ordered = x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x
        return self._conv_forward(ordered, weight, self.bias)


def _kernel_fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.dtype is torch.float32 and not torch.is_autocast_enabled("cpu") and fits(x, weight)


def put_channels_last(module: nn.Module) -> None:
    """Let every Conv2d of `module` compute as a `ChannelsLastConv`; weights, their layout and names stay."""
    exchange(module, {nn.Conv2d: ChannelsLastConv})


class TemporalConv(nn.Conv3d):
    """A Conv3d of kernel (k, 1, 1), stride 1, computed over (B, C, T, H * W)."""

    @property
    def same_size(self) -> bool:
        """Whether it is an ordinary one over three frames, as ResNet blocks have them."""
        return self.kernel_size[0] == 3 and self.padding == (1, 0, 0) and self.dilation[0] == self.groups == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) to (B, C', T, H, W); images may be given as one row, (B, C, T, H * W)."""
        return self.compute(x, self.weight)

    def compute(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The same with another weight in this one's place."""
        rows = x.flatten(3)
        if self.same_size and _kernel_fits(rows, weight):
            folded = block_conv(rows, weight, self.bias)
        else:
            folded = functional.conv2d(rows, weight.squeeze(-1), self.bias, padding=(int(self.padding[0]), 0))
        return folded if x.ndim == 4 else folded.unflatten(3, x.shape[3:])


def fold_temporal_convs(module: nn.Module) -> None:
    """Let every fitting Conv3d of `module` compute as a `TemporalConv`; weights and their names stay."""
    for child in module.modules():
        if type(child) is nn.Conv3d and child.kernel_size[1:] == (1, 1) and child.stride == (1, 1, 1):
            child.__class__ = TemporalConv
