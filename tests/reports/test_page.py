"""The report's page, from disk in a real browser: what it says, and whether its images and videos are seen."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from browser import Page
from eval_result import made_up_result
from markupsafe import escape
from PIL import Image
from rich.table import Table
from rich.text import Text

from persistworld_cli.data.raw.video import write_mp4
from persistworld_cli.files import flat
from persistworld_cli.reports.page import render, write_page
from persistworld_cli.reports.tables import eval_table


def test_table_on_a_page_has_what_the_terminal_has(tmp_path: Path) -> None:
    table = Table(title="not here", caption="two\nlines [bold]&[/bold]")
    table.add_column("name")
    table.add_column("psnr dB ↑", justify="right")
    table.add_row("a<b>", Text("+1\n[0, 2]", "green"))
    table.add_section()
    table.add_row("floor", "3", style="dim")
    (tmp_path / "page.html").write_text('{% from "report.html" import show %}{{ show(table) }}')
    text = render(tmp_path / "page.html", table=table)
    assert "a&lt;b&gt;" in text and '<td class="right green">+1\n[0, 2]</td>' in text
    assert "two\nlines &amp;" in text and "not here" not in text
    assert '<tr class="dim section"><td class="left ">floor</td><td class="right ">3</td></tr>' in text
    assert flat({"a": {"b": 1, "c": {"d": [2]}}, "e": 3}) == {"a.b": 1, "a.c.d": [2], "e": 3}


def written(folder: Path, result: dict[str, Any]) -> Path:
    """A page with a plot, a contact sheet wider than it, and a video."""
    stem = "best_episode-9_start-0_seed-1"
    result = {**result, "cameras": [{**row, "cameras": "exterior_1_left"} for row in result["table"]]}
    (folder / "sheets").mkdir()
    plot, sheet, film = folder / "curves.png", folder / "sheets" / f"{stem}.png", folder / f"{stem}.mp4"
    Image.fromarray(np.full((200, 900, 3), (10, 10, 200), np.uint8)).save(plot)
    Image.fromarray(np.full((300, 2000, 3), (10, 200, 10), np.uint8)).save(sheet)
    write_mp4(film, [np.full((320, 480, 3), (200, 10, 10), np.uint8)] * 15, 5.0)
    write_page(folder / "report.html", result, [plot, sheet], [film])
    for file in (plot, sheet, film):
        file.unlink()
    return folder / "report.html"


def test_page_says_what_the_table_says_and_needs_nothing_else(tmp_path: Path) -> None:
    result = made_up_result()
    text = written(tmp_path, result).read_text(encoding="utf-8")
    table = eval_table(result)
    for words in (str(table.title), *str(table.caption).splitlines(), "best: episode 9, start 0, seed 1"):
        assert str(escape(words)) in text
    assert "persistworld eval --seed 1" in text and "2026-11-29" in text and "abababababab" in text
    assert "lpips (untrained)" in text and "75% of 8\n[41, 93]" in text and "a&lt;b&gt;.pt" in text
    assert "exterior_1_left" in text and "versions.torch" in text and text.count("best: episode 9") == 2  # and an alt
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]


def test_page_opens_from_disk_and_its_video_plays(tmp_path: Path, new_page: Callable[[], Page]) -> None:
    page = new_page()
    page.open(written(tmp_path, made_up_result()))
    assert page.js("[...document.images].every(img => img.complete && img.naturalWidth > 0)")
    assert page.js("document.querySelectorAll('table')[1].rows.length") > 3
    page.js("document.querySelector('video').scrollIntoView({block: 'center'})")
    page.wait("document.querySelector('video').currentTime > 0.3")  # it plays when it is seen
    assert page.js("document.querySelector('video').videoWidth") == 480
    red, green, blue = page.colour("video")
    assert red > 150 and max(green, blue) < 60
    page.js("document.querySelector('.sheet').scrollIntoView({block: 'center'})")
    page.wait("document.querySelector('.sheet img').getBoundingClientRect().width < 1280")
    page.click(".sheet")
    page.wait("document.querySelector('.sheet img').getBoundingClientRect().width === 2000")
    for width in (1280, 700):
        page.size(width, 800)
        page.wait(f"innerWidth === {width} && document.documentElement.scrollWidth <= innerWidth")
    assert not page.errors
