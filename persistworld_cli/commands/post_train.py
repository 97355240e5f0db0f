"""``persistworld post-train``: the world model learns from its own rollouts (arXiv 2603.25685)."""

from __future__ import annotations

from persistworld_cli.commands.options import (
    DATASET,
    DROID,
    STRICT,
    TRACKER,
    TRAINED,
    WORLD,
    Common,
    setting,
    with_common,
)
from persistworld_cli.commands.run import execute
from persistworld_cli.commands.weights import START, start_from
from persistworld_cli.config.requests import PostTrainRequest

EXAMPLES = {
    "": ("persistworld post-train --set post_train.beta=0.5 --set post_train.kl=0 --dry-run",),
    WORLD: (
        "persistworld post-train --updates 40",
        "persistworld post-train --updates 40 --num-processes 2",
        "persistworld post-train --groups 1 --num-processes 2 --split-groups --tracker none",
    ),
    TRAINED: ("persistworld post-train --resume-from outputs/post-train-tiny --output outputs/longer --updates 80",),
    DROID: ("persistworld post-train --preset persistworld --dataset droid_latents --num-processes 8",),
}


@with_common(
    "full",
    DATASET,
    setting("post_train.updates", "Updates in total."),
    setting("post_train.groups", "Start states per update, over all processes."),
    setting("post_train.candidates", "Continuations drawn from each start state."),
    setting("post_train.split_groups", "Allow fewer groups than processes: several share one group's candidates."),
    setting("post_train.lr", "Learning rate."),
    setting("post_train.seed", "Random seed."),
    TRACKER,
    STRICT,
    cost=True,
)
def command(common: Common, request: PostTrainRequest, ckpt: str | None = START) -> None:
    """Post-train on own rollouts: draw continuations, score them against the record, learn from the best and worst."""
    start_from(common, ckpt, adapter_fits=False)
    execute(common, request)
