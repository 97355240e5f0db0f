"""Samplers: from noise to a clip, given the clean prediction D(x, sigma). Each is one function and one table line."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from persistworld_cli.errors import UsageError, nearest

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x, 0-d sigma) -> x0, same shape as x
Sampler = Callable[[Denoiser, torch.Tensor, torch.Tensor], torch.Tensor]


def euler(denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Euler steps of the ODE (EDM algorithm 1 without its correction). x (B, L, C, h, w) at sigmas[0]."""
    for sigma, below in pairwise(sigmas):
        x = x + (x - denoise(x, sigma)) / sigma * (below - sigma)
    return x


def heun(denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Heun's second-order steps (EDM algorithm 1): two network calls a step but for the last."""
    for sigma, below in pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        ahead = x + slope * (below - sigma)
        if below > 0:
            slope = (slope + (ahead - denoise(ahead, below)) / below) / 2
        x = x + slope * (below - sigma)
    return x


def dpmpp_2m(denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """DPM-Solver++ (2M) in its data-prediction form (Lu et al., arXiv 2211.01095, algorithm 2): one call a step."""
    before: torch.Tensor | None = None
    for i, (sigma, below) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        if below == 0:
            return x0
        step = (sigma / below).log()
        estimate = x0
        if before is not None:
            ratio = (sigmas[i - 1] / sigma).log() / step
            estimate = x0 + (x0 - before) / (2 * ratio)
        x = below / sigma * x - torch.expm1(-step) * estimate
        before = x0
    return x


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "dpmpp-2m": dpmpp_2m}


def find_sampler(name: str) -> Sampler:
    """The sampler called ``name``. Raises UsageError with the nearest known name."""
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler '{name}'", where="sampling.sampler", fix=nearest(name, SAMPLERS))
    return SAMPLERS[name]
