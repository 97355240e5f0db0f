"""Progress of long work on standard error: a bar that keeps moving on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from persistworld_cli.console import escaped, note, stderr_console

PLAIN_EVERY_S = 20.0
_BAR, _SHORTEST = 40, 6  # columns of the bar at most and at least


class Meter:
    """Counts work. Use as a context manager; `advance(n, reward=0.1)` shows the numbers beside the count.

    Args:
        label: name of the work.
        total: amount of work, 0 while it is unknown; may be set later.
        done: amount already done (a resumed run).
        unit: of the amount.
        quiet: show nothing (ranks other than 0).
    """

    def __init__(self, label: str, total: int, done: int = 0, unit: str = "", quiet: bool = False) -> None:
        self.label, self.total, self.done, self.unit, self.quiet = label, total, done, unit, quiet
        self._first = done
        self._numbers: list[str] = []
        self._begun = self._printed = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> Meter:
        if not self.quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._live = Live(self, console=stderr_console(), refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif kind is None and not self.quiet and self.total:
            self._line()

    def advance(self, amount: int = 1, **numbers: float | str) -> None:
        """Count `amount` more; show `numbers` with 4 digits."""
        self.done += amount
        self._numbers = [
            f"{name.replace('_', ' ')} {value if isinstance(value, str) else format(value, '.4g')}"
            for name, value in numbers.items()
        ]
        if self._live is None and not self.quiet and time.monotonic() - self._printed > PLAIN_EVERY_S:
            self._line()

    def _line(self) -> None:
        self._printed = time.monotonic()
        note(", ".join(filter(None, (f"{self.label}: {self._count()}", *self._times(), *self._numbers))))

    def _count(self) -> str:
        total = f"/{self.total}" if self.total else ""
        return f"{self.done}{total} {self.unit}".rstrip()

    def _times(self) -> tuple[str, ...]:
        """Time so far, and time left by the mean rate so far."""
        elapsed, counted, left = time.monotonic() - self._begun, self.done - self._first, self.total - self.done
        if left <= 0 or counted <= 0:
            return (clock(elapsed),)
        return clock(elapsed), f"{clock(elapsed / counted * left)} left"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line: label, bar, count and times; then the numbers that a short bar leaves room for."""
        words = f" {self._count()}  {', '.join(self._times())}"
        room = options.max_width - len(words) - 1
        label = Text(escaped(self.label), end="")
        label.truncate(max(0, room), overflow="ellipsis")
        room -= label.cell_len
        numbers = list(map(escaped, self._numbers))
        while numbers and len(", ".join(numbers)) > room - _SHORTEST - 2:
            numbers.pop()
        shown = f"  {', '.join(numbers)}" if numbers else ""
        yield label
        if self.total and room - len(shown) >= _SHORTEST:
            yield Text(" ", end="")
            yield ProgressBar(self.total, min(self.done, self.total), width=min(_BAR, room - len(shown)))
        yield Text(words + shown, end="")


def clock(seconds: float) -> str:
    """``0:07``, ``12:30``, ``1:02:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
