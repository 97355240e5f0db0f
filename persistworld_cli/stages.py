"""Stages of a run: a method under ``@stage(NAME)``, or code in ``with stage(NAME)``, is timed by ``--profile``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Observer = Callable[[str], AbstractContextManager[object]]
_observer: Observer = nullcontext


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Time the block as a stage; nested stages are counted separately."""
    with _observer(name):
        yield


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Wrap every stage of every thread in ``observer(NAME)``."""
    global _observer
    _observer = observer
    try:
        yield
    finally:
        _observer = nullcontext
