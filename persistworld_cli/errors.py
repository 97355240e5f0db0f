"""Errors that a user can fix: what is wrong, where, and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PersistWorldError(Exception):
    """An error that the user can fix.

    Args:
        what: what is wrong, with the offending value in it.
        where: the file, setting or flag.
        fix: how to fix it.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        """All three parts, one per line."""
        parts = [self.what]
        if self.where:
            parts.append(f"  where: {self.where}")
        if self.fix:
            parts.append(f"  to do: {self.fix}")
        return "\n".join(parts)


class UsageError(PersistWorldError):
    """An invalid command line or preset: exit code 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for the known name closest to ``name``, else the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
