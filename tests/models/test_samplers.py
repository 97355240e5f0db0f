"""Samplers: what they solve, how fast they converge, how often they ask, and diffusers' own schedulers beside them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, UniPCMultistepScheduler

from persistworld_cli.models.diffusion import karras_sigmas
from persistworld_cli.models.samplers import SAMPLERS

CALLS = {"euler": 1, "heun": 2, "dpmpp-2m": 1, "dpmpp-3m": 1, "unipc": 1}  # a step; none for the second of the last
ORDER = {"euler": 1.0, "heun": 2.0, "dpmpp-2m": 2.0, "dpmpp-3m": 2.0, "unipc": 3.0}
SPREAD = 0.5  # data N(0, SPREAD^2): the ideal denoiser is linear, and the ODE's solution known


def ideal(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return x * SPREAD**2 / (SPREAD**2 + sigma**2)


def uneven(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """No ideal denoiser of anything, and nothing in it is linear."""
    return torch.tanh(x) / (1 + sigma**2) + 0.1 * torch.sin(3 * x) * torch.exp(-sigma)


def start(top: float) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * top


def error(name: str, steps: int) -> float:
    """Against the exact solution, on levels that fall evenly in ln sigma from 10 to 0.05."""
    top, low = 10.0, 0.05
    sigmas = torch.logspace(math.log10(top), math.log10(low), steps, dtype=torch.float64)
    x = start(top)
    there = x * math.sqrt((SPREAD**2 + low**2) / (SPREAD**2 + top**2))
    end = SAMPLERS[name](ideal, x, torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)]))
    return float((end - ideal(there, sigmas[-1])).abs().max())


def test_every_sampler_is_tested() -> None:
    assert SAMPLERS.keys() == CALLS.keys() == ORDER.keys()


@pytest.mark.parametrize("name", ORDER)
def test_the_error_falls_with_the_declared_order(name: str) -> None:
    measured = math.log2(error(name, 64) / error(name, 128))
    assert measured == pytest.approx(ORDER[name], abs=0.15)


def test_at_equal_calls_higher_orders_are_closer() -> None:
    errors = {name: error(name, 64 if name != "heun" else 32) for name in SAMPLERS}
    assert errors["unipc"] < errors["dpmpp-3m"] < errors["dpmpp-2m"] < errors["heun"] < errors["euler"]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_network_is_asked_as_often_as_declared(name: str, steps: int) -> None:
    asked: list[float] = []

    def listening(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        assert sigma.ndim == 0 and sigma > 0
        asked.append(float(sigma))
        return uneven(x, sigma)

    SAMPLERS[name](listening, start(80.0), karras_sigmas(steps, sigma_max=80.0).double())
    assert len(asked) == CALLS[name] * steps - (CALLS[name] - 1)
    assert asked == sorted(asked, reverse=True)


def test_with_one_step_all_give_the_first_prediction() -> None:
    x, sigmas = start(80.0), karras_sigmas(1, sigma_max=80.0).double()
    for sampler in SAMPLERS.values():
        torch.testing.assert_close(sampler(uneven, x, sigmas), uneven(x, sigmas[0]), rtol=0, atol=1e-12)


# -- diffusers' schedulers, made to take clean predictions at noise levels ---------------------------------------------


class Edm(EDMDPMSolverMultistepScheduler):
    def convert_model_output(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return model_output


class Uni(UniPCMultistepScheduler):
    def _sigma_to_alpha_sigma_t(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones_like(sigma), sigma


def edm(order: int, kind: str) -> Callable[[], Any]:
    settings: dict[str, Any] = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 1.0, "sigma_schedule": "karras"}
    return lambda: Edm(solver_order=order, solver_type=kind, final_sigmas_type="zero", **settings)


def uni() -> Any:
    return Uni(solver_order=2, prediction_type="sample", solver_type="bh2", final_sigmas_type="zero")


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 14])
@pytest.mark.parametrize(
    ("name", "made"), [("dpmpp-2m", edm(2, "midpoint")), ("dpmpp-3m", edm(3, "heun")), ("unipc", uni)]
)
def test_steps_are_those_of_diffusers_scheduler(name: str, made: Callable[[], Any], steps: int) -> None:
    scheduler = made()
    scheduler.set_timesteps(steps)
    sigmas = karras_sigmas(steps, sigma_max=80.0)
    scheduler.sigmas = sigmas.double()
    x = start(80.0)
    theirs = x.clone()
    for index, time in enumerate(scheduler.timesteps):
        theirs = scheduler.step(uneven(theirs, scheduler.sigmas[index]), time, theirs).prev_sample
    torch.testing.assert_close(SAMPLERS[name](uneven, x, sigmas.double()), theirs, rtol=0, atol=1e-6)
