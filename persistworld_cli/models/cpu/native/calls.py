"""Shared by the kernels' callers: pointers, and a cache of values derived from weights."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import profiler
from torch.utils.weak import WeakTensorKeyDictionary

from persistworld_cli.models.cpu.native.build import library

LANES = 16  # numbers in the longest vector: channels must be a multiple
# What was derived from a weight, as long as that lives and is not written to
_derived: Any = WeakTensorKeyDictionary()


def operation(function: Callable[..., torch.Tensor]) -> Any:
    """A kernel's caller as an operation of torch, for gradients, torch.compile and profiles.

    Without these it is called directly: torch's dispatch takes 60 us, 160 times per network call of a single rollout (a
    tenth of its time on two cores).
    """
    seen = torch.library.custom_op(f"persistworld::{function.__name__.strip('_')}", function, mutates_args=())

    @functools.wraps(function)
    def call(*arguments: Any) -> torch.Tensor:
        needed = torch.is_grad_enabled() or torch.compiler.is_compiling() or profiler._is_profiler_enabled
        out: torch.Tensor = (seen if needed else function)(*arguments)
        return out

    made: Any = call
    made.register_fake, made.register_autograd = seen.register_fake, seen.register_autograd
    return made


def native() -> ctypes.CDLL:
    """The kernels, where `available`."""
    found = library()
    assert found is not None
    return found


def plain(x: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor in float32, contiguous."""
    return None if x is None else x.detach().float().contiguous()


def pointer(x: torch.Tensor | None) -> int | None:
    """The address of a tensor that the caller keeps."""
    return None if x is None else x.data_ptr()


def pointers(*tensors: torch.Tensor | None) -> list[ctypes.c_void_p]:
    """Addresses as arguments; the caller keeps the tensors until the call returns."""
    return [ctypes.c_void_p(pointer(x)) for x in tensors]


def sizes(*numbers: int) -> list[ctypes.c_int64]:
    """Integers as arguments."""
    return [ctypes.c_int64(number) for number in numbers]


def require_channels(weight: torch.Tensor, channels: int) -> None:
    """Raise ValueError if a weight (C', C, ...) has other channels than its input: the kernel would read beyond it."""
    if weight.shape[1] != channels:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} for {channels} channels")


def derived(weight: torch.Tensor, what: Any, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`make(weight)`, cached under `what` until the weight is written to."""
    if weight.is_inference():  # has no version
        return make(weight)
    known = _derived.setdefault(weight, {})
    version = (weight._version, weight.data_ptr())
    if known.get("version") != version:
        known.clear()
        known["version"] = version
    if what not in known:
        known[what] = make(weight)
    found: torch.Tensor = known[what]
    return found


def packed(weight: torch.Tensor, what: Any, numbers: int, function: str, *arguments: Any) -> torch.Tensor:
    """A weight in the order that a kernel reads it: `numbers` floats that `function`(weight, out, ...) writes."""

    def make(weight: torch.Tensor) -> torch.Tensor:
        source, out = plain(weight), torch.empty(numbers)
        getattr(native(), function)(*pointers(source, out), *arguments)
        return out

    return derived(weight, what, make)
