"""One HTML page with table, curves, sheets and videos in it: no other file, no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from persistworld_cli.reports.tables import heading, number, reward_words, win_rate

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}table{border-collapse:collapse;margin:1em 0}
td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd;vertical-align:top}th{background:#f4f4f6}
td:first-child,td:nth-child(2),th:first-child,th:nth-child(2){text-align:left}
.ref{color:#888}.better{color:#187a2b;font-weight:600}.worse{color:#b3261e;font-weight:600}
img,video{max-width:100%;display:block;margin:.6em 0;border-radius:4px}small,pre{color:#666}pre{white-space:pre-wrap}
.group td{border-top:2px solid #999}
"""


def write_page(path: Path, result: Mapping[str, Any], pictures: Sequence[Path], films: Sequence[Path]) -> None:
    """Write the page.

    Args:
        path: HTML file to write.
        result: ``eval.json``'s dictionary.
        pictures: PNG files to put in, in order.
        films: mp4 files to put in, in order.
    """
    n = result["n"]
    title = " against ".join(model["label"] for model in reversed(result["models"]))
    seconds = n["steps"] * n["frames_per_step"] / n["rate_hz"]
    parts = [
        f"<h1>Closed loop: {html.escape(title)}</h1>",
        f"<p>{n['rollouts']} rollouts of {n['episodes']} held-out episodes, each from one frame, {n['steps']} steps = "
        f"{seconds:.1f} s; {html.escape(n['sampler'])}, {n['sampling_steps']} sampling steps.</p>",
        _table(result),
        *(f"<p>reward, {html.escape(name)} cameras: {html.escape(words)}</p>" for name, words in _rewards(result)),
        *(f"<h2>{html.escape(_name(file))}</h2>{_embed(file, 'img', 'image/png')}" for file in pictures),
        *(f"<h2>{html.escape(_name(file))}</h2>{_embed(file, 'video', 'video/mp4')}" for file in films),
        f"<h2>protocol</h2><pre>{html.escape(_protocol(result))}</pre>",
    ]
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    beside = path.with_name(f".{path.name}")
    beside.write_text(f"<!doctype html><html lang=en><head>{head}</head><body>{body}</body></html>\n", encoding="utf-8")
    beside.replace(path)


def _rewards(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    return list(reward_words(result).items()) if result["paired"] else []


def _name(file: Path) -> str:
    return file.stem.replace("_", " ")


def _embed(file: Path, tag: str, kind: str) -> str:
    """A file as a data URL."""
    url = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
    return (
        f'<img alt="{html.escape(_name(file))}" src="{url}">'
        if tag == "img"
        else f'<video controls loop src="{url}"></video>'
    )


def _table(result: Mapping[str, Any]) -> str:
    """The benchmark's table."""
    metrics = result["metrics"]
    cells = "".join(f"<th>{html.escape(heading(metric))}</th>" for metric in metrics)
    rows = [f"<tr><th>cameras</th><th></th>{cells}</tr>"]
    for group in result["groups"]:
        for index, row in enumerate(r for r in result["table"] if r["cameras"] == group):
            style = "ref" if row["model"] in (result["floor"], result["ceiling"]) else ""
            values = "".join(f"<td>{number(row[metric['label']], metric['label'])}</td>" for metric in metrics)
            lead = f"<td>{html.escape(group if index == 0 else '')}</td><td>{html.escape(row['model'])}</td>"
            rows.append(f'<tr class="{style} {"group" if index == 0 else ""}">{lead}{values}</tr>')
        paired = {row["metric"]: row for row in result["paired"] if row["cameras"] == group}
        if paired:
            values = "".join(_paired(paired[metric["label"]]) for metric in metrics)
            rows.append(f"<tr><td></td><td>change, win rate</td>{values}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _paired(row: Mapping[str, Any]) -> str:
    label = row["metric"]
    low, high = (number(row[key], label, signed=True) for key in ("change_low", "change_high"))
    change = number(row["change"], label, signed=True)
    verdict = row["verdict"]
    return f'<td class="{verdict}">{change}<br><small>[{low}, {high}]</small><br>{win_rate(row)}<br>{verdict}</td>'


def _protocol(result: Mapping[str, Any]) -> str:
    """What must be the same for two results to be compared."""
    lines = [
        f"{key}: {value}" for key, value in result["protocol"].items() if key not in ("items", "state_percentiles")
    ]
    lines += [
        f"{model['label']}: {model['ckpt']} {model['ckpt_sha256'][:12]} {model['adapter']}"
        for model in result["models"]
    ]
    return "\n".join([*lines, f"versions: {result['versions']}", f"device: {result['device']}"])
