"""value * gelu(gate) in one pass over memory through the C++ kernels (`gate.cpp`), forward and backward."""

from __future__ import annotations

from typing import Any

import torch

from persistworld_cli.models.cpu.native.build import available
from persistworld_cli.models.cpu.native.calls import LANES, native, operation, pointers, sizes

FEWEST = 2**17  # numbers for which the call is not what takes the time


def fits(both: torch.Tensor) -> bool:
    """Whether values and gates (..., 2 hidden) can go to the kernel."""
    if both.device.type != "cpu" or both.dtype not in (torch.float32, torch.bfloat16):
        return False
    return both.shape[-1] % (2 * LANES) == 0 and both.numel() >= FEWEST and available()


@operation
def gate(both: torch.Tensor) -> torch.Tensor:
    """value gelu(gate), of which `fits` holds, where (..., 2 hidden) are the values, then the gates."""
    both = both.contiguous()
    hidden = both.shape[-1] // 2
    out = both.new_empty(*both.shape[:-1], hidden)
    count = sizes(out.numel() // hidden, hidden)
    native().pw_gate(*pointers(both, None, out), *count, int(both.dtype is torch.bfloat16))
    return out


@gate.register_fake
def _(both: torch.Tensor) -> torch.Tensor:
    return both.new_empty(*both.shape[:-1], both.shape[-1] // 2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    (both,) = ctx.saved_tensors
    both, grad = both.contiguous(), grad.to(both.dtype).contiguous()
    out = torch.empty_like(both)
    count = sizes(grad.numel() // grad.shape[-1], grad.shape[-1])
    native().pw_gate_backward(*pointers(both, None, grad, out), *count, int(both.dtype is torch.bfloat16))
    return out


gate.register_autograd(_backward, setup_context=_keep)
