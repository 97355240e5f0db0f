"""``persistworld study-report``: which model the raters of a blind study prefer."""

from __future__ import annotations

from persistworld_cli.commands.options import Common, with_common
from persistworld_cli.commands.run import show_plan, show_tables, write_json
from persistworld_cli.config.requests import StudyReportRequest
from persistworld_cli.console import note

EXAMPLES = {
    "After persistworld eval --study outputs/study, with the raters' files in answers": (
        "persistworld study-report answers/*.json --key outputs/study.key.json",
        "persistworld study-report answers/*.json --json",
    ),
}


@with_common("none", without=("output", "preset", "sets"))
def command(common: Common, request: StudyReportRequest) -> None:
    """Report preference rate, binomial p, Elo and agreement of raters from the responses to a study of eval --study."""
    if common.dry_run:
        show_plan(common, request)
        return
    note(f"study-report: reading {len(request.files)} files")
    from persistworld_cli.study.responses import read_study, study_result
    from persistworld_cli.study.tables import study_tables

    result = study_result(*read_study(request.files, request.keys))
    if common.as_json:
        write_json(result)
    else:
        show_tables(study_tables(result))
