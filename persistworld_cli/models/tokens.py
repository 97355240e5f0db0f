"""Action tokens: one conditioning token per frame from its normalised pose and the instruction (Ctrl-World)."""

from __future__ import annotations

import torch
from torch import nn


class ActionEncoder(nn.Module):
    """MLP action_dim -> T -> T -> T with SiLU between, plus the text embedding repeated to T on every frame.

    Args:
        action_dim: numbers of an action (7: pose and gripper).
        token_dim: T, the UNet's cross-attention width.
    """

    def __init__(self, action_dim: int, token_dim: int) -> None:
        super().__init__()
        self.action_encode = nn.Sequential(
            nn.Linear(action_dim, token_dim),
            nn.SiLU(),
            nn.Linear(token_dim, token_dim),
            nn.SiLU(),
            nn.Linear(token_dim, token_dim),
        )
        self.token_dim = token_dim

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def forward(self, actions_bnd: torch.Tensor, text_be: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (B, N, T) of normalised actions (B, N, D) and text embeddings (B, E), E a divisor of T."""
        tokens = self.action_encode(actions_bnd)
        if text_be is None:
            return tokens
        repeats, rest = divmod(self.token_dim, text_be.shape[-1])
        if rest:
            raise ValueError(f"text width {text_be.shape[-1]} does not divide token width {self.token_dim}")
        return tokens + text_be.repeat(1, repeats)[:, None, :]
