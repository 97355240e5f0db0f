"""EDM preconditioning and noise schedules (arXiv 2206.00364, sigma_data = 1, v-prediction's signs)."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Preconditioning(NamedTuple):
    """Coefficients at noise level sigma; D = c_skip x + c_out F(c_in x, c_noise)."""

    c_skip: torch.Tensor
    c_out: torch.Tensor
    c_in: torch.Tensor
    c_noise: torch.Tensor


def precondition(sigma: torch.Tensor) -> Preconditioning:
    """c_skip = 1/(s^2+1), c_out = -s/sqrt(s^2+1), c_in = 1/sqrt(s^2+1), c_noise = ln(s)/4 (EDM table 1)."""
    square = sigma**2 + 1
    return Preconditioning(1 / square, -sigma / square.sqrt(), 1 / square.sqrt(), sigma.log() / 4)


def loss_weight(sigma: torch.Tensor) -> torch.Tensor:
    """(s^2 + 1) / s^2: unit weight on the network's own output (EDM eq. 8)."""
    return (sigma**2 + 1) / sigma**2


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 700.0, rho: float = 7.0) -> torch.Tensor:
    """Falling noise levels (steps + 1,), float32, the last 0 (EDM eq. 5; SVD's scheduler)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def noised_condition(clean: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """(x + s e) / sqrt(s^2 + 1): a condition frame with training noise, kept at unit variance; s may be negative."""
    return (clean + sigma * noise) / (sigma**2 + 1).sqrt()
