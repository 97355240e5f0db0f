"""What a command on a checkpoint would do (``--dry-run``): such a command has settings only where it is given some."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persistworld_cli.commands.options import Common
from persistworld_cli.commands.run import resolve, show_settings, write_json
from persistworld_cli.console import stdout_console


def show_plan(
    task: str,
    job: Mapping[str, Any],
    common: Common,
    otherwise: str = "preset: the bundled one that the checkpoint fits",
) -> None:
    """The job, and the settings where ``--preset`` or ``--set`` names some; otherwise the checkpoint decides.

    Args:
        task: the command's name.
        job: its own options; JSON values.
        common: the shared options.
        otherwise: said where no preset is named.
    """
    output = str(job.get("output") or "standard output")
    own = {name: value for name, value in job.items() if name != "output"}
    if common.preset or common.sets:
        show_settings(task, resolve(common), own, Path(output), as_json=common.as_json)
        return
    if common.as_json:
        write_json({"task": task, "preset": None, "output": output, "job": own, "settings": {}})
        return
    from rich.markup import escape

    console = stdout_console()
    console.print(f"[bold]{task}[/bold] into {escape(output)} (dry run: nothing is done)")
    for name, value in own.items():
        console.print(f"  {name}: {escape('-' if value in (None, '') else str(value))}")
    console.print(f"  {otherwise}")
