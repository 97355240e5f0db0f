"""The terminal of a worker that reads keys: restored however the worker ends."""

from __future__ import annotations

import contextlib
import sys
import termios
from collections.abc import Iterator

_RESTORE = "\x1b[0m\x1b[?25h\x1b[?1049l"  # colours, cursor and screen; no effect if the worker has restored them


@contextlib.contextmanager
def keep_terminal() -> Iterator[None]:
    """Restore standard input's modes, and the screen of standard error, at the end of the block."""
    before = termios.tcgetattr(sys.stdin.fileno())
    try:
        yield
    finally:
        with contextlib.suppress(OSError, termios.error):  # the window is closed
            if termios.tcgetattr(sys.stdin.fileno()) != before:
                sys.stderr.write(_RESTORE)
                sys.stderr.flush()
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSAFLUSH, before)
