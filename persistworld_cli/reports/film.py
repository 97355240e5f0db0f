"""What a rollout without a recording beside it leaves behind: a video, a contact sheet, a JSON.

Shape legend: S interactions, F = 1 + S (L-1) frames (the start and the new ones), V cameras, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.settings import Settings
from persistworld_cli.reports.videos import SheetBlock, VideoRow, contact_sheet, write_side_by_side

_SHEET_COLUMNS = 10


def write_film(
    path: Path,
    title: str,
    settings: Settings,
    frames: NDArray[np.uint8],
    steps: Sequence[str],
    fps: float,
    beside: Mapping[str, NDArray[np.uint8]] | None = None,
) -> None:
    """Write an mp4: views side by side, the step's number and what was done in it drawn on every frame.

    Args:
        path: mp4 to write.
        title: over everything.
        settings: for the cameras' names.
        frames: (F, V, H, W, 3) uint8.
        steps: S texts, what was done in each interaction; none for a rollout that did not get beyond its start.
        fps: frames a second.
        beside: name -> (F, V, H, W, 3) of what else is shown, under the world model.

    Raises:
        PersistWorldError: it cannot be written.
    """
    fresh = _fresh(frames, steps)
    notes = ["start", *(text for text in steps for _ in range(fresh))]
    times = ["start", *(f"step {1 + i // fresh}/{len(steps)}   {(i + 1) / fps:.1f} s" for i in range(len(frames) - 1))]
    rows = [VideoRow("world model", frames, notes)]
    rows += [VideoRow(name, others) for name, others in (beside or {}).items()]
    write_side_by_side(path, title, _cameras(settings), rows, times, fps)


def write_film_sheet(
    path: Path,
    title: str,
    settings: Settings,
    frames: NDArray[np.uint8],
    steps: Sequence[str],
    beside: Mapping[str, NDArray[np.uint8]] | None = None,
) -> None:
    """Write a PNG: the start and where interactions led (at most 10 columns, evenly spread), a row for each camera.

    ``beside`` as in `write_film`: further blocks under the first.
    """
    fresh = _fresh(frames, steps)
    shown = np.unique(np.linspace(0, len(steps), min(_SHEET_COLUMNS, len(steps) + 1)).round().astype(int))
    columns = ["start" if step == 0 else steps[step - 1] for step in shown]
    blocks = []
    for block, images in {"world model": frames, **(beside or {})}.items():
        ends = images[shown * fresh]
        rows = [(name, ends[:, camera], ()) for camera, name in enumerate(_cameras(settings))]
        blocks.append(SheetBlock(block, rows))
    contact_sheet(path, title, columns, blocks)


def _fresh(frames: NDArray[np.uint8], steps: Sequence[str]) -> int:
    """L-1, the new frames of an interaction."""
    return (len(frames) - 1) // len(steps) if steps else 1


def _cameras(settings: Settings) -> list[str]:
    """The cameras' names for people."""
    return [name.replace("_", " ") for name in settings.world.cameras]
