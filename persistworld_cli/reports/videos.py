"""Contact sheets and side-by-side videos, large enough to see something, with names, steps and numbers drawn on them.

Shape legend: F frames, V cameras, H, W pixels. Images are uint8 RGB (..., H, W, 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from persistworld_cli.data.raw.video import write_mp4
from persistworld_cli.files import whole_file

Images = NDArray[np.uint8]
INK, DIM, PAPER = (240, 240, 240), (165, 165, 172), (24, 24, 28)
SHEET_CELL, VIDEO_CELL = 240, 320  # width in pixels that a view is brought to
GAP = 3
BAR = 26
LABEL = 116


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: the same on every machine."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _clip(text: str, size: int, width: int) -> str:
    """A text cut to a width in pixels, with an ellipsis."""
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def enlarge(images: Images, width: int) -> Images:
    """Bring images (..., H, W, 3) near a width: whole factors by repeating pixels, smaller ones by averaging."""
    high, wide = images.shape[-3:-1]
    factor = round(width / wide)
    if factor >= 1:
        return images.repeat(factor, axis=-3).repeat(factor, axis=-2)
    flat = images.reshape(-1, high, wide, 3)
    size = (width, round(high * width / wide))
    small = np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BOX)) for one in flat])
    return small.reshape(*images.shape[:-3], size[1], size[0], 3)


@dataclass(frozen=True)
class SheetBlock:
    """A title over rows of images: (name, (n, H, W, 3), [note under the name, ...])."""

    title: str
    rows: Sequence[tuple[str, Images, Sequence[str]]]


def contact_sheet(
    path: Path, title: str, columns: Sequence[str], blocks: Sequence[SheetBlock], *, cell: int = SHEET_CELL
) -> None:
    """Write one PNG: a block under the other, rows of images, a name left of each row, a time over each column.

    Args:
        path: PNG to write.
        title: over everything.
        columns: n texts, one a column.
        blocks: each with rows of n images.
        cell: width that an image is brought to.
    """
    rows = [[enlarge(images, cell) for _, images, _ in block.rows] for block in blocks]
    high, wide = rows[0][0].shape[1:3]
    width = LABEL + len(columns) * (wide + GAP)
    height = 2 * BAR + sum(BAR + len(block.rows) * (high + GAP) for block in blocks)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 4), _clip(title, 15, width - 16), INK, font=_font(15))
    for column, text in enumerate(columns):
        centre = LABEL + column * (wide + GAP) + wide // 2
        draw.text((centre, BAR + 6), text, DIM, font=_font(13), anchor="ma")
    top = 2 * BAR
    for block, images in zip(blocks, rows, strict=True):
        draw.text((8, top + 5), block.title, INK, font=_font(14))
        top += BAR
        for (name, _, notes), cells in zip(block.rows, images, strict=True):
            draw.text((8, top + 4), _clip(name, 13, LABEL - 12), INK, font=_font(13))
            for line, note in enumerate(notes):
                draw.text((8, top + 24 + 17 * line), note, DIM, font=_font(12))
            for column, one in enumerate(cells):
                sheet.paste(Image.fromarray(one), (LABEL + column * (wide + GAP), top))
            top += high + GAP
    with whole_file(path) as partial:
        sheet.save(partial, format="PNG")


@dataclass(frozen=True)
class VideoRow:
    """One model (or the recording) in a video: its frames (F, V, H, W, 3), and a text for each frame."""

    name: str
    frames: Images
    notes: Sequence[str] = field(default=())


def side_by_side(
    title: str, cameras: Sequence[str], rows: Sequence[VideoRow], times: Sequence[str], *, cell: int = VIDEO_CELL
) -> Iterator[Images]:
    """Images of a video: cameras as columns, rows under each other; the title and each frame's time and step on top.

    Args:
        title: of the video.
        cameras: V names.
        rows: recorded first, then models, all with F frames.
        times: F texts, e.g. ``step 3  2.2 s``.
        cell: width that a view is brought to.
    """
    high, wide = enlarge(rows[0].frames[:1, 0], cell).shape[1:3]
    width = len(cameras) * (wide + GAP) - GAP
    height = 2 * BAR + len(rows) * (BAR + high)
    base = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(base)
    draw.text((8, 5), _clip(title, 14, width - 170), INK, font=_font(14))
    for column, camera in enumerate(cameras):
        draw.text((column * (wide + GAP) + wide // 2, BAR + 5), camera, DIM, font=_font(12), anchor="ma")
    for index, text in enumerate(times):
        canvas = base.copy()
        draw = ImageDraw.Draw(canvas)
        draw.text((width - 8, 5), text, INK, font=_font(14), anchor="ra")
        top = 2 * BAR
        for row in rows:
            draw.text((8, top + 5), _clip(row.name, 13, width - 260), INK, font=_font(13))
            if row.notes:
                draw.text((width - 8, top + 5), row.notes[index], DIM, font=_font(13), anchor="ra")
            views = enlarge(row.frames[index], cell)
            for column, view in enumerate(views):
                canvas.paste(Image.fromarray(view), (column * (wide + GAP), top + BAR))
            top += BAR + high
        yield np.asarray(canvas)


def write_side_by_side(
    path: Path, title: str, cameras: Sequence[str], rows: Sequence[VideoRow], times: Sequence[str], fps: float
) -> None:
    """`side_by_side` as an mp4. Raises PersistWorldError where it cannot be written."""
    write_mp4(path, side_by_side(title, cameras, rows, times), fps)
