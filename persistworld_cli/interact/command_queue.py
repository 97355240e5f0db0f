"""What a page asked for and nobody has done yet: bounded, so that keys pressed while a step runs do not pile up."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

MOVES = ("key", "branch", "undo", "rewind")
_MOST = 64  # questions (images, files) that wait; a page asks for one after the other


class Desk:
    """Messages from server threads, taken by the one thread that computes.

    At most one move waits: a newer one takes its place, so the arm does what was asked last. Questions wait in order
    and come first.
    """

    def __init__(self) -> None:
        self._questions: deque[dict[str, Any]] = deque()
        self._move: dict[str, Any] | None = None
        self._changed = threading.Condition()

    def put(self, message: dict[str, Any]) -> bool:
        """Leave a message; False where too many questions wait already."""
        with self._changed:
            if message.get("do") in MOVES:
                self._move = message
            elif len(self._questions) >= _MOST:
                return False
            else:
                self._questions.append(message)
            self._changed.notify()
            return True

    def take(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message; None where none came in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._questions or self._move is not None, timeout_s)
            if self._questions:
                return self._questions.popleft()
            move, self._move = self._move, None
            return move
