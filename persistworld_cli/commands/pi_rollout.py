"""``persistworld pi-rollout``: a policy acts in the world model, over openpi's websocket protocol."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from persistworld_cli.commands.options import (
    ADAPTER,
    CKPT,
    COMPILE,
    DATASET,
    DROID,
    STRICT,
    WORLD,
    Common,
    setting,
    with_common,
)
from persistworld_cli.commands.run import execute
from persistworld_cli.config.requests import PolicyRolloutRequest
from persistworld_cli.config.settings import Settings

if TYPE_CHECKING:
    from rich.console import RenderableType

EXAMPLES = {
    WORLD: ("persistworld pi-rollout", "persistworld pi-rollout --judge bundled-world --rollouts 8"),
    f"{WORLD}, with MuJoCo": ("persistworld pi-rollout --judge bundled-world --against sim --rollouts 8",),
    f"{WORLD}, with persistworld policy-server in another terminal": (
        "persistworld pi-rollout --policy ws://127.0.0.1:8000 --steps 8",
    ),
    f"{DROID}, with openpi's server": (
        "persistworld pi-rollout --preset persistworld --dataset droid_latents --task pickplace --policy server "
        "--rollouts 4",
    ),
}


@with_common(
    "single",
    setting("policy.task", "Task: start frames, instruction, skip, gripper cap and stops."),
    setting("policy.actions", "Action space of the policy (docs/policies.md lists openpi's configs)."),
    setting("policy.steps", "Interaction steps of a rollout."),
    setting("policy.seed", "Random seed."),
    CKPT,
    ADAPTER,
    DATASET,
    COMPILE,
    STRICT,
    cost=True,
)
def command(common: Common, request: PolicyRolloutRequest) -> None:
    """Let a policy act in the world model: it sees the predicted images and answers with actions."""
    execute(common, request, functools.partial(_check_names, request), _tables)


def _check_names(request: PolicyRolloutRequest, settings: Settings) -> None:
    """Refuse unknown names at once: the worker, which also makes a user's classes, loads torch first."""
    from persistworld_cli.config.fields import MODULE_CLASS
    from persistworld_cli.policies.judge import check_judge
    from persistworld_cli.policies.source import check_policy
    from persistworld_cli.policies.tasks import load_task

    load_task(settings.policy.task)
    if not MODULE_CLASS.fullmatch(request.policy):
        check_policy(request.policy, settings.policy.actions)
    if request.judge:
        check_judge(request.judge)


def _tables(result: Mapping[str, Any]) -> list[RenderableType]:
    from persistworld_cli.reports.policy_tables import rollout_tables

    return rollout_tables(result)
