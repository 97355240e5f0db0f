"""``persistworld leaderboard``: policies by what was imagined of them, against what really came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persistworld_cli.commands.options import Common, with_common
from persistworld_cli.commands.run import write_json
from persistworld_cli.commands.weights_plan import show_plan
from persistworld_cli.console import stdout_console

EXAMPLES = (
    "persistworld leaderboard outputs/hold outputs/scripted",
    "persistworld leaderboard pi05=outputs/a pi0=outputs/b --real real.csv",
    "persistworld leaderboard outputs/* --real sim --json",
)


@with_common(launch="none", without=("output", "preset", "sets"))
def command(
    common: Common,
    runs: Annotated[
        list[str],
        typer.Argument(help="Outputs of pi-rollout; NAME=FOLDER calls a policy by another name.", metavar="FOLDERS"),
    ],
    real: Annotated[
        str | None,
        typer.Option(
            help="Real results: CSV with policy,task,success (0 .. 1),n; or sim, of runs made --against sim.",
            metavar="FILE|sim",
        ),
    ] = None,
) -> None:
    """Success and progress of policies' rollouts; with real results, Pearson's r and mean maximum rank violation."""
    if common.dry_run:
        show_plan("leaderboard", {"runs": runs, "real": real}, common, "no settings: files are read, nothing is run")
        return
    from persistworld_cli.policies.leaderboard import SIMULATOR, build_leaderboard, read_real, read_runs
    from persistworld_cli.reports.policy_tables import leaderboard_tables

    imagined, simulated = read_runs(runs)
    wanted = simulated if real == SIMULATOR else read_real(Path(real)) if real else None
    result = build_leaderboard(imagined, wanted)
    if common.as_json:
        write_json(result)
    else:
        stdout_console().print(leaderboard_tables(result))
