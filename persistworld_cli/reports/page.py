"""One self-contained HTML page with tables, curves, contact sheets and videos."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from persistworld_cli.files import flat, write_text
from persistworld_cli.reports.tables import diagnostics_table, eval_table


def render(template: Path, **values: object) -> str:
    """Fill a Jinja template with escaped values; tables are Rich's, so the page shows what the terminal shows."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"rows": _rows, "plain": _plain, "base64": _base64}
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)


def _rows(table: Table) -> list[tuple[object, tuple[RenderableType, ...]]]:
    """Each row of a table with its cells."""
    return list(zip(table.rows, zip(*(column.cells for column in table.columns), strict=True), strict=True))


def _plain(cell: RenderableType) -> str:
    """The text of a cell, without Rich's markup."""
    return (cell if isinstance(cell, Text) else Text.from_markup(str(cell))).plain


def _base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def write_page(path: Path, result: Mapping[str, Any], images: Sequence[Path], videos: Sequence[Path]) -> None:
    """Write the page of an ``eval.json``'s dictionary.

    Images are PNG files; those in a folder ``sheets`` are wider than the page. A video with the name of an image is
    shown below it.
    """
    files = [*images, *videos]
    stems = dict.fromkeys(file.stem for file in files)
    page = render(
        Path(__file__).with_name("report.html"),
        made=_made(result),
        title=" against ".join(model["label"] for model in reversed(result["models"])),
        tables=[eval_table(result), *([diagnostics_table(result)] if "action_following" in result else [])],
        figures=[(_heading(stem), [file for file in files if file.stem == stem]) for stem in stems],
        cameras=_camera_table(result),
        provenance=_provenance(result).items(),
    )
    write_text(path, page)


def _heading(stem: str) -> str:
    """``best_episode-9_start-0_seed-1`` -> ``best: episode 9, start 0, seed 1``."""
    lead, *rest = stem.split("_")
    return f"{lead}: {', '.join(rest).replace('-', ' ')}" if rest else lead


def _camera_table(result: Mapping[str, Any]) -> Table | None:
    """The first table, one camera at a time."""
    if not result.get("cameras"):
        return None
    names = list(dict.fromkeys(row["cameras"] for row in result["cameras"]))
    table = eval_table({**result, "groups": names, "table": result["cameras"], "paired": []})
    table.caption = None
    return table


def _made(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the page shows: checkpoints, and by which command, when, and by which commit of the program it was made."""
    rows = []
    for model in result["models"]:
        adapter = f" with adapter {model['adapter']}" if model.get("adapter") else ""
        digest = f", SHA-256 {model['ckpt_sha256'][:12]}" if model.get("ckpt_sha256") else ""
        rows.append((model["label"], f"{model['ckpt']}{digest}{adapter}"))
    return rows + [(key, str(result[key])) for key in ("command", "date", "commit") if result.get(key)]


def _provenance(result: Mapping[str, Any]) -> dict[str, Any]:
    """Protocol, weights, device and versions, by dotted names."""
    rows = flat({key: value for key, value in result["protocol"].items() if key not in ("items", "state_percentiles")})
    for model in result["models"]:
        shown = {key: value for key, value in model.items() if key not in ("label", "state_percentiles")}
        rows |= flat(shown, f"{model['label']}: ")
    kept = ("dataset", "device", "device_name", "dtype", "versions")
    return rows | flat({key: result[key] for key in kept if key in result})
