"""Samplers: from noise to a clip, given the clean prediction D(x, sigma). Each is one function and one table line, or
a user-defined class (``sampling.sampler = "module:Class"``; docs/python.md).

A sampler takes noise levels (on the CPU) that fall to a last 0. The multistep ones solve the ODE in its exponential
form (Lu et al., arXiv 2211.01095, section 4, with alpha = 1): with l = -ln sigma, x_t = sigma_t / sigma_s x_s +
sigma_t int e^l D dl, from l_s to l_t, where a polynomial through past predictions replaces D. The step to 0 gives D
itself, so they drop to first order there. diffusers' schedulers for these have time steps, scalings and a noise
schedule of their own; the tests compare with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from persistworld_cli.config.plugins import make_plugin, running

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x, 0-d sigma) -> x0, same shape as x
Sampler = Callable[[Denoiser, torch.Tensor, torch.Tensor], torch.Tensor]


def euler(denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Euler steps of the ODE (EDM algorithm 1 without its correction): one call per step. x (B, L, C, h, w)."""
    for sigma, below in pairwise(sigmas):
        x = x + (x - denoise(x, sigma)) / sigma * (below - sigma)
    return x


def heun(denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Heun's second-order steps (EDM algorithm 1): two network calls per step except the last."""
    for sigma, below in pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        ahead = x + slope * (below - sigma)
        if below > 0:
            slope = (slope + (ahead - denoise(ahead, below)) / below) / 2
        x = x + slope * (below - sigma)
    return x


def dpmpp_2m(denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """DPM-Solver++ (2M) in its data-prediction form (Lu et al., arXiv 2211.01095, algorithm 2): one call per step."""
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


def dpmpp_3m(denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """DPM-Solver++ (3M): the same with a parabola through three predictions, one call per step.

    The integral's Taylor terms (arXiv 2211.01095, section 4) with D's two derivatives at l_s from divided differences.
    """
    levels = sigmas.tolist()
    past: list[torch.Tensor] = []  # newest first
    for i, (sigma, below) in enumerate(pairwise(levels)):
        past = [denoise(x, sigmas[i]), *past[:2]]
        if below == 0:
            return past[0]
        order = _order(3, i, len(levels) - 1)
        h = math.log(sigma / below)
        back = [math.log(s / sigma) / h for s in levels[max(0, i - 2) : i][::-1]]  # to older predictions, in steps
        shrink = math.expm1(-h)
        x = below / sigma * x - shrink * past[0]
        if order == 2:
            x = x + (shrink / h + 1) * (past[0] - past[1]) / back[0]
        elif order == 3:
            near, far = (past[0] - past[1]) / back[0], (past[1] - past[2]) / (back[1] - back[0])
            second = (near - far) / back[1]
            x = x + (shrink / h + 1) * (near + back[0] * second) - ((shrink + h) / h**2 - 0.5) * second
    return x


def unipc(denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """UniPC of order 2 (Zhao et al., arXiv 2302.04867, algorithms 1 and 2, B(h) = e^h - 1): one call per step.

    Each step's prediction also corrects the step that led to it (UniC), which adds an order at no call.
    """
    levels = sigmas.tolist()
    past: list[torch.Tensor] = []  # newest first
    start, order = x, 0  # of the step that led here
    for i, below in enumerate(levels[1:]):
        x0 = denoise(x, sigmas[i])
        if below == 0:
            return x0
        if order:
            x = _unified(start, past[:order], levels[i - order : i + 1], x0)
        past = [x0, *past[:1]]
        start, order = x, _order(2, i, len(levels) - 1)
        x = _unified(start, past[:order], levels[i + 1 - order : i + 2])
    return x


SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "heun": heun,
    "dpmpp-2m": dpmpp_2m,
    "dpmpp-3m": dpmpp_3m,
    "unipc": unipc,
}


def find_sampler(name: str) -> Sampler:
    """The sampler called ``name``, or one of class ``module:Class``. Raises as `make_plugin`."""
    if name in SAMPLERS:
        return SAMPLERS[name]
    where, fix = "sampling.sampler", "a sampler has __call__(denoise, x, sigmas), which returns a clip of x's shape"
    made: Sampler = make_plugin(name, SAMPLERS, kind="sampler", where=where, needs=("__call__",), fix=fix)

    def sampler(denoise: Denoiser, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        with running("sampler", f"{where} {name}"):
            return made(denoise, x, sigmas)

    return sampler


def _order(most: int, step: int, steps: int) -> int:
    """The order of a step: limited by the predictions so far, and falling to 1 at the last step, which goes to 0."""
    return min(most, step + 1, steps - step)


def _unified(
    x: torch.Tensor, past: Sequence[torch.Tensor], levels: Sequence[float], ahead: torch.Tensor | None = None
) -> torch.Tensor:
    """One step of UniP, or of UniC where the prediction ``ahead`` at its end is known.

    Args:
        x: at the step's beginning.
        past: 1 or 2 predictions, newest (the step's beginning) first.
        levels: their noise levels, oldest first, then that of the step's end.
        ahead: the prediction at the step's end.
    """
    *_, sigma, below = levels
    h = math.log(sigma / below)
    shrink = math.expm1(-h)
    places = [math.log(sigma / s) / h for s in reversed(levels[:-2])]  # of the older predictions, in steps
    slopes = [(old - past[0]) / place for old, place in zip(past[1:], places, strict=True)]
    if ahead is not None:
        places, slopes = [*places, 1.0], [*slopes, ahead - past[0]]
    x = below / sigma * x - shrink * past[0]
    if len(slopes) == 2:  # the weights a of section 3: a_1 + a_2 = first, a_1 places_1 + a_2 = second
        first, second = (shrink / -h - 1) / shrink, (2 * (shrink / -h - 1) / -h - 1) / shrink
        weight = (first - second) / (1 - places[0])
        return x - shrink * (weight * slopes[0] + (first - weight) * slopes[1])
    return x - shrink * 0.5 * slopes[0] if slopes else x
