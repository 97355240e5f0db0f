"""Where people are spoken to: standard error. Data alone goes to standard output, from the commands."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from persistworld_cli.errors import PersistWorldError

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_WIDTH = 140  # where nobody watches, lines need not fit a window


def stderr_console() -> Console:
    """A Rich console on standard error; plain and wide where that is no terminal."""
    return _console(stderr=True)


def stdout_console() -> Console:
    """A Rich console on standard output, for tables that are a command's result."""
    return _console(stderr=False)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PLAIN_WIDTH
    return Console(stderr=stderr, width=width, highlight=False)


def show_error(error: PersistWorldError) -> None:
    """A user's mistake as one block: what is wrong, where, and what to do."""
    from rich.text import Text

    block = Text("error: ", style="bold red")
    block.append(error.what, style="red")
    for label, text in (("where", error.where), ("to do", error.fix)):
        if text:
            block.append(f"\n  {label}: ", style="bold")
            block.append(text, style="default")
    stderr_console().print(block, soft_wrap=True)


class _Stderr(logging.Handler):
    """Writes to whatever standard error is at that moment (tests and progress bars replace it)."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        print(self.format(record), file=sys.stderr, flush=True)


def listen_to_library(rank: int = 0) -> None:
    """Show what the library logs on standard error: notices of rank 0, warnings of every rank."""
    logger = logging.getLogger("persistworld_cli")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def note(text: str) -> None:
    """One line for the person at the terminal."""
    stderr_console().print(text, markup=False, soft_wrap=True)


def debug_wanted() -> bool:
    """Whether tracebacks of user mistakes are wanted (``--debug`` or ``PERSISTWORLD_DEBUG=1``)."""
    return os.environ.get("PERSISTWORLD_DEBUG", "") not in ("", "0")
