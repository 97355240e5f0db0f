"""``persistworld post-train``: the world model learns from its own rollouts (arXiv 2603.25685)."""

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
from persistworld_cli.commands.weights import start_flags

EXAMPLES = (
    "persistworld post-train --updates 40",
    "persistworld post-train --updates 40 --num-processes 2",
    "persistworld post-train --groups 1 --num-processes 2 --split-groups --tracker tensorboard,trackio",
    "persistworld post-train --resume-from outputs/post-train-tiny --output outputs/longer --updates 80",
    "persistworld post-train --set post_train.beta=0.5 --set post_train.kl=0 --dry-run",
    "persistworld post-train --preset persistworld --ckpt yjguo/Ctrl-World --num-processes 8",
)


@with_common(launch="full")
def command(
    common: Common,
    ckpt: Ckpt = None,
    dataset: Dataset = None,
    updates: Annotated[int | None, typer.Option(help="Updates of the whole run.")] = None,
    groups: Annotated[int | None, typer.Option(help="Start states an update, over all processes.")] = None,
    candidates: Annotated[int | None, typer.Option(help="Continuations drawn from each start state.")] = None,
    split_groups: Annotated[
        bool | None,
        typer.Option("--split-groups", help="Fewer groups than processes: several share the candidates of one."),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    seed: Seed = None,
    tracker: Tracker = None,
    resume: Resume = True,
    resume_from: ResumeFrom = None,
    with_changes: WithChanges = False,
    strict_actions: StrictActions = False,
    accelerator: Accelerator = None,
) -> None:
    """Post-train on own rollouts: draw continuations, score them against the record, learn from the best and worst."""
    start, names = start_flags(ckpt, dry_run=common.dry_run, adapter_fits=False)
    execute(
        "post-train",
        common,
        flags={
            STRICT: strict_actions or None,
            **start,
            "world.dataset": dataset,
            "post_train.updates": updates,
            "post_train.groups": groups,
            "post_train.candidates": candidates,
            "post_train.split_groups": split_groups,
            "post_train.lr": lr,
            "post_train.seed": seed,
            "launch.trackers": tracker_names(tracker),
        },
        names={**TRACKER_FLAG, **names},
        job=resuming(resume, resume_from),
        accelerator=accelerator,
        with_changes=with_changes,
    )
