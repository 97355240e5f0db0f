"""Sums of outer products through the C++ kernel (`outer.cpp`): the gradient of an adapter's small weights.

torch's products of such shapes, 16 rows and tens of thousands of terms, reach 40 to 60 GFLOP/s on two cores of an EPYC
with AVX2; the same holds for its gradient of a convolution's weight.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from persistworld_cli.models.cpu.native.build import available
from persistworld_cli.models.cpu.native.calls import LANES, native, pointer

FEWEST = 256  # pixels for which the call is not what takes the time


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("t", "x", "out")),
        *((name, ctypes.c_int64) for name in ("n", "h", "w", "rank", "width", "down", "across", "threads")),
    ]


def fits(t: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether t (..., r) and x (..., C) can go to the kernel."""
    usual = all(y.device.type == "cpu" and y.dtype is torch.float32 for y in (t, x))
    return usual and x.shape[-1] % LANES == 0 and x.numel() >= FEWEST * x.shape[-1] and available()


def outer(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """t' x: (rows, r), (rows, C), of which `fits` holds, to (r, C)."""
    return _sum(t, x, (1, 1, len(t)), (1, 1)).view(t.shape[1], x.shape[1])


def conv_weight_gradient(grad: torch.Tensor, x: torch.Tensor, taps: tuple[int, int]) -> torch.Tensor:
    """The weight gradient (r, C, 3, k) of a convolution of stride 1 and the same size.

    Args:
        grad: (N, H, W, r) to its result.
        x: (N, H, W, C), its input; `fits` holds of both.
        taps: (3, k), k 1 or 3.
    """
    rank, width = grad.shape[-1], x.shape[-1]
    return _sum(grad, x, tuple(x.shape[:3]), taps).view(*taps, rank, width).permute(2, 3, 0, 1).contiguous()


def _sum(t: torch.Tensor, x: torch.Tensor, size: tuple[int, ...], taps: tuple[int, int]) -> torch.Tensor:
    t, x, threads = t.contiguous(), x.contiguous(), torch.get_num_threads()
    rank, width = t.shape[-1], x.shape[-1]
    out = torch.zeros(threads, taps[0] * taps[1] * rank * width)
    call: Any = _Call(*(pointer(y) for y in (t, x, out)), *size, rank, width, *taps, threads)
    native().pw_outer(ctypes.byref(call))
    return out.sum(0)
