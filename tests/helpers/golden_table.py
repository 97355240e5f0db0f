"""The largest error of every golden check, told at the end of `pytest -m golden --golden-table`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass
class Largest:
    """What a check has seen so far: numbers compared, the largest error, and the bound that it is held to."""

    numbers: int
    error: float
    bound: float
    relative: bool


LARGEST: dict[str, Largest] = {}


def close(what: str, got: Any, expected: Any, bound: float, *, relative: bool = False) -> None:
    """Assert that arrays or tensors differ by less than ``bound``, and remember the largest difference.

    Args:
        what: the check's line in the table, section of the golden README first; several calls may share it.
        got: ours.
        expected: the reference's, of the same shape.
        bound: on the largest absolute difference.
        relative: divide by the largest expected number where that is above 1 (noise levels of hundreds in float32).
    """
    ours, theirs = _numbers(got), _numbers(expected)
    assert ours.shape == theirs.shape, f"{what}: shape {ours.shape}, not {theirs.shape}"
    error = float(np.abs(ours - theirs).max()) if theirs.size else 0.0
    if relative:
        error /= max(1.0, float(np.abs(theirs).max()))
    if not np.isfinite(error):
        error = float("inf")
    seen = LARGEST.setdefault(what, Largest(0, 0.0, bound, relative))
    seen.numbers += theirs.size
    seen.error, seen.bound = max(seen.error, error), max(seen.bound, bound)
    assert error < bound, f"{what}: differs by {error:.3g}, allowed is {bound:.3g}"


def lines() -> list[str]:
    """The table in Markdown, a line for each check, in the order of the golden README's sections."""
    rows = ["| golden check | numbers | largest error | allowed |", "|---|---|---|---|"]
    for what, seen in sorted(LARGEST.items()):
        kind = " relative" if seen.relative else ""
        rows.append(f"| {what} | {seen.numbers:,} | {seen.error:.1e}{kind} | {seen.bound:.0e} |")
    return rows


def _numbers(value: Any) -> np.ndarray:
    """A tensor, array or number as float64."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)
