"""``persistworld frontier``: how few network calls are enough for this checkpoint?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from persistworld_cli.commands.benchmark_options import BENCHMARK_NAMES, BenchmarkRollouts
from persistworld_cli.commands.options import Ckpt, Common, WithChanges, with_common
from persistworld_cli.commands.run import execute
from persistworld_cli.commands.weights import CKPT_FLAG
from persistworld_cli.config.presets import DEFAULT_PRESET
from persistworld_cli.errors import UsageError

EXAMPLES = (
    "persistworld frontier --calls 1,2,4,8 --sampler euler,dpmpp-2m",
    "persistworld frontier --write-preset outputs/fast.toml",
    "persistworld frontier --adapter outputs/few-step/weights --baseline base --calls 1,4",
    "persistworld frontier --preset ctrl-world --vary sigma_min=0.002,0.05 --vary guidance=1,2 --num-processes 8",
)
_SAMPLERS = ["euler", "heun", "dpmpp-2m", "dpmpp-3m", "unipc"]
_CALLS = ["1,2,3,4,5,6,8,12"]


@with_common(launch="full")
def command(
    common: Common,
    ckpt: Ckpt = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Weights that the reference is sampled with, if others; base: without the adapter.",
            metavar="PATH|HUB_ID",
        ),
    ] = None,
    samplers: Annotated[
        list[str] | None,
        typer.Option("--sampler", help=f"Samplers to try, as a,b or repeated.  \\[{', '.join(_SAMPLERS)}]"),
    ] = None,
    calls: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Calls of the denoiser for a clip to try; with guidance each counts twice.  \\[{_CALLS[0]}]"
        ),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="Also try these values: guidance, sigma_min, sigma_max, rho; may be repeated.", metavar="KEY=V,V"
        ),
    ] = None,
    reference: Annotated[str, typer.Option(help="What all are compared with.", metavar="SAMPLER:STEPS")] = "euler:50",
    percent: Annotated[float, typer.Option(help="How much worse than the reference is close enough.", min=0)] = 1.0,
    write_preset: Annotated[
        Path | None,
        typer.Option(help="Write the fastest setting that is close enough as a preset.", metavar="FILE.toml"),
    ] = None,
    *,
    rollouts: BenchmarkRollouts,
    with_changes: WithChanges = False,
) -> None:
    """Quality against network calls: samplers and steps on held-out rollouts, paired with a slow reference."""
    execute(
        "frontier",
        common,
        flags={**rollouts.flags(), "model.inference": ckpt},
        names={**BENCHMARK_NAMES, **CKPT_FLAG},
        job={
            "baseline": baseline,
            "samplers": _words(samplers or _SAMPLERS),
            "calls": _calls(calls or _CALLS),
            "vary": vary or [],
            "reference": reference,
            "percent": percent,
            "write_preset": str(write_preset.absolute()) if write_preset else None,
            "preset": common.preset or DEFAULT_PRESET,
        },
        pinned=rollouts.pinned(common),
        with_changes=with_changes,
    )


def _words(texts: Sequence[str]) -> list[str]:
    """``["a,b", "c"]`` as ``["a", "b", "c"]``, each once."""
    listed = [part.strip() for text in texts for part in text.split(",")]
    return list(dict.fromkeys(part for part in listed if part))


def _calls(texts: Sequence[str]) -> list[int]:
    """``["1,2", "4"]`` as whole numbers from 1, ascending. Raises UsageError."""
    parts = _words(texts)
    wrong = next((part for part in parts if not part.isdecimal() or int(part) < 1), None)
    if wrong is not None or not parts:
        raise UsageError(f"'{wrong or ''}' is no number of calls", where="--calls", fix="write --calls 1,2,4,8")
    return sorted({int(part) for part in parts})
