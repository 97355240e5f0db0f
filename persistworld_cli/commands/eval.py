"""``persistworld eval``: the closed-loop benchmark, paired against a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from persistworld_cli.commands.options import DROID, ROLLOUTS, TRAINED, WORLD, Common, setting, with_common
from persistworld_cli.commands.run import execute, saved, show_tables, write_json
from persistworld_cli.config.requests import EvalRequest, option
from persistworld_cli.console import note
from persistworld_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = {
    WORLD: (
        "persistworld eval",
        "persistworld eval --ckpt bundled:presets/tiny/adapter --study outputs/study",
        "persistworld eval --benchmark bundled --seed 0 --seed 1",
    ),
    TRAINED: ("persistworld eval --ckpt outputs/post-train-tiny/weights",),
    DROID: ("persistworld eval --preset persistworld --dataset droid_latents --num-processes 8",),
}


@with_common(
    "full",
    *ROLLOUTS,
    setting(
        "eval.masks",
        "Also measure on the pixels of DIR/EPISODE/CAMERA/FRAME.png; may be repeated.",
        metavar="[NAME=]DIR",
    ),
    setting("eval.fvd", "Also compute the Fréchet video distance: weights of torchvision's R3D-18.", metavar="PATH"),
    cost=True,
)
def command(
    common: Common,
    request: EvalRequest,
    compare: tuple[str, ...] | None = option(
        (),
        "Finished result to compare this run with; given twice, the two are compared and nothing is run.",
        metavar="EVAL.JSON",
    ),
) -> None:
    """Roll out held-out episodes in closed loop and measure them against the record, paired with a baseline."""
    others = compare or ()
    if len(others) > 2:
        raise UsageError(f"{len(others)} results to compare", where="--compare", fix="give one or two")
    if len(others) == 2:
        for flag, given in (("--profile", common.profile), ("--compile", common.flags["launch.compile"])):
            if given:
                raise UsageError("two finished results: nothing is run", where=flag, fix="leave it out")
        compare_finished(common, others)
        return
    execute(common, replace(request, compare="".join(others)), tables=_tables)


def _tables(result: Mapping[str, Any]) -> list[Table]:
    """Tables of the result, and of its comparison with another one."""
    from persistworld_cli.reports.tables import eval_table, eval_tables

    shown = eval_tables(saved(result["json"]))
    return [*shown, eval_table(saved(result["compare_json"]))] if "compare_json" in result else shown


def compare_finished(common: Common, paths: Sequence[str]) -> None:
    """Print two finished results against each other, the first as the baseline."""
    from persistworld_cli.evaluation.comparing import compare_files

    first, second = paths
    note(f"eval: comparing {first} and {second}")
    against, table = compare_files(first, second)
    if common.as_json:
        write_json(against)
    else:
        show_tables([table])
