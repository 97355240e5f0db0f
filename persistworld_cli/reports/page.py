"""One HTML page with tables, curves, sheets and videos in it: no other file, no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from persistworld_cli.files import write_text
from persistworld_cli.reports.html_table import flat, html_table
from persistworld_cli.reports.tables import conduct_table, eval_table

_STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.5em;margin-bottom:.2em}h2{font-size:1.15em;margin-top:2em}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:1em 0 .4em}
td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #e2e2e6;vertical-align:top;white-space:nowrap}
th{background:#f4f4f6;border-bottom:2px solid #999;white-space:normal;vertical-align:bottom}
.num{text-align:right;font-variant-numeric:tabular-nums}
.group td{border-top:2px solid #999}.ref{color:#777}.caption{color:#666;font-size:.88em;margin-top:0}
[data-style=better]{color:#187a2b}[data-style=worse]{color:#b3261e}
img,video{max-width:100%;display:block;margin:.6em 0;border-radius:4px}
.sheet{overflow-x:auto;width:min(96vw,1900px);margin-left:calc(50% - min(48vw,950px))}.sheet img{cursor:zoom-in}
.sheet img.full{max-width:none;cursor:zoom-out}
details{margin-top:2em}summary{font-weight:600;cursor:pointer}.plain td{white-space:normal;overflow-wrap:anywhere}
"""
# A sheet is wider than the page: a click shows its pixels as they are. Videos that are not seen need not play.
_SCRIPT = """
for (const img of document.querySelectorAll(".sheet img")) img.onclick = () => img.classList.toggle("full");
const seen = new IntersectionObserver(all => all.forEach(e => e.isIntersecting ? e.target.play() : e.target.pause()));
for (const film of document.querySelectorAll("video")) seen.observe(film);
"""


def write_page(path: Path, result: Mapping[str, Any], images: Sequence[Path], films: Sequence[Path]) -> None:
    """Write the page.

    Args:
        path: HTML file to write.
        result: ``eval.json``'s dictionary.
        images: PNG files to put in, in order.
        films: mp4 files; one that is named like an image stands under it.
    """
    title = " against ".join(model["label"] for model in reversed(result["models"]))
    table = eval_table(result)
    parts = [
        f"<h1>Closed loop: {html.escape(title)}</h1>",
        f"<p>{html.escape(str(table.title))}</p>",
        html_table(table),
        *_conduct(result),
        *_figures(images, films),
        _cameras(result),
        _provenance(result),
    ]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    body = "\n".join(parts)
    write_text(
        path,
        f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head>"
        f"<body>{body}<script>{_SCRIPT}</script></body></html>\n",
    )


def _conduct(result: Mapping[str, Any]) -> list[str]:
    """Drift, action following and trust, where the result has them."""
    if "following" not in result:
        return []
    table = conduct_table(result)
    return [f"<h2>{html.escape(str(table.title))}</h2>", html_table(table)]


def _figures(images: Sequence[Path], films: Sequence[Path]) -> list[str]:
    """Each image with its film under one heading."""
    parts = []
    for stem in dict.fromkeys(file.stem for file in [*images, *films]):
        parts.append(f"<h2>{html.escape(_name(stem))}</h2>")
        parts += [_image(file) for file in images if file.stem == stem]
        parts += [_film(file) for file in films if file.stem == stem]
    return parts


def _name(stem: str) -> str:
    """``best_episode-9_start-0_seed-1`` -> ``best: episode 9, start 0, seed 1``."""
    lead, *rest = stem.split("_")
    return f"{lead}: {', '.join(rest).replace('-', ' ')}" if rest else lead


def _image(file: Path) -> str:
    sheet = ' class="sheet" title="click: its own size"' if file.parent.name == "sheets" else ""
    return f'<div{sheet}><img alt="{html.escape(_name(file.stem))}" src="{_url(file, "image/png")}"></div>'


def _film(file: Path) -> str:
    # Muted, or no browser plays it unasked.
    return f'<video controls loop muted playsinline src="{_url(file, "video/mp4")}"></video>'


def _url(file: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def _cameras(result: Mapping[str, Any]) -> str:
    """The first table again, a camera at a time."""
    if not result.get("cameras"):
        return ""
    names = list(dict.fromkeys(row["cameras"] for row in result["cameras"]))
    table = eval_table({**result, "groups": names, "table": result["cameras"], "paired": []})
    table.caption = None
    return f"<details><summary>each camera</summary>{html_table(table)}</details>"


def _provenance(result: Mapping[str, Any]) -> str:
    """What must be the same for two results to be compared, and what they were made with."""
    rows = flat({key: value for key, value in result["protocol"].items() if key not in ("items", "state_percentiles")})
    for model in result["models"]:
        shown = {key: value for key, value in model.items() if key not in ("label", "state_percentiles")}
        rows |= flat(shown, f"{model['label']}: ")
    kept = ("dataset", "device", "device_name", "dtype", "versions")
    rows |= flat({key: result[key] for key in kept if key in result})
    lines = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
    return f'<details><summary>protocol, weights, versions</summary><table class="plain">{lines}</table></details>'
