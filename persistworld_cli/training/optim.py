"""Optimisers of post-training: Muon for matrices with AdamW for the rest, or AdamW for all."""

from __future__ import annotations

from typing import Any

import torch

from persistworld_cli.config.settings import PostTrainSettings
from persistworld_cli.errors import UsageError


class Optimizers:
    """One or two optimisers stepped together.

    Args:
        parameters: everything that learns; two-dimensional ones go to Muon.
        settings: optimizer, lr, weight_decay.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], settings: PostTrainSettings) -> None:
        matrices = [p for p in parameters if p.ndim == 2] if settings.optimizer == "muon" else []
        chosen = {id(p) for p in matrices}
        rest = [p for p in parameters if id(p) not in chosen]
        if settings.optimizer not in ("muon", "adamw"):
            raise UsageError(
                f"unknown optimizer '{settings.optimizer}'", where="post_train.optimizer", fix="muon or adamw"
            )
        shared: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        self.all: list[torch.optim.Optimizer] = []
        if matrices:  # AdamW's step size for both (Liu et al., arXiv 2502.16982), so that one learning rate serves them
            self.all.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **shared))
        if rest:
            self.all.append(torch.optim.AdamW(rest, betas=(0.9, 0.95), **shared))

    def set_lr(self, lr: float) -> None:
        """The same learning rate everywhere."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def step(self) -> None:
        """Step and forget the gradients."""
        for optimizer in self.all:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, Any]]:
        """To resume from."""
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state(self, states: list[dict[str, Any]]) -> None:
        """What `state` gave."""
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)
