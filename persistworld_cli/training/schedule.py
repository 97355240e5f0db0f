"""Learning-rate schedules and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def lr_factor(step: int, total: int, warmup: int, decay: str) -> float:
    """Factor on the learning rate at `step`: linear warm-up, then constant, or a half cosine down to 2%."""
    if step < warmup:
        return (step + 1) / warmup
    if decay == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class WeightAverage:
    """Exponential moving average of parameters, with the usual warm-up of the decay: min(decay, (1 + n) / (10 + n)).

    A decay of 0 means none: nothing is kept, and the parameters stand for their own average.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.decay, self.count = decay, 0
        self.shadow = self._copies(parameters)

    def _copies(self, parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
        return [p.detach().clone().float() for p in parameters] if self.decay else []

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter]) -> None:
        """One step towards the current values."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        if self.shadow:
            for average, p in zip(self.shadow, parameters, strict=True):
                average.lerp_(p.detach().float(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Overwrite the parameters with their averages."""
        if self.shadow:
            for average, p in zip(self.shadow, parameters, strict=True):
                p.copy_(average)

    @contextmanager
    def in_place_of(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """The averages in the parameters for a block, then their own values again."""
        kept = [p.detach().clone() for p in parameters] if self.shadow else []
        self.copy_to(parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(parameters, kept, strict=False):
                    p.copy_(value)

    def state(self) -> dict[str, Any]:
        """To resume from."""
        return {"average": self.shadow, "count": self.count}

    def load_state(self, state: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """What `state` gave; where it kept no average, or none is wanted now, it begins anew from `parameters`."""
        saved = state["average"]
        if not self.decay or not saved:
            self.shadow, self.count = self._copies(parameters), 0
            return
        self.shadow = [s.to(p.device) for s, p in zip(saved, parameters, strict=True)]
        self.count = state["count"]
