"""The page and the videos of a blind study: nothing in them reveals which model is which.

A trial's video has three panes side by side in every frame: the recording, model "a", model "b". They are
therefore always in step; the page (``study.html``) cuts them apart and chooses for each rater whether a or b is left.

Shape legend: F frames, V cameras, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from persistworld_cli.data.raw.video import write_mp4
from persistworld_cli.files import write_text
from persistworld_cli.reports.page import render
from persistworld_cli.reports.videos import Images, enlarge

PANE = 320  # target width of a camera's view; the page scales it to the window
GAP = 16  # between panes: a macroblock, so that compression does not mix panes
LINE = 4  # between the cameras of a pane
CRF = 12  # finer than other videos: people judge the model, not the compression
QUESTION = "Which of the two is closer to the recording?"


@dataclass(frozen=True)
class Question:
    """What the page knows about a trial; the video is ``videos/<id>.mp4``.

    `cameras` are the names of the views shown, `text` is the robot's instruction, `width` and `height` are those of a
    pane in pixels, `seconds` is the length of the video.
    """

    id: str
    cameras: str
    text: str
    width: int
    height: int
    seconds: float


def pane(frames: Images) -> Images:
    """Views below each other, enlarged: (F, V, H, W, 3) -> (F, H', W', 3) with even sides."""
    views = enlarge(frames, PANE)
    line = np.zeros((len(views), LINE, *views.shape[3:]), np.uint8)
    rows = [part for view in range(views.shape[1]) for part in (views[:, view], line)][:-1]
    whole = np.concatenate(rows, axis=1)
    h, w = whole.shape[1:3]
    return np.pad(whole, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")


def write_question(folder: Path, name: str, panes: Sequence[Images], cameras: str, text: str, rate: float) -> Question:
    """Write a trial's video, unless it exists.

    Args:
        folder: folder of the study.
        name: the trial's id.
        panes: recording, a, b: each (F, V, H, W, 3).
        cameras, text: see `Question`.
        rate: frames per second.

    Raises:
        PersistWorldError: it cannot be written.
    """
    shown = [pane(frames) for frames in panes]
    count, h, w = shown[0].shape[:3]
    path = folder / "videos" / f"{name}.mp4"
    if not path.is_file():
        gap = np.zeros((count, h, GAP, 3), np.uint8)
        write_mp4(path, np.concatenate([shown[0], gap, shown[1], gap, shown[2]], axis=2), rate, crf=CRF)
    return Question(name, cameras, text, w, h, round(count / rate, 3))


def write_study_page(folder: Path, study: str, questions: Sequence[Question], rate: float) -> Path:
    """Write ``index.html``, which needs only the videos beside it; returns its path.

    Args:
        folder: of the study.
        study: its id.
        questions: all of them; the page orders them differently for each rater.
        rate: frames per second.
    """
    trials = [asdict(question) for question in sorted(questions, key=lambda question: question.id)]
    data = {"study": study, "gap": GAP, "frame_s": 1 / rate, "trials": trials}
    path = folder / "index.html"
    write_text(path, render(Path(__file__).with_name("study.html"), question=QUESTION, data=data))
    return path
