"""Shared by the full-size benchmarks: random weights of a preset's size, and a process's peak memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch


def peak_bytes() -> int:
    """The most memory this process ever had: VmHWM, or what getrusage says where there is no /proc."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def random_weights(shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, view of random numbers) for every shape; scaled to the fan-in, norms at 1, biases at 0.

    Every tensor is cut from one random block, from the place where the last one ended: drawing billions of numbers
    would take longer than everything else. To be copied before the next one is asked for.
    """
    largest = max(shape.numel() for shape in shapes.values())
    block = torch.empty(2 * largest).uniform_(-1, 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    begin = 0
    for name, shape in shapes.items():
        if len(shape) < 2:
            yield name, torch.full(shape, float(name.endswith("weight")), dtype=dtype)
            continue
        cut = block[begin : begin + shape.numel()].view(shape)
        yield name, cut * (3 / shape[1:].numel()) ** 0.5
        begin = (begin + shape.numel()) % largest
