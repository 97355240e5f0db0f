"""DiffusionNFT's contrastive objective in clean-prediction form (arXiv 2509.16117; PersistWorld, arXiv 2603.25685).

Shapes: M candidates, everything after the first dimension is averaged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class NftTerms(NamedTuple):
    """Per-candidate terms (M,): the policy loss, and the two branches' mean squared errors."""

    policy: torch.Tensor
    plus: torch.Tensor
    minus: torch.Tensor


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
) -> NftTerms:
    """r |D+ - x0|^2 + (1 - r) |D- - x0|^2 with D+ = (1-b) old + b theta, D- = (1+b) old - b theta.

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
    errors = {"plus": (1 - beta) * old + beta * theta - x0, "minus": (1 + beta) * old - beta * theta - x0}
    r = optimality if optimality.ndim > 1 else optimality.view(-1, *[1] * (x0.ndim - 1))
    terms = {}
    for name, error in errors.items():
        share = r if name == "plus" else 1 - r
        square = error**2
        if weighting == "self":
            size = _item_mean(error.detach().abs()).clamp(min=1e-5) * beta
            square = square / size.view(-1, *[1] * (x0.ndim - 1))
        terms[name] = _item_mean(share * square)
    return NftTerms(
        terms["plus"] + terms["minus"],
        _item_mean(errors["plus"].detach() ** 2),
        _item_mean(errors["minus"].detach() ** 2),
    )


def kl_to_reference(theta: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """|D_theta - D_ref|^2, mean over each candidate (M,)."""
    return _item_mean((theta - reference.detach()) ** 2)


def sampling_decay(step: int, kind: str, rate: float, maximum: float) -> float:
    """Decay of the sampling policy's EMA at an update: "ramp" min(rate * step, maximum), "constant" maximum.

    DiffusionNFT's three schedules are (0, 0, 0), ramp (0.001, 0.5) and a ramp that waits 75 steps (0.0075, 0.999).
    """
    if kind == "constant":
        return maximum
    if kind == "ramp":
        return min(rate * step, maximum)
    if kind == "late-ramp":
        return min(max(0, step - 75) * rate, maximum)
    raise ValueError(f"unknown schedule '{kind}'")
