"""``persistworld leaderboard``: rank policies by world-model success rate; correlate with real success."""

from __future__ import annotations

from pathlib import Path

from persistworld_cli.commands.options import Common, with_common
from persistworld_cli.commands.run import show_plan, show_tables, write_json
from persistworld_cli.config.requests import LeaderboardRequest
from persistworld_cli.console import note

EXAMPLES = {
    "After persistworld pi-rollout --judge bundled-world --policy hold -o outputs/hold, and so on": (
        "persistworld leaderboard outputs/hold outputs/scripted",
        "persistworld leaderboard pi05=outputs/a pi0=outputs/b --real real.csv",
    ),
    "After the same with --against sim": ("persistworld leaderboard outputs/hold outputs/scripted --real sim --json",),
}


@with_common("none", without=("output", "preset", "sets"))
def command(common: Common, request: LeaderboardRequest) -> None:
    """Rank policies by world-model success rate; with real results, Pearson's r and mean maximum rank violation."""
    if common.dry_run:
        show_plan(common, request)
        return
    note(f"leaderboard: reading {', '.join(request.runs)}")
    from persistworld_cli.policies.leaderboard import SIMULATOR, build_leaderboard, read_real, read_runs
    from persistworld_cli.reports.policy_tables import leaderboard_tables

    imagined, simulated = read_runs(request.runs)
    by_simulator = request.real == SIMULATOR
    wanted = simulated if by_simulator else read_real(Path(request.real)) if request.real else None
    result = build_leaderboard(imagined, wanted, simulated=by_simulator)
    if common.as_json:
        write_json(result)
    else:
        show_tables(leaderboard_tables(result))
