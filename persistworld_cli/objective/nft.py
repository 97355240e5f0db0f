"""DiffusionNFT's contrastive objective in clean-prediction form (arXiv 2509.16117; PersistWorld, arXiv 2603.25685).

Shapes: M candidates, everything after the first dimension is averaged.
"""

from __future__ import annotations

import torch


def _item_mean(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).mean(dim=1)


def nft_loss(
    theta: torch.Tensor,
    old: torch.Tensor,
    x0: torch.Tensor,
    optimality: torch.Tensor,
    *,
    beta: float,
    weighting: str = "self",
) -> torch.Tensor:
    """(M,) r |D+ - x0|^2 + (1 - r) |D- - x0|^2 with D+ = (1-b) old + b theta, D- = (1+b) old - b theta.

    Args:
        theta: trained policy's clean prediction (M, ...); the only one with a gradient.
        old: sampling policy's.
        x0: the candidate itself.
        optimality: r in [0, 1], (M,), or a shape that broadcasts against (M, ...) for finer credit.
        beta: size of the step between old and theta.
        weighting: "plain", or "self": each branch divided by its detached mean |error| (at least 1e-5) and by beta, as
            DiffusionNFT's code does.
    """
    old, x0 = old.detach(), x0.detach()
    ones = [1] * (x0.ndim - 1)
    r = optimality if optimality.ndim > 1 else optimality.view(-1, *ones)

    def branch(prediction: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        error = prediction - x0
        square = error**2
        if weighting == "self":
            square = square / (_item_mean(error.detach().abs()).clamp(min=1e-5) * beta).view(-1, *ones)
        return _item_mean(share * square)

    return branch((1 - beta) * old + beta * theta, r) + branch((1 + beta) * old - beta * theta, 1 - r)


def kl_to_reference(theta: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """|D_theta - D_ref|^2, mean over each candidate (M,)."""
    return _item_mean((theta - reference.detach()) ** 2)


def sampling_decay(step: int, kind: str, rate: float, maximum: float) -> float:
    """Decay of the sampling policy's EMA at an update: "ramp" min(rate * step, maximum), "constant" maximum.

    DiffusionNFT's three schedules are (0, 0, 0), ramp (0.001, 0.5) and a ramp that waits 75 steps (0.0075, 0.999).
    """
    if kind == "constant":
        return maximum
    if kind in ("ramp", "late-ramp"):
        return min(rate * max(0, step - 75 if kind == "late-ramp" else step), maximum)
    raise ValueError(f"unknown schedule '{kind}'")
