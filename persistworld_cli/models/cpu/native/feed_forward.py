"""A transformer's gated feed-forward block through the C++ kernel (`feed_forward.cpp`), without gradients."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from persistworld_cli.models.cpu.native.build import available
from persistworld_cli.models.cpu.native.calls import LANES, native, operation, packed, plain, pointer, sizes

FEWEST = 128  # rows for which the call is not what takes the time
UNITS = 64  # hidden units at a time: their number must be a multiple
MOST = 512  # channels


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "norm_weight", "norm_bias", "w1", "b1", "w2", "b2", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "hidden", "width_out", "residual")),
        ("eps", ctypes.c_double),
    ]


def fits(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> bool:
    """Whether x (..., C) with weights (2 hidden, C) and (C', hidden) can go to the kernel."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype is not torch.float32:
        return False
    wide = all(n % LANES == 0 and n <= MOST for n in (x.shape[-1], w2.shape[0])) and w2.shape[1] % UNITS == 0
    paired = w1.dtype is x.dtype and tuple(w1.shape) == (2 * w2.shape[1], x.shape[-1])
    enough = x.numel() >= FEWEST * x.shape[-1] and not torch.is_autocast_enabled("cpu")
    return wide and paired and enough and available()


@operation
def feed_forward(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    residual: bool,
) -> torch.Tensor:
    """[x +] W2 (value gelu(gate)) + b2 with [value, gate] = W1 layer_norm(x) + b1, of which `fits` holds.

    Args:
        x: (..., C).
        norm_weight, norm_bias: (C,).
        eps: of the norm.
        w1, b1: (2 hidden, C), (2 hidden,); w2, b2: (C', hidden), (C',).
        residual: whether x is added; then C' = C.

    Returns:
        (..., C').
    """
    rows = x.contiguous()
    width, (wide, hidden) = x.shape[-1], w2.shape
    out = torch.empty(*x.shape[:-1], wide)
    first = packed(w1, "gated", w1.numel(), "pw_pack_gated", *sizes(hidden, width))
    second = packed(w2, "out", w2.numel(), "pw_pack_out", *sizes(wide, hidden))
    kept = (rows, plain(norm_weight), plain(norm_bias), first, plain(b1), second, plain(b2), out)
    call = _Call(*(pointer(t) for t in kept), rows.numel() // width, width, hidden, wide, int(residual), eps)
    native().pw_feed_forward(ctypes.byref(call))
    return out


@feed_forward.register_fake
def _(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], args[5].shape[0])
