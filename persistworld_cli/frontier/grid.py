"""The sampling settings to try: samplers x numbers of calls x other varied keys, and the reference."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from persistworld_cli.config.check import check
from persistworld_cli.config.fields import coerce, parse_text
from persistworld_cli.config.requests import FrontierRequest
from persistworld_cli.config.settings import SamplingSettings, Settings, setting_types
from persistworld_cli.cost.interaction import sampler_calls
from persistworld_cli.errors import UsageError, nearest
from persistworld_cli.models.diffusion import karras_sigmas
from persistworld_cli.models.samplers import SAMPLERS, find_sampler

VARIED = ("guidance", "sigma_min", "sigma_max", "rho")  # keys that --vary may name: read again for every sampled clip


@dataclass(frozen=True)
class Setting:
    """One way to sample a clip.

    Attributes:
        name: short, for tables: ``dpmpp-2m 6, sigma_min 0.05``.
        sampling: all sampling settings.
        calls: clips that go through the network per sampled clip; guidance counts twice.
    """

    name: str
    sampling: SamplingSettings
    calls: int


def make_grid(settings: Settings, request: FrontierRequest) -> tuple[Setting, list[Setting]]:
    """The reference, and the settings to compare with it by number of calls; equal clips are sampled once.

    Args:
        settings: their ``sampling`` gives all values that are not varied, and is itself tried.
        request: with a ``baseline`` the reference has other weights, so the reference's sampling may be tried too.

    Raises:
        UsageError: an unknown sampler, a reference that is not NAME:STEPS, a key that cannot be varied, a value out of
            range, or nothing to compare.
    """
    own, varied = settings.sampling, [_varied(text) for text in request.vary]
    name, mark, steps = request.reference.rpartition(":")
    if not mark or not steps.isdecimal() or int(steps) < 1:
        raise UsageError(f"'{request.reference}' is not SAMPLER:STEPS", where="--reference", fix="write euler:50")
    reference = _setting(own, replace(own, sampler=_known(name, "--reference"), steps=int(steps)))
    tried = [own]
    for sampler, calls in product(request.samplers, request.calls):
        steps_taken = _steps_for(replace(own, sampler=_known(sampler, "--sampler"), guidance=1.0), calls)
        if steps_taken is None:  # heun always makes an odd number of calls
            continue
        for values in product(*(choices for _, choices in varied)):
            changes = dict(zip((key for key, _ in varied), values, strict=True))
            tried.append(replace(own, sampler=sampler, steps=steps_taken, **changes))
    for sampling in tried:
        keys = [f"sampling.{field.name}" for field in fields(SamplingSettings)]
        check(replace(settings, sampling=sampling), dict.fromkeys(keys, "--vary, --calls"))
    seen = set() if request.baseline else {_identity(reference.sampling)}
    grid = []
    for setting in sorted((_setting(own, sampling) for sampling in tried), key=lambda s: s.calls):
        if (same := _identity(setting.sampling)) not in seen:
            seen.add(same)
            grid.append(setting)
    if not grid:
        what, fix = "only the reference itself would be tried", "write --calls 1,2,4,8"
        raise UsageError(what, where="--calls", fix=fix)
    return reference, grid


def _known(sampler: str, where: str) -> str:
    """A sampler's name. Raises UsageError naming the flag."""
    try:
        find_sampler(sampler)
    except UsageError as error:
        raise UsageError(error.what, where=where, fix=error.fix) from None
    return sampler


def _steps_for(sampling: SamplingSettings, calls: int) -> int | None:
    """The number of steps with which a sampler makes exactly this many calls, or None."""
    counted = ((steps, sampler_calls(replace(sampling, steps=steps))) for steps in range(calls, 0, -1))
    return next((steps for steps, made in counted if made == calls), None)


def _varied(text: str) -> tuple[str, list[Any]]:
    """``sigma_min=0.002,0.05`` (or ``sampling.sigma_min=...``) as the key and its values."""
    key, mark, listed = text.partition("=")
    key = key.strip().removeprefix("sampling.")
    if not mark or not listed.strip():
        raise UsageError(f"'{text}' is not KEY=VALUE,VALUE", where="--vary", fix="write --vary sigma_min=0.002,0.05")
    if key not in VARIED:
        raise UsageError(f"'{key}' cannot be varied", where="--vary", fix=nearest(key, VARIED))
    hint = setting_types()[f"sampling.{key}"]
    parts = [part.strip() for part in listed.split(",") if part.strip()]
    return key, [coerce(parse_text(part, hint), hint, key=f"sampling.{key}", where="--vary") for part in parts]


def _setting(own: SamplingSettings, sampling: SamplingSettings) -> Setting:
    """A setting and its name: sampler, steps, then the other values that differ from the settings."""
    values = {key: getattr(sampling, key) for key in VARIED}
    others = [f"{key} {value:g}" for key, value in values.items() if value != getattr(own, key)]
    return Setting(", ".join([f"{sampling.sampler} {sampling.steps}", *others]), sampling, sampler_calls(sampling))


def _identity(sampling: SamplingSettings) -> tuple[Any, ...]:
    """Equal for settings that sample the same clip: with one step, all built-in samplers give the same."""
    sigmas = karras_sigmas(sampling.steps, sampling.sigma_min, sampling.sigma_max, sampling.rho)
    method = sampling.sampler if sampling.steps > 1 or sampling.sampler not in SAMPLERS else ""
    return method, sampling.guidance, tuple(sigmas.tolist())
