"""``persistworld replay``: recorded actions, replayed in the world model from one real frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from persistworld_cli.commands.options import COMPILE, DATASET, STRICT, TRAINED, WORLD, Common, setting, with_common
from persistworld_cli.commands.run import execute, saved
from persistworld_cli.config.requests import ReplayRequest

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = {
    WORLD: ("persistworld replay", "persistworld replay --episode 66 --start 8 --steps 12"),
    TRAINED: ("persistworld replay --episode 66 --adapter base --adapter outputs/post-train-tiny/weights",),
}


@with_common(
    "single",
    setting("eval.episodes", "Episode; may be repeated.  \\[the first held-out one]", "--episode"),
    setting("eval.starts", "Frame to start from; may be repeated.", "--start"),
    setting("eval.steps", "Interaction steps of a rollout (4 new frames each)."),
    setting("eval.seeds", "Random seed; may be repeated.", "--seed"),
    DATASET,
    setting("eval.split", "Split to look for the episode in: train or val."),
    COMPILE,
    STRICT,
    cost=True,
)
def command(common: Common, request: ReplayRequest) -> None:
    """Replay recorded actions: prediction above recording as mp4 and contact sheet, and metrics for every step."""
    execute(common, request, tables=_tables)


def _tables(result: Mapping[str, Any]) -> list[Table]:
    from persistworld_cli.reports.tables import steps_tables

    return steps_tables(saved(result["json"]))
