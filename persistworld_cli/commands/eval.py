"""``persistworld eval``: the closed-loop benchmark, paired against a baseline."""

from __future__ import annotations

from typing import Annotated

import typer

from persistworld_cli.commands.options import Accelerator, Adapter, Common, Dataset, with_common
from persistworld_cli.commands.run import episode_list, execute

EXAMPLES = (
    "persistworld eval",
    "persistworld eval --ckpt outputs/post-train-tiny/weights",
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
    dataset: Dataset = None,
    episodes: Annotated[str | None, typer.Option(help="Episode ids, as 99,199; all of the split by default.")] = None,
    starts: Annotated[list[int] | None, typer.Option("--start", help="Start frame; may be repeated.")] = None,
    steps: Annotated[int | None, typer.Option(help="Interaction steps of a rollout.")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Seed of the noise; may be repeated.")] = None,
    split: Annotated[str | None, typer.Option(help="train or val.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rollouts at once.")] = None,
    accelerator: Accelerator = None,
) -> None:
    """Roll out held-out episodes in closed loop and measure them against the record, paired with a baseline."""
    execute(
        "eval",
        common,
        flags={
            "model.adapter": adapter,
            "world.dataset": dataset,
            "eval.episodes": episode_list(episodes),
            "eval.starts": starts or None,
            "eval.steps": steps,
            "eval.seeds": seeds or None,
            "eval.split": split,
            "eval.batch": batch,
        },
        names={"eval.starts": "--start", "eval.seeds": "--seed"},
        job={"ckpt": ckpt, "baseline": baseline},
        accelerator=accelerator,
    )
