"""``persistworld verify``: do these weights give the figures that others measured with them?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persistworld_cli.commands.benchmark_options import BENCHMARK_NAMES, BenchmarkRollouts
from persistworld_cli.commands.options import Ckpt, Common, with_common
from persistworld_cli.commands.run import execute
from persistworld_cli.commands.weights import CKPT_FLAG
from persistworld_cli.errors import UsageError

EXAMPLES = (
    "persistworld verify --preset ctrl-world --dataset droid_latents",
    "persistworld verify --preset persistworld --dataset droid_latents --num-processes 8 --count 24",
    "persistworld verify --write-published mine.toml --count 4",
    "persistworld verify --published mine.toml --ckpt outputs/pretrain-tiny/weights/model.safetensors",
)
_COUNT = 8


@with_common(launch="full")
def command(
    common: Common,
    ckpt: Ckpt = None,
    published: Annotated[
        str | None, typer.Option(help="Figures to compare with.  \\[the preset's]", metavar="FILE.toml")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(help=f"Episodes at most, of those that are there and the benchmark names.  \\[{_COUNT}]", min=2),
    ] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Do not roll out the base, where the figures have a gain over it.")
    ] = False,
    write_published: Annotated[
        Path | None,
        typer.Option(help="Compare with nothing: write what is measured as figures.", metavar="FILE.toml"),
    ] = None,
    *,
    rollouts: BenchmarkRollouts,
) -> None:
    """Load weights, check keys, types and scale of actions, roll out a few episodes, compare with published figures.

    Prints one block to paste into an issue. Exit code 0: all fits; 1: something differs, or too few episodes to say.
    """
    if count is not None and rollouts.episodes:
        raise UsageError("--count and --episodes both say which episodes", where="flags", fix="give one of them")
    if write_published and published:
        raise UsageError("--published is not read where figures are written", where="flags", fix="give one of them")
    execute(
        "verify",
        common,
        flags={**rollouts.flags(), "model.inference": ckpt, "eval.published": published},
        names={**BENCHMARK_NAMES, **CKPT_FLAG},
        job={
            "count": None if rollouts.episodes else count or _COUNT,
            "alone": alone,
            "write": str(write_published.absolute()) if write_published else None,
        },
        pinned=rollouts.pinned(common),
    )
