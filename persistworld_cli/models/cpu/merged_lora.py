"""An adapted layer as one product, forward and backward, in float32 on a CPU.

    y = W' x + b,  W' = W + s B A                              LoRA: Hu et al., arXiv 2106.09685, section 4.1
    dx = W'^T dy,  dA = s (B^T dy) x^T,  dB = s dy (A x)^T

W' is small beside the activations and kept from call to call while nothing is written to: the adapter's own passes
over activations are the two that its gradient needs, and the layer itself goes to the same kernels as one without an
adapter. In bfloat16 W' would lose what A and B add to it; there the products stay apart (`lean_lora`).

Shapes: x (..., C), W (C', C), A (r, C), B (C', r); for convolutions x (N, C, H, W) with channels last in memory,
W (C', C, 3, k[, 1]), A (r, C, 3, k[, 1]), B (C', r, 1, 1[, 1]), k 1 or 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from persistworld_cli.models.cpu.linears import product
from persistworld_cli.models.cpu.native import convolve
from persistworld_cli.models.cpu.native import outer as native_outer
from persistworld_cli.models.cpu.native.calls import made_of
from persistworld_cli.models.cpu.native.linear import across

KEPT = 2**20  # numbers of a merged weight: kernels need up to four times as many beside


def exact(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a layer's products are made in float32, on a CPU."""
    both = x.dtype is torch.float32 and weight.dtype is torch.float32
    return both and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


@torch.no_grad()
def merged_weight(own: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """W + s B A, of W's shape and type, and no product of it in autocast's type.

    On a CPU it is kept until one of them is written to, with what kernels made of it, where it is not large.
    """

    def make(down: torch.Tensor) -> torch.Tensor:
        kind = own.device.type
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            return torch.addmm(own.flatten(1), up.flatten(1), down.flatten(1), alpha=scale).view_as(own)

    if own.device.type != "cpu" or own.numel() > KEPT:
        return make(down)
    stamps = (scale, own.data_ptr(), own._version, up.data_ptr(), up._version)
    return made_of(down, ("merged", *stamps), make)


def merged_linear(
    x: torch.Tensor, own: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor, scale: float
) -> torch.Tensor:
    """x W'^T + b; gradients to x, A and B."""
    out: torch.Tensor = _Linear.apply(x, own, bias, down, up, scale)
    return out


def merged_conv(
    x: torch.Tensor, own: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor, scale: float
) -> torch.Tensor:
    """A convolution of stride 1, of which `convolve.fits` holds, by W'; gradients to x, A and B."""
    out: torch.Tensor = _Conv.apply(x, own, bias, down, up, scale)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, own: Any, bias: Any, down: Any, up: Any, scale: float) -> torch.Tensor:
        ctx.save_for_backward(x, own, down, up)
        ctx.scale = scale
        return product(x, merged_weight(own, down, up, scale), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, own, down, up = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, across(merged_weight(own, down, up, ctx.scale)), None)
        rows, given = grad.flatten(0, -2), x.flatten(0, -2)
        of_down = ctx.scale * _outer(product(rows, across(up), None), given)
        return grad_x, None, None, of_down, ctx.scale * _outer(product(given, down, None), rows).t(), None


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, own: Any, bias: Any, down: Any, up: Any, scale: float) -> torch.Tensor:
        ctx.save_for_backward(x, own, down, up)
        ctx.scale = scale
        return convolve.block_conv(x, merged_weight(own, down, up, scale), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, own, down, up = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = convolve.input_gradient(grad, merged_weight(own, down, up, ctx.scale))
        taps = down.detach().flatten(3)
        padding = (1, taps.shape[3] // 2)
        low = convolve.block_conv(x, taps) if convolve.fits(x, taps) else functional.conv2d(x, taps, padding=padding)
        rows = rows_of(grad)
        of_low = ctx.scale * product(rows, up.detach().flatten(1).t().contiguous(), None)
        of_down = _weight_gradient(of_low.view(*grad.movedim(1, -1).shape[:-1], -1), x, taps)
        of_up = ctx.scale * _outer(rows_of(low), rows).t()
        return grad_x, None, None, of_down.view_as(down), of_up.reshape(up.shape), None


def _outer(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """t' x."""
    return native_outer.outer(t, x) if native_outer.fits(t, x) else t.t() @ x


def _weight_gradient(grad: torch.Tensor, x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Of a convolution of x (N, C, H, W) by `taps` (r, C, 3, k), whose result's gradient is (N, H, W, r)."""
    given, size = x.movedim(1, -1), (taps.shape[2], taps.shape[3])
    if native_outer.fits(grad, given):
        return native_outer.conv_weight_gradient(grad, given, size)
    padding = (size[0] // 2, size[1] // 2)
    by_torch: torch.Tensor = torch.ops.aten.convolution_backward(
        grad.movedim(-1, 1), x, taps, None, (1, 1), padding, (1, 1), False, (0, 0), 1, (False, True, False)
    )[1]
    return by_torch


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """(N, C, ...) as (rows, C); a view where channels are last."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])
