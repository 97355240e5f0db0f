"""A terminal in raw mode: reads single keys, shows a whole screen, is restored on exit."""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import termios
from collections.abc import Sequence
from types import TracebackType
from typing import Any

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[2J\x1b[H"  # the alternate screen, no cursor
LEAVE = "\x1b[0m\x1b[?25h\x1b[?1049l"
_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.|.)?")  # arrow keys etc.: their letters are not keys
_WAITING = 16  # keys typed ahead at most; a held key repeats faster than any model
_END_OF_INPUT = "\x04"


class Terminal:
    """The terminal of standard input and standard error; use as a context manager.

    Ctrl-C stays a signal, so it also ends a long step. Ctrl-Z is off: it would leave the shell on the alternate screen.
    """

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno()
        self._before: list[Any] = []
        self.waiting: list[str] = []

    def __enter__(self) -> Terminal:
        self._before = termios.tcgetattr(self._fd)
        mode = termios.tcgetattr(self._fd)
        mode[3] &= ~(termios.ICANON | termios.ECHO)
        mode[6][termios.VSUSP] = b"\x00"
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._fd, termios.TCSADRAIN, mode)
        self.write(_ENTER)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError, termios.error):  # the window is closed: nothing to restore
            self.write(LEAVE)
            termios.tcsetattr(self._fd, termios.TCSAFLUSH, self._before)

    @property
    def size(self) -> os.terminal_size:
        """Columns and lines."""
        try:
            size = os.get_terminal_size(sys.stderr.fileno())
        except OSError:
            size = os.terminal_size((0, 0))
        return size if min(size) > 0 else os.terminal_size((80, 24))

    def key(self) -> str | None:
        """The next key; waits for one. None at the end of input."""
        while not self.waiting:
            self._read()
        key = self.waiting.pop(0)
        return None if key == _END_OF_INPUT else key

    def peek(self) -> Sequence[str]:
        """Keys typed ahead, without waiting."""
        while select.select([self._fd], [], [], 0)[0] and _END_OF_INPUT not in self.waiting:
            self._read()
        return self.waiting

    def write(self, text: str) -> None:
        """Show text; escape sequences go through."""
        sys.stderr.write(text)
        sys.stderr.flush()

    def _read(self) -> None:
        """Append typed keys to the waiting ones; drop those beyond the limit."""
        try:
            data = os.read(self._fd, 4096)
        except OSError:  # the terminal is gone
            data = b""
        text = _SEQUENCE.sub("", data.decode(errors="replace")) if data else _END_OF_INPUT
        text = text.replace("\x00", _END_OF_INPUT)  # a Ctrl-D typed before the mode changed
        self.waiting = [*self.waiting, *text][:_WAITING]
        if _END_OF_INPUT in text and _END_OF_INPUT not in self.waiting:
            self.waiting.append(_END_OF_INPUT)
