"""Learning-rate schedules and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

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
    """Exponential moving average of parameters, with the usual warm-up of the decay: min(decay, (1 + n) / (10 + n))."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.decay, self.count = decay, 0
        self.shadow = [p.detach().clone().float() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter]) -> None:
        """One step towards the current values."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for average, p in zip(self.shadow, parameters, strict=True):
            average.lerp_(p.detach().float(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Overwrite the parameters with their averages."""
        for average, p in zip(self.shadow, parameters, strict=True):
            p.copy_(average)
