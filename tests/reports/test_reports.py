"""Tables, curves, sheets, videos and the page, from made-up results."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_result import METRICS, made_up_result
from PIL import Image

from persistworld_cli.data.raw.video import count_frames, read_frames, write_mp4
from persistworld_cli.reports.animation import CELL, AnimatedRow, write_animation
from persistworld_cli.reports.curves import change_plot, horizon_curves
from persistworld_cli.reports.page import write_page
from persistworld_cli.reports.tables import eval_table, new_table, number, plain, steps_tables, win_rate, write_csv
from persistworld_cli.reports.videos import (
    SheetBlock,
    VideoRow,
    contact_sheet,
    enlarge,
    side_by_side,
)


@pytest.fixture
def result() -> dict[str, Any]:
    return made_up_result()


def test_eval_table_says_what_a_person_needs(result: dict[str, Any]) -> None:
    text = plain(eval_table(result), width=140)
    assert "8 rollouts of 8 episodes, 1 steps = 0.8 s" in text
    assert "psnr dB↑" in text and "lpips (untrained)↓" in text and " lpips↓" not in text
    assert text.index("copy first frame") < text.index("base") < text.index("recording through VAE")
    assert "+1.50 better" in text and "[+1.40, +1.60]" in text and "75% of 8" in text and "[41, 93]" in text
    assert "-0.0010 too few" in text and "reward, all cameras: better in words" in text and "random" in text
    result["paired"], result["models"] = [], result["models"][:1]
    alone = plain(eval_table(result), width=140)
    assert "win rate" not in alone and "recording through VAE" in alone


@pytest.mark.parametrize(
    ("change", "shown"), [(0.0003, "+0.0003 better"), (0.0, "+0.000000 better"), (1.5, "+1.50 better")]
)
def test_a_decided_change_has_the_decimals_that_show_it(result: dict[str, Any], change: float, shown: str) -> None:
    result["paired"][0] |= {"change": change, "change_low": change / 2, "change_high": 2 * change}
    assert shown in plain(eval_table(result))


def test_numbers() -> None:
    assert (
        number(None, "psnr") == "-"
        and number(20.456, "psnr") == "20.46"
        and number(0.5, "ssim", signed=True) == "+0.500"
    )
    assert number(0.00123, "lpips (untrained)") == "0.0012" and number(0.0812, "lpips") == "0.081"
    assert win_rate({"rollouts": 0}) == "-"


def test_steps_table() -> None:
    rows = [{"step": 1, "time_s": 0.8, "model": "base", "psnr": 21.0, "lpips (untrained)": None}]
    (table,) = steps_tables({"metrics": METRICS, "replays": [{"title": "episode 9", "rows": rows}]})
    text = plain(table)
    assert "episode 9" in text and "0.8 s" in text and "21.00" in text


def test_a_table_wraps_between_words_keeps_numbers_whole_and_cuts_nothing(result: dict[str, Any]) -> None:
    """In 80 columns, in more, and in far too few."""
    table = new_table("a title of some words", ["model", "note"], ["change of the metric"], "a caption of some words")
    note = "several words about what was seen"
    table.add_row("post-trained", note, "+1.50 undecided\n[+1.40, +1.60]")
    for own, spans in (
        (table, ("+1.50 undecided", "[+1.40, +1.60]")),
        (eval_table(result), ("[+1.40, +1.60]", "75% of 8")),
    ):
        for width in (80, 140):
            text = plain(own, width=width)
            assert all(len(line) <= width for line in text.splitlines()) and all(span in text for span in spans)
            assert "…" not in text
    assert note in plain(table, width=80) and "post-trained" in plain(table, width=52)
    table.columns[1].header = "a_long_name_of_a_checkpoint.safetensors"
    narrow = plain(table, width=30)
    assert all(len(line) <= 30 for line in narrow.splitlines()) and "…" not in narrow and "undecided" in narrow


def test_curves_are_images_even_with_missing_ends(result: dict[str, Any], tmp_path: Path) -> None:
    for name, draw in (("a.png", horizon_curves), ("b.png", change_plot)):
        draw(tmp_path / name, result)
        image = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert image.shape[1] > 500 and len(np.unique(image.reshape(-1, 3), axis=0)) > 50
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_enlarge_repeats_pixels_or_averages() -> None:
    small = np.arange(2 * 48 * 80 * 3, dtype=np.uint8).reshape(2, 48, 80, 3)
    big = enlarge(small, 240)
    assert big.shape == (2, 144, 240, 3) and (big[:, ::3, ::3] == small).all() and (big[:, 2::3, 1::3] == small).all()
    assert enlarge(small, 80) is not None and (enlarge(small, 80) == small).all()
    assert enlarge(np.full((1, 192, 640, 3), 7, np.uint8), 240).shape == (1, 72, 240, 3)


def test_contact_sheet_places_images_and_keeps_long_names_inside(tmp_path: Path) -> None:
    red = np.full((2, 48, 80, 3), (200, 10, 10), np.uint8)
    rows = [("recorded", red, []), ("a-very-long-checkpoint-name.pt", red, ["psnr 20.1 dB"])]
    contact_sheet(tmp_path / "sheet.png", "title " * 100, ["0.2 s", "0.4 s"], [SheetBlock("wrist", rows)])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    red_pixels = (sheet == (200, 10, 10)).all(axis=-1)
    assert red_pixels.sum() == 2 * 2 * 144 * 240  # nothing is drawn over an image
    assert (sheet > 200).any()


def test_videos_show_every_row_camera_and_note(tmp_path: Path) -> None:
    frames = np.zeros((3, 2, 48, 80, 3), np.uint8)
    frames[:, 1] = 255
    rows = [VideoRow("recorded", frames), VideoRow("base", frames, ["start", "psnr 20", "psnr 19"])]
    images = list(side_by_side("episode 9", ["left", "wrist"], rows, ["start", "step 1", "step 1"]))
    assert len(images) == 3 and len({p.shape for p in images}) == 1
    assert not np.array_equal(images[1], images[2])  # the notes differ
    write_mp4(tmp_path / "v.mp4", images, 5.0)
    assert count_frames(tmp_path / "v.mp4") == 3
    shown = read_frames(tmp_path / "v.mp4", [0])[0]
    assert shown[-60, -60].min() > 230 and shown[-60, 60].max() < 25


@pytest.mark.parametrize("ending", ["webp", "gif"])
def test_an_animation_shows_every_column_and_holds_the_last_frame_of_a_shorter_row(ending: str, tmp_path: Path) -> None:
    levels = np.array([0, 90, 180], np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (3, 48, 80, 3))
    notes = {"recorded": "wrist", "base": "PSNR 20.1 dB"}
    long = AnimatedRow({"recorded": frames, "base": np.full_like(frames, 255)}, notes, "median")
    short = AnimatedRow({"recorded": frames[:2], "base": np.full_like(frames[:2], 255)}, notes)
    path = tmp_path / f"loop.{ending}"
    write_animation(path, [long, short], 5.0)
    with Image.open(path) as shown:
        seen, held = [], []
        for index in range(shown.n_frames):
            shown.seek(index)
            shown.load()
            held.append(shown.info["duration"])
            seen.append(np.asarray(shown.convert("RGB")).astype(int))
        assert shown.info["loop"] == 0 and held == [200, 200, 1500]
    high, low, left, right = 100, -80, CELL // 2, -CELL // 2
    assert [abs(one[high, left, 0] - level) <= 6 for one, level in zip(seen, (0, 90, 180), strict=True)] == [True] * 3
    assert [abs(one[low, left, 0] - level) <= 6 for one, level in zip(seen, (0, 90, 90), strict=True)] == [True] * 3
    assert all(one[y, right].min() > 245 for one in seen for y in (high, low))


def test_csv_and_page(result: dict[str, Any], tmp_path: Path) -> None:
    write_csv(tmp_path / "r.csv", [{"model": "base", "psnr": 1.5}, {"model": "base", "psnr": None}])
    with (tmp_path / "r.csv").open() as handle:
        assert [row["psnr"] for row in csv.DictReader(handle)] == ["1.5", ""]
    horizon_curves(tmp_path / "curves.png", result)
    write_page(tmp_path / "report.html", result, [tmp_path / "curves.png"], [])
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in page and "lpips (untrained)" in page and "a&lt;b&gt;.pt" in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing from elsewhere
    assert page.count("<tr") == page.count("</tr>") and page.count("<td") == page.count("</td>")
