"""Group normalisation and SiLU in two passes over memory through the C++ kernels (`norm.cpp`), forward and backward.

Shapes: x (N, C, ...) with channels last in memory, see `ordered`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import nn

from persistworld_cli.models.cpu.native.build import available
from persistworld_cli.models.cpu.native.calls import LANES, native, operation, plain, pointers, sizes

FEWEST = 2**14  # numbers for which the call is not what takes the time


def ordered(x: torch.Tensor) -> bool:
    """Whether the channels of x (N, C, ...) come last in memory, and everything else in order."""
    return x.movedim(1, -1).is_contiguous()


def fits(x: torch.Tensor, norm: nn.GroupNorm) -> bool:
    """Whether x can go to the kernels; not for trainable weights of the norm, which would get no gradient."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or x.shape[1] % LANES:
        return False
    learns = torch.is_grad_enabled() and norm.weight.requires_grad
    return not learns and x.numel() >= FEWEST and ordered(x) and available()


def affine(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Group normalisation as a factor and an addend (N, C); and the groups' means and 1 / deviations (N, G, 2)."""
    n, channels = x.shape[:2]
    rows = x.numel() // (n * channels)
    kernels = native()
    kernels.pw_norm_chunks.restype = ctypes.c_int64
    scale, shift = torch.empty(n, channels), torch.empty(n, channels)
    stats = torch.empty(n, groups, 2, dtype=torch.float64)
    partial = torch.empty(n, kernels.pw_norm_chunks(*sizes(rows)), 2, channels, dtype=torch.float64)
    kept = (x, plain(weight), plain(bias), scale, shift, stats, partial)
    kernels.pw_norm(
        *pointers(*kept), *sizes(n, rows, channels, groups), ctypes.c_double(eps), int(x.dtype is torch.bfloat16)
    )
    return scale, shift, stats


def norm_silu(x: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """silu(norm(x)), of which `fits` holds, to x's type and layout."""
    out: torch.Tensor = _norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return out


@operation
def _norm_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    n, channels = x.shape[:2]
    out = torch.empty_like(x)
    scale, shift, _ = affine(x, weight, bias, groups, eps)
    count = sizes(n, x.numel() // (n * channels), channels)
    native().pw_activate(*pointers(x, scale, shift, out), *count, int(x.dtype is torch.bfloat16))
    return out


@_norm_silu.register_fake
def _(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return torch.empty_like(x)


def norm_silu_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
) -> torch.Tensor:
    """The gradient to x (N, C, ...) of `norm_silu`, to x's type and layout."""
    n, channels = x.shape[:2]
    rows = x.numel() // (n * channels)
    kernels = native()
    kernels.pw_norm_runs.restype = ctypes.c_int64
    grad = grad.to(x.dtype).movedim(1, -1).contiguous().movedim(-1, 1)
    out = torch.empty_like(x)
    scale, shift, stats = affine(x, weight, bias, groups, eps)
    sums = torch.empty(n, kernels.pw_norm_runs(*sizes(rows)), 2, channels, dtype=torch.float64)
    kept = (x, grad, scale, shift, stats, sums, out)
    kernels.pw_activate_backward(*pointers(*kept), *sizes(n, rows, channels, groups), int(x.dtype is torch.bfloat16))
    return out


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, weight, bias = ctx.saved_tensors
    return norm_silu_backward(grad, x, weight, bias, ctx.groups, ctx.eps), None, None, None, None


_norm_silu.register_autograd(_backward, setup_context=_keep)
