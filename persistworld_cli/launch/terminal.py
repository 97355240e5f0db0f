"""The terminal of a worker that reads keys: whatever becomes of the worker, it is afterwards as it was before."""

from __future__ import annotations

import contextlib
import sys
import termios
from collections.abc import Iterator

_RESTORE = "\x1b[0m\x1b[?25h\x1b[?1049l"  # colours, cursor and screen; nothing where the worker has put them back


@contextlib.contextmanager
def keep_terminal() -> Iterator[None]:
    """Standard input's modes (and the screen of standard error) before and after are the same, even after a kill."""
    before = termios.tcgetattr(sys.stdin.fileno())
    try:
        yield
    finally:
        with contextlib.suppress(OSError, termios.error):  # the window is closed: there is nothing to put back
            if termios.tcgetattr(sys.stdin.fileno()) != before:
                sys.stderr.write(_RESTORE)
                sys.stderr.flush()
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSAFLUSH, before)
