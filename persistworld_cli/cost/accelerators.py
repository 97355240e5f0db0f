"""Accelerators for a dry run, by their makers' data sheets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from persistworld_cli.errors import UsageError, nearest

DEFAULT_ACCELERATOR = "h100"


@dataclass(frozen=True)
class Accelerator:
    """One device.

    Attributes:
        name: of ``--accelerator``.
        tflops: peak of dense bfloat16 matrix products with float32 sums, 1e12 FLOP/s (data sheets also print twice
            this number, for 2:4 sparse matrices).
        memory_gib: memory that a program sees, GiB; None if it is unknown.
    """

    name: str
    tflops: float
    memory_gib: float | None


ACCELERATORS: Mapping[str, Accelerator] = {
    one.name: one
    for one in (
        Accelerator("a100", 312, 79),  # SXM, 80 GB
        Accelerator("a100-40gb", 312, 39),
        Accelerator("h100", 989, 79),  # SXM, 80 GB
        Accelerator("h100-pcie", 756, 79),
        Accelerator("h200", 989, 139),
        Accelerator("b200", 2250, 178),
        Accelerator("l40s", 362, 44),
        Accelerator("rtx-4090", 165, 23),
    )
}


def find_accelerator(text: str) -> Accelerator:
    """An accelerator by name (any case), or a number of TFLOP/s for one that is not listed.

    Raises:
        UsageError: neither.
    """
    name = text.strip().lower()
    if name in ACCELERATORS:
        return ACCELERATORS[name]
    try:
        tflops = float(name)
    except ValueError:
        known = nearest(name, ACCELERATORS)
        raise UsageError(
            f"unknown accelerator '{text}'", where="--accelerator", fix=f"{known}; or a number of dense bf16 TFLOP/s"
        ) from None
    if not math.isfinite(tflops) or tflops <= 0:
        raise UsageError(f"{text} TFLOP/s is not a speed", where="--accelerator", fix="write a number above 0")
    return Accelerator(f"{tflops:g} TFLOP/s", tflops, None)
