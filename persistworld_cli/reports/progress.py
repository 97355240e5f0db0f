"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from persistworld_cli.console import note, stderr_console

PLAIN_EVERY_S = 20.0


class Meter:
    """Counts work on stderr. Use as a context manager; `advance(n, reward=0.1)` shows the numbers beside the count.

    Args:
        label: name of the work.
        total: amount of work; may be set later.
        done: amount already done (a resumed run).
        quiet: show nothing (ranks other than 0).
    """

    def __init__(self, label: str, total: int, done: int = 0, quiet: bool = False) -> None:
        self.label, self.total, self.done, self.quiet = label, total, done, quiet
        self._first = done
        self._begun = self._printed = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Meter:
        if not self.quiet and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=stderr_console(),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and not self.quiet and self.total:
            self._line("")

    def advance(self, amount: int = 1, **numbers: float) -> None:
        """Count `amount` more; show `numbers` with 4 digits."""
        self.done += amount
        shown = " ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, total=self.total, note=shown)
        elif not self.quiet and time.monotonic() - self._printed > PLAIN_EVERY_S:
            self._line(shown)

    def _line(self, shown: str) -> None:
        self._printed = now = time.monotonic()
        elapsed = now - self._begun
        rate = (self.done - self._first) / elapsed if elapsed else 0.0
        left = f"{(self.total - self.done) / rate:.0f} s left" if rate else "time left unknown"
        note(f"{self.label}: {self.done}/{self.total}, {elapsed:.0f} s, {rate:.3g}/s, {left} {shown}".rstrip())
