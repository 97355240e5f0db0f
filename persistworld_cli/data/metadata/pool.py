"""A function over many items in worker processes, results in the items' order and in bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from persistworld_cli.errors import PersistWorldError

Item = TypeVar("Item")
Result = TypeVar("Result")

_CHUNK = 32  # items handed over together
_WORTH = 256  # fewer are done here: starting processes would take longer


def default_workers() -> int:
    """One a core that this process may use; beyond 16, disks are what is waited for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)


def in_order(function: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None) -> Iterator[Result]:
    """``function`` of every item, in order; in ``workers`` processes where there are many.

    At most two chunks a worker are under way, so results never pile up. Closing the generator ends the workers.

    Args:
        function: importable by name (or a `functools.partial` of such); its module should need no torch.
        items: picklable.
        workers: processes; one a core by default, 1 does everything here.

    Raises:
        PersistWorldError: a worker was killed. Whatever ``function`` raises is raised here.
    """
    count = default_workers() if workers is None else workers
    if count <= 1 or len(items) < _WORTH:
        yield from map(function, items)
        return
    chunks = (items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK))
    # spawned, not forked: progress bars run threads, and a copy of this process would be as large as it is
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_begin) as pool:
        waiting: deque[Future[list[Result]]] = deque()
        try:
            while True:
                while len(waiting) < 2 * count and (chunk := next(chunks, None)) is not None:
                    waiting.append(pool.submit(_run, function, chunk))
                if not waiting:
                    return
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise PersistWorldError(
                "a worker process was killed", where="reading the dataset", fix="is there memory left? run it again"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def _run(function: Callable[[Item], Result], chunk: Sequence[Item]) -> list[Result]:
    return [function(item) for item in chunk]


def _begin() -> None:
    """In a worker: Ctrl-C is the parent's to answer, and a parent that was killed takes its workers along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
