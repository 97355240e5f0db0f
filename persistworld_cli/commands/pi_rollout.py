"""``persistworld pi-rollout``: a policy acts in the world model, over openpi's websocket protocol."""

from __future__ import annotations

from typing import Annotated

import typer

from persistworld_cli.commands.options import (
    COMPILE,
    STRICT,
    Accelerator,
    Adapter,
    Ckpt,
    Common,
    Compile,
    Dataset,
    Seed,
    StrictActions,
    with_common,
)
from persistworld_cli.commands.run import execute
from persistworld_cli.commands.weights import CKPT_FLAG

EXAMPLES = (
    "persistworld pi-rollout",
    "persistworld pi-rollout --policy ws://127.0.0.1:8000 --steps 8",
    "persistworld pi-rollout --task pickplace --policy server --rollouts 4",
    "persistworld pi-rollout --judge bundled-world --against sim --rollouts 8",
)


@with_common(launch="single")
def command(
    common: Common,
    policy: Annotated[
        str,
        typer.Option(
            help="scripted, hold or random (served here on loopback); server (the preset's address); or your own.",
            metavar="NAME|ws://HOST:PORT|MODULE:CLASS",
        ),
    ] = "scripted",
    task: Annotated[str | None, typer.Option(help="Task: its start frames, instruction, skip and gripper cap.")] = None,
    steps: Annotated[int | None, typer.Option(help="Interaction steps of a rollout.")] = None,
    rollouts: Annotated[int, typer.Option(help="At most so many of the task's start frames.", min=1)] = 1,
    episode: Annotated[
        list[str] | None, typer.Option("--episode", help="Episode instead of the task's; repeatable.")
    ] = None,
    start: Annotated[int | None, typer.Option(help="Start frame instead of the task's.", min=0)] = None,
    instruction: Annotated[str | None, typer.Option(help="Instruction instead of the task's.")] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="Who says what came of it: bundled-world, or your own.", metavar="NAME|MODULE:CLASS"),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="sim: the same in the bundled world's simulator, and how well it was foretold.", metavar="sim"
        ),
    ] = None,
    seed: Seed = None,
    ckpt: Ckpt = None,
    adapter: Adapter = None,
    dataset: Dataset = None,
    compiled: Compile = False,
    strict_actions: StrictActions = False,
    accelerator: Accelerator = None,
) -> None:
    """Let a policy act in the world model: it sees the predicted cameras and answers with joint velocities."""
    execute(
        "pi-rollout",
        common,
        flags={
            COMPILE: compiled or None,
            STRICT: strict_actions or None,
            "model.inference": ckpt,
            "model.adapter": adapter,
            "world.dataset": dataset,
            "policy.task": task,
            "policy.steps": steps,
            "policy.seed": seed,
        },
        names=CKPT_FLAG,
        job={
            "policy": policy,
            "limit": rollouts,
            "episodes": episode or [],
            "start": start,
            "instruction": instruction,
            "judge": judge,
            "against": against,
        },
        accelerator=accelerator,
    )
