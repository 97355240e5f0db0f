"""``persistworld replay``: recorded actions, replayed in the world model from one real frame."""

from __future__ import annotations

from typing import Annotated

import typer

from persistworld_cli.commands.options import (
    COMPILE,
    STRICT,
    Accelerator,
    Common,
    Compile,
    Dataset,
    StrictActions,
    with_common,
)
from persistworld_cli.commands.run import execute

EXAMPLES = (
    "persistworld replay",
    "persistworld replay --episode 899 --start 8 --steps 12",
    "persistworld replay --episode 899 --adapter base --adapter outputs/post-train-tiny/weights",
)


@with_common(launch="single")
def command(
    common: Common,
    episode: Annotated[
        list[str] | None, typer.Option("--episode", help="Episode; may be repeated. The first held-out one by default.")
    ] = None,
    start: Annotated[int, typer.Option(help="Frame to start from.", min=0)] = 0,
    steps: Annotated[int | None, typer.Option(help="Interaction steps of a rollout (4 new frames each).")] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Seed of the noise; may be repeated.")] = None,
    ckpt: Annotated[
        list[str] | None,
        typer.Option("--ckpt", help="Weights; may be repeated, for models side by side.", metavar="PATH|HUB_ID"),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="Adapter on the weights, or base for none; may be repeated.", metavar="PATH"),
    ] = None,
    dataset: Dataset = None,
    split: Annotated[str | None, typer.Option(help="Split to look for the episode in: train or val.")] = None,
    compiled: Compile = False,
    strict_actions: StrictActions = False,
    accelerator: Accelerator = None,
) -> None:
    """Replay recorded actions: prediction over record as mp4, contact sheet and numbers for every step."""
    execute(
        "replay",
        common,
        flags={
            COMPILE: compiled or None,
            STRICT: strict_actions or None,
            "world.dataset": dataset,
            "eval.split": split,
            "eval.steps": steps,
        },
        job={
            "episodes": episode or [],
            "start": start,
            "seeds": seed or [0],
            "ckpts": ckpt or [],
            "adapters": adapter or [],
        },
        accelerator=accelerator,
    )
