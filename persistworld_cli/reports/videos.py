"""Contact sheets and side-by-side videos of rollouts, enlarged, with names, times and scores drawn on them.

Shape legend: F frames, V cameras, H, W pixels. Images are uint8 RGB (..., H, W, 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from persistworld_cli.config.settings import Settings
from persistworld_cli.data.raw.video import write_mp4
from persistworld_cli.files import whole_file
from persistworld_cli.rollout.closed_loop import ScoredRollout
from persistworld_cli.rollout.recording import Recording

Images = NDArray[np.uint8]
INK, DIM, PAPER = (240, 240, 240), (165, 165, 172), (24, 24, 28)
SHEET_CELL, VIDEO_CELL = 240, 320  # target width of a view in pixels
GAP = 3
BAR = 26
LABEL = 116


@lru_cache(maxsize=8)
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans from matplotlib, the same on every machine."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def clipped(text: str, size: int, width: int) -> str:
    """A text cut to a width in pixels, with an ellipsis."""
    drawn = font(size)
    if drawn.getlength(text) <= width:
        return text
    while text and drawn.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def enlarge(images: Images, width: int) -> Images:
    """Scale images (..., H, W, 3) to about a width: enlarge by repeating pixels, shrink by averaging."""
    h, w = images.shape[-3:-1]
    factor = round(width / w)
    if factor >= 1:
        return images.repeat(factor, axis=-3).repeat(factor, axis=-2)
    flat = images.reshape(-1, h, w, 3)
    size = (width, round(h * width / w))
    small = np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BOX)) for one in flat])
    return small.reshape(*images.shape[:-3], size[1], size[0], 3)


def camera_names(settings: Settings) -> list[str]:
    """The cameras' names for display."""
    return [name.replace("_", " ") for name in settings.world.cameras]


@dataclass(frozen=True)
class SheetBlock:
    """A title over rows of images: (name, (n, H, W, 3), [note under the name, ...])."""

    title: str
    rows: Sequence[tuple[str, Images, Sequence[str]]]


def contact_sheet(path: Path, title: str, columns: Sequence[str], blocks: Sequence[SheetBlock]) -> None:
    """Write one PNG: blocks below each other, rows of n images, a name left of each row, a text above each column."""
    rows = [[enlarge(images, SHEET_CELL) for _, images, _ in block.rows] for block in blocks]
    h, w = rows[0][0].shape[1:3]
    width = LABEL + len(columns) * (w + GAP)
    height = 2 * BAR + sum(BAR + len(block.rows) * (h + GAP) for block in blocks)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 4), clipped(title, 15, width - 16), INK, font=font(15))
    for column, text in enumerate(columns):
        centre = LABEL + column * (w + GAP) + w // 2
        draw.text((centre, BAR + 6), text, DIM, font=font(13), anchor="ma")
    top = 2 * BAR
    for block, images in zip(blocks, rows, strict=True):
        draw.text((8, top + 5), block.title, INK, font=font(14))
        top += BAR
        for (name, _, notes), cells in zip(block.rows, images, strict=True):
            draw.text((8, top + 4), clipped(name, 13, LABEL - 12), INK, font=font(13))
            for line, note in enumerate(notes):
                draw.text((8, top + 24 + 17 * line), note, DIM, font=font(12))
            for column, one in enumerate(cells):
                sheet.paste(Image.fromarray(one), (LABEL + column * (w + GAP), top))
            top += h + GAP
    with whole_file(path) as partial:
        sheet.save(partial, format="PNG")


@dataclass(frozen=True)
class VideoRow:
    """One model (or the recording) in a video: its frames (F, V, H, W, 3), and a text for each frame."""

    name: str
    frames: Images
    notes: Sequence[str] = ()


def side_by_side(
    title: str, cameras: Sequence[str], rows: Sequence[VideoRow], times: Sequence[str]
) -> Iterator[Images]:
    """Frames of a video: cameras as columns, rows below each other; at the top the title and the frame's time.

    ``times``: F texts, e.g. ``step 3  2.2 s``.
    """
    h, w = enlarge(rows[0].frames[:1, 0], VIDEO_CELL).shape[1:3]
    width = len(cameras) * (w + GAP) - GAP
    height = 2 * BAR + len(rows) * (BAR + h)
    base = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(base)
    draw.text((8, 5), clipped(title, 14, width - 170), INK, font=font(14))
    for column, camera in enumerate(cameras):
        draw.text((column * (w + GAP) + w // 2, BAR + 5), camera, DIM, font=font(12), anchor="ma")
    for index, text in enumerate(times):
        canvas = base.copy()
        draw = ImageDraw.Draw(canvas)
        draw.text((width - 8, 5), text, INK, font=font(14), anchor="ra")
        top = 2 * BAR
        for row in rows:
            draw.text((8, top + 5), clipped(row.name, 13, width - 260), INK, font=font(13))
            if row.notes:
                draw.text((width - 8, top + 5), row.notes[index], DIM, font=font(13), anchor="ra")
            views = enlarge(row.frames[index], VIDEO_CELL)
            for column, view in enumerate(views):
                canvas.paste(Image.fromarray(view), (column * (w + GAP), top + BAR))
            top += BAR + h
        yield np.asarray(canvas)


# -- a rollout against its recording ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComparedRollout:
    """A rollout and its recording, to draw.

    Attributes:
        title: text at the top.
        settings: for cameras and rate.
        recording: the recording to compare with.
        drawn: model -> predicted frames (n, V, H, W, 3), n the number of recorded frames.
        scores: model -> its scores.
    """

    title: str
    settings: Settings
    recording: Recording
    drawn: Mapping[str, Images]
    scores: Mapping[str, ScoredRollout]

    def write_sheet(self, path: Path) -> None:
        """Write a PNG: recording and models as rows, times from the start as columns, a block per camera."""
        length = int(self.recording.valid.sum())
        shown = _columns(length, 8)
        blocks = []
        for camera, name in enumerate(camera_names(self.settings)):
            rows = []
            for label, frames in {"recorded": self.recording.frames[:length], **self.drawn}.items():
                whole = np.concatenate([self.recording.first[None, camera], frames[:, camera]])
                notes = []
                if label in self.scores:
                    psnr, ssim = (
                        float(np.nanmean(self.scores[label].scores[key][:, camera])) for key in ("psnr", "ssim")
                    )
                    notes = [f"psnr {psnr:.1f} dB", f"ssim {ssim:.3f}"]
                rows.append((label, whole[shown], notes))
            blocks.append(SheetBlock(name, rows))
        columns = ["start (real)" if frame == 0 else f"{frame / self.settings.world.rate_hz:.1f} s" for frame in shown]
        contact_sheet(path, self.title, columns, blocks)

    def write_video(self, path: Path) -> None:
        """Write an mp4: recording above models, with step, time and scores drawn on each frame."""
        length = int(self.recording.valid.sum())
        new_frames, rate = self.settings.model.num_frames - 1, self.settings.world.rate_hz
        first = self.recording.first[None]
        rows = [VideoRow("recorded", np.concatenate([first, self.recording.frames[:length]]))]
        for label, frames in self.drawn.items():
            psnr, ssim = (np.nanmean(self.scores[label].scores[name][:length], axis=1) for name in ("psnr", "ssim"))
            notes = [f"psnr {a:.1f} dB  ssim {b:.3f}" for a, b in zip(psnr, ssim, strict=True)]
            rows.append(VideoRow(label, np.concatenate([first, frames]), ["start (real)", *notes]))
        times = ["start", *(f"step {frame // new_frames + 1}   {(frame + 1) / rate:.1f} s" for frame in range(length))]
        write_mp4(path, side_by_side(self.title, camera_names(self.settings), rows, times), rate)


# -- a rollout without a recording --------------------------------------------------------------------------------


def write_imagined_video(
    path: Path,
    title: str,
    settings: Settings,
    frames: Images,
    steps: Sequence[str],
    fps: float,
    beside: Mapping[str, Images] | None = None,
) -> None:
    """Write an mp4: views side by side, with the step and the action drawn on each frame.

    Args:
        path: mp4 to write.
        title: text at the top.
        settings: for the cameras' names.
        frames: (1 + S (L-1), V, H, W, 3): the start and the new frames of S interactions.
        steps: S texts, the action of each interaction; empty if the rollout ended at its start.
        fps: frames per second.
        beside: name -> frames of the same shape, shown below the world model's.

    Raises:
        PersistWorldError: the video cannot be written.
    """
    new_frames = _new_frames(frames, steps)
    notes = ["start", *(text for text in steps for _ in range(new_frames))]
    times = [f"step {1 + i // new_frames}/{len(steps)}   {(i + 1) / fps:.1f} s" for i in range(len(frames) - 1)]
    rows = [VideoRow("world model", frames, notes)]
    rows += [VideoRow(name, others) for name, others in (beside or {}).items()]
    write_mp4(path, side_by_side(title, camera_names(settings), rows, ["start", *times]), fps)


def write_imagined_sheet(
    path: Path,
    title: str,
    settings: Settings,
    frames: Images,
    steps: Sequence[str],
    beside: Mapping[str, Images] | None = None,
) -> None:
    """Write a PNG: start and ends of interactions as columns, a row per camera, further blocks for ``beside``.

    Arguments as for the video.
    """
    shown = _columns(len(steps), 10)
    blocks = []
    for block, images in {"world model": frames, **(beside or {})}.items():
        ends = images[shown * _new_frames(frames, steps)]
        blocks.append(SheetBlock(block, [(name, ends[:, i], ()) for i, name in enumerate(camera_names(settings))]))
    contact_sheet(path, title, ["start" if step == 0 else steps[step - 1] for step in shown], blocks)


def _new_frames(frames: Images, steps: Sequence[str]) -> int:
    """L-1, the new frames of an interaction."""
    return (len(frames) - 1) // len(steps) if steps else 1


def _columns(last: int, most: int) -> NDArray[np.int64]:
    """At most this many of 0 .. last, evenly spread, with both ends."""
    return np.unique(np.linspace(0, last, min(most, last + 1)).round().astype(int))
