"""``persistworld study-report``: what the raters of a blind study prefer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persistworld_cli.commands.options import Common, with_common
from persistworld_cli.commands.run import write_json
from persistworld_cli.commands.weights_plan import show_plan
from persistworld_cli.console import stdout_console

EXAMPLES = (
    "persistworld study-report answers/*.json --key outputs/study.key.json",
    "persistworld study-report answers/*.json --json",
)


@with_common(launch="none", without=("output", "preset", "sets"))
def command(
    common: Common,
    files: Annotated[list[Path], typer.Argument(help="Files that raters downloaded from the page.", metavar="FILES")],
    keys: Annotated[
        list[Path] | None,
        typer.Option(
            "--key",
            help="Key of the study (DIR.key.json); may be repeated for several studies.  \\[found near the files]",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Preference rate, binomial p, Elo and agreement of raters, from the answers to `persistworld eval --study DIR`."""
    if common.dry_run:
        job = {"files": [str(file) for file in files], "keys": [str(key) for key in keys or ()] or None}
        show_plan("study-report", job, common, "no settings: files are read, and the result is printed")
        return
    from persistworld_cli.study.responses import read_study, study_result
    from persistworld_cli.study.tables import study_tables

    result = study_result(*read_study(files, keys or ()))
    if common.as_json:
        write_json(result)
    else:
        stdout_console().print(study_tables(result))
