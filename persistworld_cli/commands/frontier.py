"""``persistworld frontier``: how few network calls are enough for this checkpoint?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from persistworld_cli.commands.options import DROID, ROLLOUTS, TRAINED, WORLD, Common, with_common
from persistworld_cli.commands.run import execute, saved
from persistworld_cli.config.presets import DEFAULT_PRESET
from persistworld_cli.config.requests import FrontierRequest

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = {
    WORLD: (
        "persistworld frontier --calls 1,2,4,8 --sampler euler,dpmpp-2m",
        "persistworld frontier --write-preset outputs/fast.toml",
    ),
    TRAINED: ("persistworld frontier --adapter outputs/post-train-tiny/weights --baseline base --calls 1,4",),
    DROID: (
        "persistworld frontier --preset ctrl-world --dataset droid_latents --num-processes 8 "
        "--vary sigma_min=0.002,0.05 --vary guidance=1,2",
    ),
}


@with_common("full", *ROLLOUTS)
def command(common: Common, request: FrontierRequest) -> None:
    """Measure quality against network calls: samplers and steps on held-out rollouts, paired with a slow reference."""
    execute(common, replace(request, preset=common.preset or DEFAULT_PRESET), tables=_tables)


def _tables(result: Mapping[str, Any]) -> list[Table]:
    from persistworld_cli.frontier.report import frontier_table

    return [frontier_table(saved(result["json"]))]
