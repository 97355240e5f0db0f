"""A linear layer in float32 through the C++ kernel (`linear.cpp`).

For processors with AVX2 and no AVX-512: torch's products of the tiny preset's shapes reach 60 to 120 GFLOP/s on two
cores of an EPYC of that kind, this kernel 130 to 190.
"""

from __future__ import annotations

from typing import Any

import torch

from persistworld_cli.models.cpu.native.build import available
from persistworld_cli.models.cpu.native.calls import (
    LANES,
    derived,
    native,
    operation,
    packed,
    plain,
    pointers,
    require_channels,
    sizes,
)

FEWEST = 128  # rows for which the call is not what takes the time


@torch.compiler.assume_constant_result
def wanted() -> bool:
    """Whether the processor has AVX2 and no AVX-512."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x (..., C) times a weight (C', C) can go to the kernel; not for a trainable weight."""
    if x.device.type != "cpu" or x.dtype is not torch.float32 or weight.dtype is not x.dtype:
        return False
    if torch.is_autocast_enabled("cpu") or (torch.is_grad_enabled() and weight.requires_grad):
        return False
    fit = all(n % LANES == 0 for n in weight.shape) and x.numel() >= FEWEST * weight.shape[1]
    return fit and wanted() and available()


@operation
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W' + bias, of which `fits` holds.

    Args:
        x: (..., C).
        weight: (C', C).
        bias: (C',).

    Returns:
        (..., C').
    """
    require_channels(weight, x.shape[-1])
    rows = x.contiguous()
    wide, width = weight.shape
    out = torch.empty(*x.shape[:-1], wide)
    kept = (rows, packed(weight, "linear", wide * width, "pw_pack_linear", *sizes(wide, width)), plain(bias), out)
    native().pw_linear(*pointers(*kept), *sizes(rows.numel() // width, width, wide))
    return out


@linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def transposed(weight: torch.Tensor) -> torch.Tensor:
    """W' in row order, cached with W."""
    return derived(weight, "transposed", lambda w: w.detach().t().contiguous())


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """To x; everything else is frozen."""
    return linear(grad, transposed(ctx.saved_tensors[0]), None), None, None


linear.register_autograd(_backward, setup_context=_keep)
