"""The terminal's tables as HTML, so that a page shows what the terminal shows."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

_CLASSES = {"green": "better", "red": "worse", "dim": "ref", "yellow": "open"}


def html_table(table: Table) -> str:
    """A table of texts with its caption; the title is left to the page."""
    columns = table.columns
    heads = "".join(f"<th{_side(column.justify)}>{_text(column.header)}</th>" for column in columns)
    lines, fresh = [f"<thead><tr>{heads}</tr></thead>"], False
    for row, cells in zip(table.rows, zip(*(column.cells for column in columns), strict=True), strict=True):
        names = [_CLASSES.get(str(row.style or ""), ""), "group" if fresh else ""]
        shown = "".join(_cell(cell, column.justify) for cell, column in zip(cells, columns, strict=True))
        lines.append(f'<tr class="{" ".join(name for name in names if name)}">{shown}</tr>')
        fresh = row.end_section
    caption = f'<p class="caption">{_text(table.caption)}</p>' if table.caption else ""
    return f'<div class="wide"><table>{"".join(lines)}</table></div>{caption}'


def _cell(cell: RenderableType, justify: str) -> str:
    style = _CLASSES.get(str(cell.style), "") if isinstance(cell, Text) else ""
    return f"<td{_side(justify)}{f' data-style={style}' if style else ''}>{_text(cell)}</td>"


def _side(justify: str) -> str:
    return ' class="num"' if justify == "right" else ""


def _text(cell: RenderableType) -> str:
    """Escaped, lines kept, Rich's markup left out."""
    text = cell if isinstance(cell, Text) else Text.from_markup(str(cell))
    return html.escape(text.plain).replace("\n", "<br>")


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested tables by dotted names."""
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return rows
