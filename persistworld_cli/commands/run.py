"""What every command does: resolve settings, show them or run the work, print the result."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from persistworld_cli.command_line import command_line
from persistworld_cli.commands.hints import hints
from persistworld_cli.commands.options import Common
from persistworld_cli.commands.weights import weights_lines, weights_rows
from persistworld_cli.config.presets import Resolved, flatten, load_settings, resolve_settings
from persistworld_cli.config.requests import Request, TaskRequest, request_to_json
from persistworld_cli.config.settings import Settings
from persistworld_cli.console import note, stdout_console, write_out
from persistworld_cli.cost.report import cost_report, pick_accelerator, show_cost
from persistworld_cli.evaluation.benchmarks import load_benchmark
from persistworld_cli.files import flat, jsonable
from persistworld_cli.read_files import read_json

if TYPE_CHECKING:
    from rich.console import RenderableType

_SHOWN_ROWS = 40  # of a table in a result; the file has all


def resolve(common: Common) -> Resolved:
    """Settings from preset, benchmark, environment, ``--set`` and flags; prints a note if the bundled world is used."""
    pinned = None
    if "eval.benchmark" in common.flags:  # of the commands that measure on one
        named = common.flags["eval.benchmark"]
        found = load_benchmark(named or load_settings(common.preset, common.sets or ()).eval.benchmark)
        pinned = found.pinned if found else None
    resolved = resolve_settings(
        common.preset, common.sets or (), common.all_flags(), flag_names=common.names, pinned=pinned
    )
    if resolved.implied:
        note(f"no --preset: using the bundled world (preset {resolved.preset})")
    return resolved


def execute(
    common: Common,
    request: TaskRequest,
    check: Callable[[Settings], None] | None = None,
    tables: Callable[[Mapping[str, Any]], Iterable[RenderableType]] | None = None,
) -> None:
    """Run a command whose work is done by a worker: resolve settings, show or launch, print the result.

    Args:
        common: the shared options and flags.
        request: the command's own options.
        check: looks at the resolved settings before anything starts; raises UsageError.
        tables: what to show of the result and of the files it names; by default, the result itself.
    """
    device = pick_accelerator(common.accelerator, dry_run=common.dry_run)
    resolved = resolve(common)
    if check is not None:
        check(resolved.settings)
    output = common.output if common.output is not None else Path("outputs") / f"{request.task}-{resolved.label}"
    request = replace(request, output=output, command=tuple(command_line()), profile=common.profile)
    note(f"{request.task}: {'dry run' if common.dry_run else f'output goes to {output}'}")
    weights = weights_rows(resolved, request)
    lines = [*weights_lines(weights), *hints(resolved, request)]
    if common.dry_run:
        show = functools.partial(show_plan, common, request, resolved, output=str(output), weights=weights, lines=lines)
        if not common.as_json:
            show()
        report = cost_report(request.task, resolved.settings)
        if common.as_json:
            show(cost=report.as_json(device) if report else None)
        elif report:
            show_cost(request.task, report, device)
        return
    for line in lines:
        note(f"{request.task}: {line}")
    from persistworld_cli.launch.launcher import run_task

    code, result = run_task(resolved.settings, request, take_over=common.take_over)
    if code:
        raise typer.Exit(code)  # the worker has reported the reason
    code = int(result.pop("exit_code", 0))  # work that finished, but not all of it as requested (an unreadable episode)
    show_result(result, as_json=common.as_json, tables=tables)
    if code:
        raise typer.Exit(code)


def show_plan(
    common: Common,
    request: Request,
    resolved: Resolved | None = None,
    *,
    output: str = "standard output",
    cost: Mapping[str, Any] | None = None,
    weights: Sequence[Mapping[str, str]] = (),
    lines: Sequence[str] = (),
) -> None:
    """What a command would do (``--dry-run``): the whole request, and every setting with the layer it came from.

    Args:
        common: the shared options.
        request: the command's own.
        resolved: its settings, if it has any.
        output: where the result goes.
        cost: for the JSON.
        weights: the task's weights, for the JSON.
        lines: the same and more, as text.
    """
    values = flatten(resolved.settings) if resolved else {}
    origin = resolved.origin if resolved else {}
    if common.as_json:
        write_json(
            {"task": request.task, "preset": resolved.preset if resolved else None, "output": output}
            | {"request": request_to_json(request)}
            | {"settings": {key: {"value": jsonable(value), "origin": origin[key]} for key, value in values.items()}}
            | ({"weights": [dict(row) for row in weights]} if weights else {})
            | ({"cost": cost} if cost is not None else {})
        )
        return
    from rich.markup import escape

    from persistworld_cli.reports.tables import new_table

    table = new_table(None, ["setting", "value", "from"])
    table.columns[-1].no_wrap = True
    last = ""
    for key, value in values.items():
        if last and key.partition(".")[0] != last:
            table.add_section()
        last = key.partition(".")[0]
        table.add_row(key, escape(_text(value)), escape(origin[key]), style="dim" if origin[key] == "default" else None)
    console = stdout_console()
    console.print(f"[bold]{request.task}[/bold] into {escape(output)} (dry run: nothing is done)")
    for line in lines:
        console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
    for name, value in request_to_json(request).items():
        if name not in ("output", "command"):
            console.print(f"  {name}: {escape(_text(value))}")
    if resolved:
        console.print(table)


def resolve_if_named(common: Common) -> Resolved | None:
    """The settings if ``--preset`` or ``--set`` is given; otherwise None, and the checkpoint decides."""
    return resolve(common) if common.preset or common.sets else None


def show_result(
    result: Mapping[str, Any],
    *,
    as_json: bool,
    tables: Callable[[Mapping[str, Any]], Iterable[RenderableType]] | None = None,
) -> None:
    """A command's result: JSON, or tables for people.

    A list of mappings becomes a table, everything else a line ``name  value``. If there are ``tables``, or the result
    names a text file, these are shown instead, and then only paths of files follow.
    """
    if as_json:
        write_json(dict(result))
        return
    from rich.markup import escape

    from persistworld_cli.reports.tables import new_table

    console, text = stdout_console(), Path(str(result.get("text") or ""))
    if tables:
        show_tables(tables(result))
    elif text.is_file():
        write_out(text.read_text(encoding="utf-8") + "\n")
    if tables or text.is_file():
        result = {key: value for key, value in result.items() if key != "text" and _are_files(value)}
    lines = new_table(None, ["name", "value"])
    lines.show_header = False
    for name, value in flat(result).items():
        if _is_table(value):
            columns = [column for column in value[0] if any(row.get(column) is not None for row in value)]
            table = new_table(escape(name), list(map(escape, columns)))
            for row in value[:_SHOWN_ROWS]:
                table.add_row(*(escape(_text(row.get(column))) for column in columns))
            console.print(table)
            if len(value) > _SHOWN_ROWS:
                console.print(f"... and {len(value) - _SHOWN_ROWS} more rows")
        else:
            lines.add_row(f"[bold]{escape(name)}[/bold]", escape(_text(value)))
    if lines.row_count:
        console.print(lines)


def saved(path: str) -> dict[str, Any]:
    """A result's JSON file."""
    return read_json(Path(path), "unreadable result")


def show_tables(tables: Iterable[RenderableType]) -> None:
    """Tables on standard output, with an empty line between them."""
    from persistworld_cli.reports.tables import spaced

    stdout_console().print(spaced(tables))


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _are_files(value: Any) -> bool:
    """Whether a value is the path of an existing file, or a list of such paths."""
    paths = value if isinstance(value, list) else [value]
    return bool(paths) and all(isinstance(path, str) and Path(path).is_file() for path in paths)


def write_json(data: Mapping[str, Any]) -> None:
    """One JSON document on standard output."""
    write_out(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _text(value: Any) -> str:
    """A value as text for people."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items()) or "-"
    return "-" if value is None or value == "" else str(value)
