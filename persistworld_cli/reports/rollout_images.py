"""Images of one rollout against its recording: a contact sheet and a video.

Shape legend: n frames that were recorded, V cameras, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.settings import Settings
from persistworld_cli.reports.videos import SheetBlock, VideoRow, contact_sheet, write_side_by_side
from persistworld_cli.rollout.closed_loop import Rollout
from persistworld_cli.rollout.recording import Recording

SHEET_COLUMNS = 8


def write_rollout_sheet(
    path: Path,
    title: str,
    settings: Settings,
    recording: Recording,
    drawn: Mapping[str, NDArray[np.uint8]],
    scores: Mapping[str, Rollout],
) -> None:
    """Rows recorded and models, columns time, a block for each camera; the start frame is the first column.

    Args:
        path: PNG to write.
        title: over everything.
        settings: for cameras and rate.
        recording: recorded side.
        drawn: model -> predicted frames (n, V, H, W, 3), n the frames that were recorded.
        scores: model -> its scores.
    """
    length = int(recording.valid.sum())
    shown = np.unique(np.linspace(0, length, min(SHEET_COLUMNS, length + 1)).round().astype(int))  # 0: the start
    rate = settings.world.rate_hz
    blocks = []
    for camera, name in enumerate(settings.world.cameras):
        images = {"recorded": recording.frames[:length], **drawn}
        rows = []
        for label, frames in images.items():
            whole = np.concatenate([recording.first[None, camera], frames[:, camera]])
            notes = _notes(scores[label], camera) if label in scores else []
            rows.append((label, whole[shown], notes))
        blocks.append(SheetBlock(name.replace("_", " "), rows))
    columns = ["start (real)" if frame == 0 else f"{frame / rate:.1f} s" for frame in shown]
    contact_sheet(path, title, columns, blocks)


def _notes(rollout: Rollout, camera: int) -> list[str]:
    """Mean PSNR and SSIM of one camera over the rollout."""
    psnr, ssim = (float(np.nanmean(rollout.scores[name][:, camera])) for name in ("psnr", "ssim"))
    return [f"psnr {psnr:.1f} dB", f"ssim {ssim:.3f}"]


def write_rollout_video(
    path: Path,
    title: str,
    settings: Settings,
    recording: Recording,
    drawn: Mapping[str, NDArray[np.uint8]],
    scores: Mapping[str, Rollout],
) -> None:
    """Recorded over predicted, cameras side by side, step and PSNR of every frame drawn on it. Arguments as above."""
    length = int(recording.valid.sum())
    fresh, rate = settings.model.num_frames - 1, settings.world.rate_hz
    first = recording.first[None]
    rows = [VideoRow("recorded", np.concatenate([first, recording.frames[:length]]))]
    for label, frames in drawn.items():
        value = {name: np.nanmean(scores[label].scores[name][:length], axis=1) for name in ("psnr", "ssim")}
        notes = [f"psnr {a:.1f} dB  ssim {b:.3f}" for a, b in zip(value["psnr"], value["ssim"], strict=True)]
        rows.append(VideoRow(label, np.concatenate([first, frames]), ["start (real)", *notes]))
    times = ["start", *(f"step {frame // fresh + 1}   {(frame + 1) / rate:.1f} s" for frame in range(length))]
    cameras = [name.replace("_", " ") for name in settings.world.cameras]
    write_side_by_side(path, title, cameras, rows, times, rate)
