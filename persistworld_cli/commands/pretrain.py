"""``persistworld pretrain``: teacher-forced training of the world model, or of its VAE."""

from __future__ import annotations

from typing import Annotated

import typer

from persistworld_cli.commands.options import (
    STRICT,
    TRACKER_FLAG,
    Accelerator,
    Ckpt,
    Common,
    Dataset,
    Resume,
    ResumeFrom,
    Seed,
    StrictActions,
    Tracker,
    WithChanges,
    resuming,
    tracker_names,
    with_common,
)
from persistworld_cli.commands.run import execute
from persistworld_cli.commands.weights import hint_at_other_start, start_flags
from persistworld_cli.errors import UsageError

EXAMPLES = (
    "persistworld pretrain --updates 2000",
    "persistworld pretrain --part vae --updates 4000",
    "persistworld pretrain --preset ctrl-world --num-processes 8",
    "persistworld pretrain --preset ctrl-world-svd --num-processes 8",
)


@with_common(launch="full")
def command(
    common: Common,
    part: Annotated[str, typer.Option(help="What is trained: world (UNet and action encoder) or vae.")] = "world",
    ckpt: Ckpt = None,
    scratch: Annotated[
        bool, typer.Option("--scratch", help="Start from random weights instead of the checkpoint's.")
    ] = False,
    vae: Annotated[
        str | None, typer.Option(help="With --scratch: weights whose VAE is taken.", metavar="PATH|HUB_ID")
    ] = None,
    dataset: Dataset = None,
    updates: Annotated[int | None, typer.Option(help="Updates of the whole run.")] = None,
    batch: Annotated[int | None, typer.Option(help="Clips an update, over all processes.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    seed: Seed = None,
    tracker: Tracker = None,
    resume: Resume = True,
    resume_from: ResumeFrom = None,
    with_changes: WithChanges = False,
    strict_actions: StrictActions = False,
    accelerator: Accelerator = None,
) -> None:
    """Train the world model on recorded clips (teacher forcing), or its VAE on recorded images."""
    if part not in ("world", "vae"):
        raise UsageError(f"unknown part '{part}'", where="--part", fix="known: vae, world")
    table = "vae" if part == "vae" else "pretrain"
    start, names = start_flags(ckpt, dry_run=common.dry_run, adapter_fits=True)
    execute(
        "pretrain-vae" if part == "vae" else "pretrain",
        common,
        flags={
            STRICT: strict_actions or None,
            **start,
            "world.dataset": dataset,
            f"{table}.updates": updates,
            f"{table}.batch": batch,
            f"{table}.lr": lr,
            f"{table}.seed": seed,
            "launch.trackers": tracker_names(tracker),
        },
        names={**TRACKER_FLAG, **names},
        job={**resuming(resume, resume_from), "scratch": scratch, "vae": vae},
        accelerator=accelerator,
        with_changes=with_changes,
        hint=None if scratch or part == "vae" else hint_at_other_start,
    )
