"""Self-attention over short sequences through the C++ kernel (`attention.cpp`), without gradients."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from persistworld_cli.models.cpu.native.build import available
from persistworld_cli.models.cpu.native.calls import LANES, native, operation, pointer

SHORT = 256  # tokens, whose weights for some queries stay in the first cache


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("outer", "outer_step", "inner", "inner_step")),
        *((name, ctypes.c_int64) for name in ("tokens", "token_step", "heads", "width")),
        ("scale", ctypes.c_float),
    ]


def fits(x: torch.Tensor, heads: int) -> bool:
    """Whether queries of x's shape, (N, tokens, C) or (B, T, S, C), can go to the kernel."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    return x.shape[-1] % (heads * LANES) == 0 and x.shape[1] <= SHORT and available()


@operation
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    """softmax(scale q k') v for every head, of which `fits` holds.

    Args:
        q, k, v: (N, tokens, C), or (B, T, S, C) where every pixel S attends over its frames T; of one type.
        heads: C = heads x width.
        scale: of the products.

    Returns:
        As q.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    items, tokens, width = q.shape[0], q.shape[1], q.shape[-1]
    pixels = q.shape[2] if q.ndim == 4 else 1
    steps = (items, tokens * pixels * width, pixels, width, tokens, pixels * width)
    call = _Call(*(pointer(t) for t in (q, k, v, out)), *steps, heads, width // heads, scale)
    native().pw_attend(ctypes.byref(call), int(q.dtype is torch.bfloat16))
    return out


@attend.register_fake
def _(q: torch.Tensor, *args: Any) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
