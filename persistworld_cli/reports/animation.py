"""A looped animation for a README or slides: the record and the models side by side, scores below each image.

Shape legend: F frames, H, W pixels. Images are uint8 RGB (..., H, W, 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from persistworld_cli.files import whole_file
from persistworld_cli.reports.videos import DIM, GAP, INK, PAPER, Images, clipped, enlarge, font

CELL = 240  # target width of an image in pixels
HEAD, CAPTION, NOTE = 26, 24, 22  # heights of lines of text
HOLD_MS = 1500  # the last frame stays
QUALITY = 80  # of WebP


@dataclass(frozen=True)
class AnimatedRow:
    """One camera of one episode.

    Attributes:
        images: column (the record or a model) -> its frames (F, H, W, 3); the same columns in every row.
        notes: column -> the text below its image.
        caption: text above the row, or "".
    """

    images: Mapping[str, Images]
    notes: Mapping[str, str]
    caption: str = ""


def write_animation(path: Path, rows: Sequence[AnimatedRow], rate: float) -> None:
    """Write a looped WebP or GIF, by the name's ending.

    Args:
        path: file to write.
        rows: below each other. A row that is shorter than the longest stays at its last frame.
        rate: frames per second.

    Raises:
        CannotWrite: the file cannot be written.
    """
    frames = list(_frames(rows, rate))
    save_animation(path, frames, [round(1000 / rate)] * (len(frames) - 1) + [HOLD_MS])


def save_animation(path: Path, frames: Sequence[Images], milliseconds: Sequence[int]) -> None:
    """Write frames (H, W, 3), each shown for so long, as a looped WebP or GIF. Raises CannotWrite."""
    first, *others = [Image.fromarray(frame) for frame in frames]
    kind = path.suffix.lower().removeprefix(".").upper()
    how = {"quality": QUALITY, "method": 4} if kind == "WEBP" else {"optimize": True}
    with whole_file(path) as partial:
        first.save(
            partial, format=kind, save_all=True, append_images=others, duration=list(milliseconds), loop=0, **how
        )


def _frames(rows: Sequence[AnimatedRow], rate: float) -> Iterator[Images]:
    columns = list(rows[0].images)
    cells = [{name: enlarge(images, CELL) for name, images in row.images.items()} for row in rows]
    tops, height = [], HEAD
    for row, cell in zip(rows, cells, strict=True):
        height += CAPTION if row.caption else 0
        tops.append(height)
        height += cell[columns[0]].shape[1] + NOTE
    w = cells[0][columns[0]].shape[2]
    base = Image.new("RGB", (len(columns) * (w + GAP) - GAP, height), PAPER)
    draw = ImageDraw.Draw(base)
    lefts = {name: index * (w + GAP) for index, name in enumerate(columns)}
    for name, left in lefts.items():
        draw.text((left + w // 2, 5), clipped(name, 15, w - 8), INK, font=font(15), anchor="ma")
    for row, cell, top in zip(rows, cells, tops, strict=True):
        if row.caption:
            draw.text((6, top - CAPTION + 4), clipped(row.caption, 13, base.width - 12), INK, font=font(13))
        below = top + cell[columns[0]].shape[1] + 3
        for name, left in lefts.items():
            draw.text((left + w // 2, below), clipped(row.notes[name], 12, w - 8), DIM, font=font(12), anchor="ma")
    count = max(len(images) for cell in cells for images in cell.values())
    for index in range(count):
        canvas = base.copy()
        for cell, top in zip(cells, tops, strict=True):
            for name, left in lefts.items():
                images = cell[name]
                canvas.paste(Image.fromarray(images[min(index, len(images) - 1)]), (left, top))
        ImageDraw.Draw(canvas).text((6, 5), f"{index / rate:.1f} s", DIM, font=font(13))
        yield np.asarray(canvas)
