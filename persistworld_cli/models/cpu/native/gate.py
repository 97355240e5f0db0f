"""value * gelu(gate) in one pass over memory through the C++ kernels (`gate.cpp`), forward and backward."""

from __future__ import annotations

from typing import Any

import torch

from persistworld_cli.models.cpu.native.build import available
from persistworld_cli.models.cpu.native.calls import LANES, native, operation, plain, pointers, sizes

FEWEST = 2**14  # numbers for which the call is not what takes the time


def fits(x: torch.Tensor, bias: torch.Tensor) -> bool:
    """Whether values and gates made of x (..., C) can go to the kernel; not where their bias (2 hidden,) learns, for
    which there is no gradient.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    learns = torch.is_grad_enabled() and bias.requires_grad
    return not learns and len(bias) % (2 * LANES) == 0 and x.numel() >= FEWEST and available()


@operation
def gate(both: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """value gelu(gate), of which `fits` holds, where (..., 2 hidden) + bias are the values, then the gates."""
    both = both.contiguous()
    hidden = both.shape[-1] // 2
    out = both.new_empty(*both.shape[:-1], hidden)
    count = sizes(out.numel() // hidden, hidden)
    kept = (both, plain(bias), out)
    native().pw_gate(*pointers(*kept), *count, int(both.dtype is torch.bfloat16))
    return out


@gate.register_fake
def _(both: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return both.new_empty(*both.shape[:-1], both.shape[-1] // 2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    both, bias = ctx.saved_tensors
    both, grad = both.contiguous(), grad.to(both.dtype).contiguous()
    out = torch.empty_like(both)
    count = sizes(grad.numel() // grad.shape[-1], grad.shape[-1])
    kept = (both, plain(bias), grad, out)
    native().pw_gate_backward(*pointers(*kept), *count, int(both.dtype is torch.bfloat16))
    return out, None


gate.register_autograd(_backward, setup_context=_keep)
