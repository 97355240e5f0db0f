"""``persistworld eval``: the closed-loop benchmark, paired against a baseline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from persistworld_cli.commands.options import (
    COMPILE,
    Accelerator,
    Adapter,
    Batch,
    Benchmark,
    Common,
    Compile,
    Dataset,
    Episodes,
    Seeds,
    Split,
    Starts,
    Steps,
    with_common,
)
from persistworld_cli.commands.run import BENCHMARK_NAMES, benchmark_flags, execute, pinned_by, write_json
from persistworld_cli.errors import UsageError

EXAMPLES = (
    "persistworld eval",
    "persistworld eval --ckpt outputs/post-train-tiny/weights",
    "persistworld eval --ckpt bundled:presets/tiny/adapter --study outputs/study",
    "persistworld eval --benchmark bundled --seed 0 --seed 1",
    "persistworld eval --preset persistworld --ckpt jaibrdhn/persistworld --num-processes 8",
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
    adapter: Adapter = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Weights to compare with; the preset's checkpoint without adapter by default.", metavar="PATH|HUB_ID"
        ),
    ] = None,
    benchmark: Benchmark = None,
    dataset: Dataset = None,
    episodes: Episodes = None,
    starts: Starts = None,
    steps: Steps = None,
    seeds: Seeds = None,
    split: Split = None,
    batch: Batch = None,
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
    compiled: Compile = False,
    accelerator: Accelerator = None,
) -> None:
    """Roll out held-out episodes in closed loop and measure them against the record, paired with a baseline."""
    others = compare or []
    if len(others) > 2:
        raise UsageError(f"{len(others)} results to compare", where="--compare", fix="give one or two")
    if len(others) == 2:
        for flag, given in (("--profile", common.profile), ("--compile", compiled)):
            if given:
                raise UsageError("two finished results: nothing is run", where=flag, fix="leave it out")
        compare_finished(common, others)
        return
    flags = benchmark_flags(
        adapter=adapter,
        benchmark=benchmark,
        dataset=dataset,
        episodes=episodes,
        starts=starts,
        steps=steps,
        seeds=seeds,
        split=split,
        batch=batch,
    )
    execute(
        "eval",
        common,
        flags={**flags, COMPILE: compiled or None, "eval.masks": masks or None, "eval.fvd": fvd},
        names=BENCHMARK_NAMES,
        job={"ckpt": ckpt, "baseline": baseline, "study": study, "compare": next(iter(others), None)},
        accelerator=accelerator,
        pinned=pinned_by(common, benchmark),
    )


def compare_finished(common: Common, paths: Sequence[str]) -> None:
    """Print two finished results against each other, the first as the baseline."""
    from persistworld_cli.evaluation.comparing import compare_results, load_result
    from persistworld_cli.reports.tables import eval_table, plain

    first, second = (load_result(path) for path in paths)
    against = compare_results(first, second, f"{paths[0]} and {paths[1]}")
    if common.as_json:
        write_json(against)
    else:
        sys.stdout.write(plain(eval_table(against)))
