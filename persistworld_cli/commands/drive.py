"""``persistworld drive``: drive the arm by keys in the world model."""

from __future__ import annotations

from typing import Annotated

import typer

from persistworld_cli.commands.options import Accelerator, Adapter, Ckpt, Common, Dataset, Seed, with_common
from persistworld_cli.commands.run import execute

EXAMPLES = (
    "persistworld drive --keys lllrrr",
    "persistworld drive --keys ffdcu --episode 899 --start 8 --seed 1",
)


@with_common(launch="single")
def command(
    common: Common,
    keys: Annotated[str, typer.Option(help="One key a step: l r (y), f b (x), u d (z), o c (gripper).")] = "lllrrr",
    episode: Annotated[
        str | None, typer.Option(help="Episode whose frame is the start; the first held-out one.")
    ] = None,
    start: Annotated[int | None, typer.Option(help="Frame to start from.")] = None,
    seed: Seed = None,
    ckpt: Ckpt = None,
    adapter: Adapter = None,
    dataset: Dataset = None,
    accelerator: Accelerator = None,
) -> None:
    """Drive by keys: each key is one interaction step of 0.8 s; the world model shows what the cameras would see."""
    from persistworld_cli.robot.keyboard import parse_keys

    parse_keys(keys)  # a key that means nothing is refused before anything starts
    execute(
        "drive",
        common,
        flags={
            "model.ckpt": ckpt,
            "model.adapter": adapter,
            "world.dataset": dataset,
            "drive.episode": episode,
            "drive.start": start,
            "drive.seed": seed,
        },
        job={"keys": keys},
        accelerator=accelerator,
    )
