"""The type of matrix products: the requested one, if the processor supports it.

A CPU without bfloat16 (most laptops: it comes with AVX-512 or newer) computes its products one number at a time: the
tiny preset's network takes 7 times as long as in float32. There float32 is used instead, which is logged once.
"""

from __future__ import annotations

import functools
import logging
from contextlib import AbstractContextManager, nullcontext

import torch

_log_once = functools.cache(logging.getLogger(__name__).info)


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this processor has bfloat16 products."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product_type(device: torch.device, wanted: torch.dtype) -> torch.dtype:
    """``wanted``, or float32 if that is bfloat16 and ``device`` is a CPU without it."""
    if device.type != "cpu" or wanted is not torch.bfloat16 or cpu_has_bfloat16():
        return wanted
    _log_once("this processor has no bfloat16: float32 is used instead")
    return torch.float32


def allow_tf32(which: str) -> None:
    """Which float32 products a GPU computes in TF32, with 10 of their factors' 23 bits (`LaunchSettings.tf32`)."""
    torch.backends.cudnn.allow_tf32 = which != "none"
    torch.backends.cuda.matmul.allow_tf32 = which == "all"


def small_products(device: torch.device, dtype: torch.dtype, own: torch.dtype) -> AbstractContextManager[object]:
    """Autocast to ``dtype`` for weights of type ``own``; none if the two are equal or ``dtype`` is float32."""
    dtype = dtype if own is dtype else product_type(device, dtype)
    return nullcontext() if dtype in (torch.float32, own) else torch.autocast(device.type, dtype)
