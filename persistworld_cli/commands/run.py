"""What every command does: resolve settings, show them or run the work, print the result."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from persistworld_cli.commands.cost import cost_report, pick_accelerator, show_cost
from persistworld_cli.commands.options import Common
from persistworld_cli.commands.weights import weights_lines, weights_rows
from persistworld_cli.config.presets import Pinned, Resolved, flatten, load_settings, to_json
from persistworld_cli.config.settings import Settings
from persistworld_cli.console import note, stdout_console, write_out
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import flat

_SHOWN_ROWS = 40  # of a table in a result; the file has all


def resolve(
    common: Common,
    flags: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    pinned: Pinned | None = None,
) -> Resolved:
    """Settings from preset, environment, ``--set`` and this command's flags; says so where the bundled world is taken.

    Args:
        common: the shared options.
        flags: dotted key -> value of a flag, None where it was not given.
        names: dotted key -> the flag's spelling, where it is not ``--<key>``.
        pinned: what a benchmark sets.
    """
    resolved = load_settings(
        common.preset, common.sets or (), {**(flags or {}), **common.launch_flags()}, flag_names=names, pinned=pinned
    )
    if resolved.implied:
        note(f"no --preset: using the bundled world (preset {resolved.preset})")
    return resolved


def execute(
    task: str,
    common: Common,
    *,
    flags: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    job: Mapping[str, Any] | None = None,
    folder: str | None = None,
    accelerator: str | None = None,
    pinned: Pinned | None = None,
    check: Callable[[Settings], None] | None = None,
    hint: Callable[[Resolved], str] | None = None,
    terminal: bool = False,
    with_changes: bool = False,
) -> None:
    """A whole command whose work is done by a worker: resolve, show or launch, print.

    Args:
        task: name in the worker's table.
        common: the shared options.
        flags, names: as for `resolve`.
        job: what is asked for beside the settings; JSON values. The worker gets ``output`` added.
        folder: name of the default output folder, if it is not the task's.
        accelerator: what a dry run's floors are for; None: the default.
        pinned: as for `resolve`.
        check: looks at the resolved settings before anything starts; raises UsageError.
        hint: what to say of the weights it begins from, "" for nothing.
        terminal: the worker reads keys from the terminal.
        with_changes: go on with finished work although settings changed.
    """
    device = pick_accelerator(accelerator, dry_run=common.dry_run)
    resolved = resolve(common, flags, names, pinned)
    if check is not None:
        check(resolved.settings)
    output = output_folder(common, resolved, folder or task)
    job = {**(job or {}), **({"profile": True} if common.profile else {})}
    weights = weights_rows(task, resolved, job)
    lines = weights_lines(weights)
    if hint is not None and (text := hint(resolved)):
        lines.append(text)
    if common.dry_run:
        report = cost_report(task, resolved.settings)
        cost = report.as_json(device) if report else None
        show_settings(task, resolved, job, output, as_json=common.as_json, cost=cost, weights=weights, lines=lines)
        if report and not common.as_json:
            show_cost(task, report, device)
        return
    for line in lines:
        note(f"{task}: {line}")
    result = launch_worker(
        task, resolved, job, output, terminal=terminal, take_over=common.take_over, with_changes=with_changes
    )
    code = int(result.pop("exit_code", 0))  # work that finished, but not all of it as asked (an unreadable episode)
    show_result(result, as_json=common.as_json)
    if code:
        raise typer.Exit(code)


def output_folder(common: Common, resolved: Resolved, name: str) -> Path:
    """``--output``, or ``outputs/<name>-<preset>`` in the current folder."""
    return common.output if common.output is not None else Path("outputs") / f"{name}-{resolved.label}"


def launch_worker(
    task: str,
    resolved: Resolved,
    job: dict[str, Any],
    output: Path,
    *,
    terminal: bool = False,
    take_over: bool = False,
    with_changes: bool = False,
) -> dict[str, Any]:
    """Hand the work to worker processes and wait for them; the options are those of `launcher.run_task`.

    Returns:
        What the task returned (``<output>/result.json``).

    Raises:
        typer.Exit: the worker failed and has said why; its exit code is passed on.
        PersistWorldError: the output folder cannot be written, or is another run's.
    """
    from persistworld_cli.launch.launcher import run_task

    code, result = run_task(
        task,
        resolved.settings,
        job,
        output,
        terminal=terminal,
        take_over=take_over,
        with_changes=with_changes,
        command=command_line(),
    )
    if code:
        raise typer.Exit(code)
    return result


def command_line() -> list[str]:
    """This command as it was typed."""
    return ["persistworld", *sys.argv[1:]]


def show_settings(
    task: str,
    resolved: Resolved,
    job: Mapping[str, Any],
    output: Path,
    *,
    as_json: bool,
    cost: Mapping[str, Any] | None = None,
    weights: Sequence[Mapping[str, str]] = (),
    lines: Sequence[str] = (),
) -> None:
    """Every setting with its value and the layer it came from (``--dry-run``); ``cost`` stands beside them in JSON.

    ``weights`` are those that the task takes, ``lines`` the same in words.
    """
    values = flatten(resolved.settings)
    if as_json:
        plain = to_json(resolved.settings)
        settings = {
            key: {"value": plain[key.partition(".")[0]][key.partition(".")[2]], "origin": resolved.origin[key]}
            for key in values
        }
        data: dict[str, Any] = {"task": task, "preset": resolved.preset, "output": str(output), "job": dict(job)}
        data |= {"settings": settings} | ({"weights": [dict(row) for row in weights]} if weights else {})
        write_json(data if cost is None else {**data, "cost": cost})
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("setting", "value", "from", box=None, header_style="bold", pad_edge=False)
    last = ""
    for key, value in values.items():
        if last and key.partition(".")[0] != last:
            table.add_section()
        last = key.partition(".")[0]
        default = resolved.origin[key] == "default"
        table.add_row(key, escape(_text(value)), escape(resolved.origin[key]), style="dim" if default else None)
    console = stdout_console()
    console.print(f"[bold]{task}[/bold] into {escape(str(output))} (dry run: nothing is done)")
    for line in lines:
        console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
    for name, value in job.items():
        console.print(f"  {name}: {escape(_text(value))}")
    console.print(table)


def show_result(result: Mapping[str, Any], *, as_json: bool) -> None:
    """A command's result: JSON, or tables for people.

    Scalars and nested tables of scalars become lines ``name  value``; a list of mappings with the same keys becomes a
    table of its own; other lists are counted. A result that names a rendered report (`text`) is shown by that, and by
    the files beside it.
    """
    if as_json:
        write_json(dict(result))
        return
    from rich.markup import escape
    from rich.table import Table

    console = stdout_console()
    rendered = Path(str(result.get("text") or ""))
    if rendered.is_file():
        write_out(rendered.read_text(encoding="utf-8") + "\n")
        result = {key: value for key, value in result.items() if key != "text" and _are_files(value)}
    lines = Table(box=None, show_header=False, pad_edge=False)
    for name, value in flat(result).items():
        if _is_table(value):
            table = Table(*value[0].keys(), title=name, title_justify="left", title_style="bold", header_style="bold")
            for row in value[:_SHOWN_ROWS]:
                table.add_row(*(escape(_text(row.get(column))) for column in value[0]))
            console.print(table)
            if len(value) > _SHOWN_ROWS:
                console.print(f"... and {len(value) - _SHOWN_ROWS} more rows")
        else:
            lines.add_row(f"[bold]{escape(name)}[/bold]", escape(_text(value)))
    if lines.row_count:
        console.print(lines)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _are_files(value: Any) -> bool:
    """A path of a file that is there, or a list of such."""
    paths = value if isinstance(value, list) else [value]
    return bool(paths) and all(isinstance(path, str) and Path(path).is_file() for path in paths)


def write_json(data: Mapping[str, Any]) -> None:
    """One JSON document on standard output."""
    write_out(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def episode_list(text: str | None) -> tuple[str, ...] | None:
    """``99,199`` as episode ids; None where the flag was not given. Raises PersistWorldError where it is empty."""
    if text is None:
        return None
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise PersistWorldError("no episode is named", where="--episodes", fix="write --episodes 99,199")
    return names


def _text(value: Any) -> str:
    """A value as a person writes it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items()) or "-"
    return "-" if value is None or value == "" else str(value)
