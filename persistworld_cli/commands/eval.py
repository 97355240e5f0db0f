"""``persistworld eval``: the closed-loop benchmark, paired against a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from persistworld_cli.commands.benchmark_options import BENCHMARK_NAMES, BenchmarkRollouts
from persistworld_cli.commands.options import Accelerator, Common, WithChanges, with_common
from persistworld_cli.commands.run import execute, write_json
from persistworld_cli.commands.weights import CKPT_FLAG
from persistworld_cli.console import write_out
from persistworld_cli.errors import UsageError

EXAMPLES = (
    "persistworld eval",
    "persistworld eval --ckpt outputs/post-train-tiny/weights",
    "persistworld eval --ckpt bundled:presets/tiny/adapter --study outputs/study",
    "persistworld eval --benchmark bundled --seed 0 --seed 1",
    "persistworld eval --preset persistworld --num-processes 8",
)


@with_common(launch="full")
def command(
    common: Common,
    ckpt: Annotated[
        str | None,
        typer.Option(
            help="Weights to evaluate: a file, folder or hub id; or a post-trained adapter.", metavar="PATH|HUB_ID"
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Weights to compare with; the preset's checkpoint without adapter by default.", metavar="PATH|HUB_ID"
        ),
    ] = None,
    *,
    rollouts: BenchmarkRollouts,
    masks: Annotated[
        list[str] | None,
        typer.Option(
            "--masks",
            help="Also measure on these pixels: DIR/<episode>/<camera>/<frame>.png; may be repeated.",
            metavar="[NAME=]DIR",
        ),
    ] = None,
    fvd: Annotated[
        str | None,
        typer.Option(
            "--fvd",
            help="Also the Fréchet video distance, by torchvision's R3D-18 with these weights.",
            metavar="PATH",
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            help="A finished result to compare this run with; given twice: both with each other, nothing is run.",
            metavar="EVAL.JSON",
        ),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            help="Also write a blind preference study: a folder to hand out; its key lies beside it.",
            metavar="DIR",
        ),
    ] = None,
    with_changes: WithChanges = False,
    accelerator: Accelerator = None,
) -> None:
    """Roll out held-out episodes in closed loop and measure them against the record, paired with a baseline."""
    others = compare or []
    if len(others) > 2:
        raise UsageError(f"{len(others)} results to compare", where="--compare", fix="give one or two")
    if len(others) == 2:
        for flag, given in (("--profile", common.profile), ("--compile", rollouts.compiled)):
            if given:
                raise UsageError("two finished results: nothing is run", where=flag, fix="leave it out")
        compare_finished(common, others)
        return
    execute(
        "eval",
        common,
        flags={**rollouts.flags(), "model.inference": ckpt, "eval.masks": masks or None, "eval.fvd": fvd},
        names={**BENCHMARK_NAMES, **CKPT_FLAG},
        job={"baseline": baseline, "study": study, "compare": next(iter(others), None)},
        accelerator=accelerator,
        pinned=rollouts.pinned(common),
        with_changes=with_changes,
    )


def compare_finished(common: Common, paths: Sequence[str]) -> None:
    """Print two finished results against each other, the first as the baseline."""
    from persistworld_cli.evaluation.comparing import compare_files
    from persistworld_cli.reports.tables import plain

    first, second = paths
    against, table = compare_files(first, second)
    if common.as_json:
        write_json(against)
    else:
        write_out(plain(table))
