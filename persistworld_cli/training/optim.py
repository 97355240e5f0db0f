"""Optimisers (Muon for matrices and AdamW for the rest, or AdamW alone), learning-rate schedules, weight averages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from persistworld_cli.stages import stage
from persistworld_cli.training.fsdp import shared_as

KINDS = ("muon", "adamw")


def inputs_and_outputs(model: nn.Module) -> list[nn.Parameter]:
    """Embeddings and the first and last convolutions, which Muon does not suit."""
    ends = ("conv_in.", "conv_out.", "embedding")
    return [p for name, p in model.named_parameters() if any(end in name for end in ends)]


class Optimizers:
    """One or two optimisers stepped together.

    Args:
        parameters: all trained ones; matrices, and convolution kernels as (out, rest), go to Muon.
        kind: "muon" or "adamw".
        lr: learning rate of both; by default Muon's update has AdamW's size (Liu et al., arXiv 2502.16982).
        weight_decay: decoupled, of both.
        betas: of AdamW.
        by_adamw: parameters that AdamW takes whatever their shape.
        scale: of Muon's step on a matrix (rows, columns): "match_rms_adamw" 0.2 sqrt(max), "original"
            sqrt(max(1, rows / columns)).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        kind: str,
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.95),
        by_adamw: Iterable[nn.Parameter] = (),
        scale: str = "match_rms_adamw",
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown optimizer '{kind}'")
        kept = {id(p) for p in by_adamw}
        parameters = list(parameters)
        matrices = [p for p in parameters if kind == "muon" and p.ndim >= 2 and id(p) not in kept]
        chosen = {id(p) for p in matrices}
        rest = [p for p in parameters if id(p) not in chosen]
        # torch's Muon takes matrices only: a kernel is stepped through a flat parameter that shares its memory.
        self.kernels = [(p, nn.Parameter(p.detach().view(p.shape[0], -1))) for p in matrices if p.ndim > 2]
        flat = [p for p in matrices if p.ndim == 2] + [alias for _, alias in self.kernels]
        shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self.parameters = parameters
        self.all: list[torch.optim.Optimizer] = []
        if flat:
            self.all.append(torch.optim.Muon(flat, adjust_lr_fn=scale, **shared))
        if rest:
            self.all.append(torch.optim.AdamW(rest, betas=betas, **shared))

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of all optimisers."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr

    @stage("optimizer")
    def step(self) -> None:
        """Step all optimisers and clear the gradients."""
        for kernel, alias in self.kernels:
            alias.grad = None if kernel.grad is None else kernel.grad.view(alias.shape)
        for optimizer in self.all:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> list[dict[str, Any]]:
        """To resume from."""
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state(self, states: list[dict[str, Any]]) -> None:
        """Load what `state` returned, but for the settings of a step: those of this run stay in force."""
        for optimizer, state in zip(self.all, states, strict=True):
            settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            held = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {
                place: {name: shared_as(held[place], x) if x.ndim else x for name, x in values.items()}
                for place, values in state["state"].items()
            }  # without dimensions: the count of steps
            optimizer.load_state_dict({**state, "state": moments})
            for group, own in zip(optimizer.param_groups, settings, strict=True):
                group.update(own)


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

    A decay of 0 disables it: the parameters are their own average.
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
        """Within a block, the averages replace the parameters' own values."""
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
        """Load what `state` returned; restart from `parameters` if it has no average, or `decay` is 0 now."""
        saved = state["average"]
        if not self.decay or not saved:
            self.shadow, self.count = self._copies(parameters), 0
            return
        self.shadow = [shared_as(p, s) for s, p in zip(saved, parameters, strict=True)]
        self.count = state["count"]
