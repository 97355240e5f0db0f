"""All terminal output: messages to standard error, data to standard output.

Text may be untrusted: a dataset's instruction, a tensor's name, a policy server's traceback. Control characters in it
could clear the screen, set the window's title or hide a line, so `escaped` is applied to all of it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterable
from functools import cache
from typing import IO, TYPE_CHECKING, Any

from persistworld_cli.errors import PersistWorldError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.text import Text

# Control characters except tab and newline, marks that reorder or break lines, and lone surrogates (not encodable).
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_PLAIN_WIDTH = 140  # columns where the output is not a terminal


def escaped(text: str) -> str:
    """`text` with control characters as escapes: ``\\u001b[2J``. A JSON document still parses to the same value."""
    if text.isprintable():  # the usual case
        return text
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text.replace("\r\n", "\n"))


def write_out(text: str) -> None:
    """Data on standard output, `escaped`."""
    sys.stdout.write(escaped(text))
    sys.stdout.flush()  # a server's first words, in a pipe


def show_traceback() -> None:
    """The traceback of the current error, on standard error."""
    sys.stderr.write(escaped(traceback.format_exc()))
    sys.stderr.flush()


def stderr_console() -> Console:
    """A Rich console on standard error; plain and wide unless it is a terminal."""
    return _console(stderr=True)


def stdout_console() -> Console:
    """A Rich console on standard output, for tables of results."""
    return _console(stderr=False)


def file_console(file: IO[str], width: int) -> Console:
    """A Rich console that writes plain text, `width` columns wide, into `file`."""
    return _console_class()(file=file, width=width, color_system=None, highlight=False, emoji=False)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PLAIN_WIDTH
    return _console_class()(stderr=stderr, width=width, highlight=False, emoji=False)


@cache
def _console_class() -> type[Console]:
    """Rich's console with `escaped` applied; imported on first use, since `--help` needs no Rich."""
    from rich.console import Console
    from rich.segment import Segment

    class EscapingConsole(Console):
        """Escapes strings before they are measured (tables stay aligned) and segments when they are rendered."""

        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(escaped(text), **options)

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(escaped(segment.text), segment.style)

    return EscapingConsole


def show_error(error: PersistWorldError) -> None:
    """A user's error as one block: what is wrong, where, and how to fix it."""
    from rich.text import Text

    block = Text("error: ", style="bold red")
    block.append(error.what, style="red")
    for label, text in (("where", error.where), ("to do", error.fix)):
        if text:
            block.append(f"\n  {label}: ", style="bold")
            block.append(text, style="default")
    stderr_console().print(block, soft_wrap=True)


class _Stderr(logging.Handler):
    """Looks up `sys.stderr` for every record: tests and progress bars replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        """As `note`."""
        note(self.format(record))


def listen_to_library(rank: int = 0) -> None:
    """Show the library's log on standard error: all of rank 0, warnings of the other ranks."""
    logger = logging.getLogger("persistworld_cli")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def note(text: str) -> None:
    """A message for the user, on standard error; a terminal gets it wrapped between words, but for commands to copy."""
    console = stderr_console()
    for line in text.split("\n"):
        console.print(line, markup=False, soft_wrap=not console.is_terminal or line.startswith("    "))


def debug_wanted() -> bool:
    """Whether user errors show tracebacks (``--debug`` or ``PERSISTWORLD_DEBUG=1``)."""
    return os.environ.get("PERSISTWORLD_DEBUG", "") not in ("", "0")
