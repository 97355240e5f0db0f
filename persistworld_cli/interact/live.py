"""`drive --live`: drive by keys in a terminal, one step per key; the screen shows views, pose and time.

Shape legend: F new frames of a step, V cameras, H, W pixels.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from persistworld_cli.config.keys import SESSION_KEYS
from persistworld_cli.console import escaped
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.interact.session import DriveSession, Step
from persistworld_cli.interact.terminal import Terminal
from persistworld_cli.interact.terminal_images import draw, find_protocol, fit
from persistworld_cli.reports.videos import camera_names
from persistworld_cli.rollout.interactive import Images

_GAP = 2  # pixels between views
_BETWEEN_FRAMES_S = 0.06
_CLEAR_LINE = "\x1b[K"


def drive_live(session: DriveSession) -> None:
    """Drive until the user quits (``q``, Ctrl-C, Ctrl-D, end of input); then restore the terminal."""
    with suppress(KeyboardInterrupt), Terminal() as terminal:
        screen = _Screen(session, terminal)
        screen.show("press a key")
        while True:
            key = terminal.key()
            if key is None or key == "q":
                return
            if key in session.settings.drive.keys or key == "x":
                screen.status(f"computing {key} ...")
            before = session.head
            note = _act(session, key)
            if session.head is not before and key != "z":
                screen.play(session.head)
            screen.show(note)


def _act(session: DriveSession, key: str) -> str:
    """Carry out a key; returns a note to show."""
    try:
        if key == "z":
            session.undo()
            return "undone"
        if key == "x":
            return f"the same step with new noise (branch {session.branch().branch})"
        if key in session.settings.drive.keys:
            session.press(key)
            return session.keymap.meaning(key)
    except PersistWorldError as error:
        return error.what
    return "" if key.isspace() else f"key {key!r} does nothing here"


class _Screen:
    """The whole screen, redrawn each time."""

    def __init__(self, session: DriveSession, terminal: Terminal) -> None:
        self._session, self._terminal = session, terminal
        self._protocol = find_protocol(session.settings.drive.display, os.environ)
        self._size, self._last = terminal.size, terminal.size.lines

    def show(self, note: str) -> None:
        """The current step, and a note."""
        self._draw(self._session.head.images[-1], note)

    def play(self, step: Step) -> None:
        """Show the frames of a step one after the other, unless more keys are waiting."""
        for images in step.images[:-1]:
            if self._terminal.peek():
                return
            self._draw(images, "")
            time.sleep(_BETWEEN_FRAMES_S)

    def status(self, note: str) -> None:
        """Redraw only the last line."""
        waiting = self._terminal.peek()
        more = f"   ({len(waiting)} more waiting)" if waiting else ""
        self._terminal.write(f"\x1b[{self._last};1H{_line(note + more, self._size.columns)}{_CLEAR_LINE}")

    def _draw(self, images: Images, note: str) -> None:
        """Views (V, H, W, 3) and texts."""
        if self._terminal.size != self._size:
            self._size = self._terminal.size
            self._terminal.write("\x1b[2J")
        columns, lines = self._size
        below = [_line(line, columns) for line in _status(self._session, columns)]
        whole, h, w = arrange(images, max(2, lines - len(below) - 5), columns - 1)
        item = self._session.start.item
        title = f"persistworld drive: episode {item.episode}, frame {item.start}, seed {item.seed}"
        views = ", ".join(camera_names(self._session.settings))
        above = [title, f"{self._session.start.text}   views: {views}".strip()]
        texts = [f"\x1b[1m{_line(text, columns)}\x1b[0m{_CLEAR_LINE}" for text in above]
        image = draw(self._protocol, whole, h, w)
        place = 4 + h if image else 4
        out = ["\x1b[H", "\r\n".join(texts), "\x1b[3;1H", image, f"\x1b[{place};1H"]
        out += [f"{line}{_CLEAR_LINE}\r\n" for line in below]
        self._terminal.write("".join(out))
        self._last = min(lines, place + len(below) + 1)
        self.status(note)


def _line(text: str, columns: int) -> str:
    """An untrusted text as one line, without control sequences."""
    return " ".join(escaped(text).split("\n"))[: columns - 1]


def arrange(images: Images, lines: int, columns: int) -> tuple[Images, int, int]:
    """Views (V, H, W, 3) as one image, in the layout that shows them largest, and the lines and columns it needs."""

    def size(count: int) -> tuple[int, int, int]:
        whole = mosaic(images, count)
        h, w = fit(whole.shape[0], whole.shape[1], lines, columns)
        return w // count, h, w

    best = max(range(len(images), 0, -1), key=size)
    return mosaic(images, best), *size(best)[1:]


def mosaic(images: Images, count: int) -> Images:
    """Views (V, H, W, 3) in rows of ``count``, black between them and in empty places."""
    rows = -(-len(images) // count)
    h, w = images.shape[1] + _GAP, images.shape[2] + _GAP
    whole = np.zeros((rows * h - _GAP, count * w - _GAP, 3), np.uint8)
    for view, image in enumerate(images):
        top, left = view // count * h, view % count * w
        whole[top : top + image.shape[0], left : left + image.shape[1]] = image
    return whole


def _status(session: DriveSession, columns: int) -> list[str]:
    """Steps, pose, time per step, and the keys."""
    head, path, keymap = session.head, session.path, session.keymap
    keys = "".join(step.key for step in path) or "-"
    taken = [step.seconds for step in session.steps[1:]]
    seconds = f"{head.seconds:.2f} s (median {np.median(taken):.2f} s)" if head.depth else "-"
    branch = f"   branch {head.branch}" if head.branch else ""
    return [
        f"step {head.depth}{branch}   time of the step {seconds}   keys {keys[-max(8, columns - 60) :]}",
        *_wrapped(
            [f"{one.name} {value:+.3f} {one.unit}" for one, value in zip(keymap.dimensions, session.pose, strict=True)],
            columns,
        ),
        "",
        *_wrapped([f"{key} {keymap.meaning(key)}" for key in session.settings.drive.keys], columns),
        "   ".join(f"{key} {what}" for key, what in SESSION_KEYS.items()),
    ]


def _wrapped(texts: Sequence[str], columns: int) -> list[str]:
    """Texts side by side, in as many lines as they need."""
    lines = [""]
    for text in texts:
        longer = f"{lines[-1]}   {text.strip()}".strip()
        if len(longer) < columns or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(text.strip())
    return lines
