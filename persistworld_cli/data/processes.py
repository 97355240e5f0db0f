"""Worker processes: each takes jobs from one pipe and sends the results back through it.

A worker ignores the signals that end a run (its parent handles them, and ends it) and dies with its parent. A spawned
worker starts empty, with one thread; a forked one (Linux) starts as a copy of this process. No torch.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from persistworld_cli.compat import end_with_parent
from persistworld_cli.errors import PersistWorldError

Item = TypeVar("Item")
Result = TypeVar("Result")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_CHUNK = 32  # items of `in_order` handed over together
_FEW = 256  # fewer items are not worth starting processes for
_UNREAD = 2  # results that a worker buffers


class WorkerDied(PersistWorldError):
    """A worker process is gone; `what` says how it ended: ``was killed by SIGKILL``."""


class Worker:
    """One worker process; its creator must end it. ``work``: job -> its results; importable by name if spawned."""

    def __init__(self, work: Callable[[Any], Iterable[Any]], method: str = "spawn") -> None:
        context: Any = multiprocessing.get_context(method)
        if method == "spawn":
            resource_tracker.ensure_running()  # starting it below would unblock the signals
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_main, args=(work, theirs), daemon=True)
        with _environment():
            self.process.start()
        theirs.close()

    def give(self, job: Any) -> None:
        """Send a job; `take` notices a dead worker."""
        with suppress(OSError):
            self.pipe.send(job)

    def take(self) -> Any:
        """The next result; waits for it.

        Raises:
            WorkerDied: the process is gone.
            PersistWorldError: raised by `work`; any other exception of it is a RuntimeError with its traceback.
        """
        try:
            result = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            raise WorkerDied(self.end(patience=5.0)) from None  # the pipe closes a moment before the process is gone
        if isinstance(result, _Raised):
            raise result.error
        return result

    def end(self, patience: float = 0.0) -> str:
        """Kill the process, unless it ends by itself within ``patience`` seconds; returns in words how it ended."""
        self.process.join(patience)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        code = self.process.exitcode
        return f"ended with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


def in_turn(workers: Sequence[Worker], jobs: Iterable[Any], ahead: int) -> Iterator[Any]:
    """The one result of each job, in the jobs' order. Worker k of W takes jobs k, k + W, ..., ``ahead`` in advance.

    Raises:
        WorkerDied: a worker is gone; or another error of `Worker.take`, at the job that caused it.
    """
    left = iter(jobs)
    busy: deque[Worker] = deque()
    for worker, job in zip([*workers] * ahead, left, strict=False):
        worker.give(job)
        busy.append(worker)
    while busy:
        worker = busy.popleft()
        result = worker.take()
        for job in islice(left, 1):
            worker.give(job)
            busy.append(worker)
        yield result


def in_order(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None
) -> Generator[Result, None, None]:
    """``function`` of every item, in order; in ``workers`` spawned processes where there are many items.

    Results never pile up: at most two chunks of items per worker are under way. Closing the generator ends the workers.

    Args:
        function: importable by name, or a partial of such; its module should need no torch.
        items: picklable.
        workers: processes; by default one per core, at most 16 (more wait for the disk); 1: all is done in this one.

    Raises:
        PersistWorldError: a worker was killed; or raised by ``function``.
    """
    if workers is None:
        workers = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if workers <= 1 or len(items) < _FEW:
        yield from map(function, items)
        return
    chunks = (items[begin : begin + _CHUNK] for begin in range(0, len(items), _CHUNK))
    pool: list[Worker] = []
    try:
        pool.extend(Worker(partial(_chunk, function)) for _ in range(workers))
        for results in in_turn(pool, chunks, ahead=2):
            yield from results
    except WorkerDied as error:
        raise PersistWorldError(
            "a worker process was killed", where="reading the dataset", fix="check for free memory and run it again"
        ) from error
    finally:
        for worker in pool:
            worker.end()


def _chunk(function: Callable[[Item], Result], items: Sequence[Item]) -> list[list[Result]]:
    return [[function(item) for item in items]]


@contextmanager
def _environment() -> Iterator[None]:
    """Start a process inside this: `_SIGNALS` blocked, one thread, without the launcher's malloc settings."""
    kept, blocked = dict(os.environ), signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        for name in [name for name in kept if name.startswith("MALLOC_")]:
            del os.environ[name]
        os.environ.update(_ONE_THREAD)
        yield
    finally:
        for name in _ONE_THREAD:
            del os.environ[name]
        os.environ.update(kept)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class _Raised:
    """An error on its way to the parent."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _main(work: Callable[[Any], Iterable[Any]], pipe: Connection) -> None:
    """A worker's main loop, until the parent closes the pipe. A thread sends, so that work does not wait for it."""
    end_with_parent(signal.SIGKILL)
    results: queue.Queue[Any] = queue.Queue(_UNREAD)
    threading.Thread(target=_send, args=(results, pipe), daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            job = pipe.recv()
            try:
                for result in work(job):
                    results.put(result)
            except PersistWorldError as error:
                results.put(_Raised(error))
            except Exception:
                results.put(_Raised(RuntimeError(f"a worker process failed:\n{traceback.format_exc()}")))


def _send(results: queue.Queue[Any], pipe: Connection) -> None:
    """Send results, in a worker's thread."""
    with suppress(OSError):
        while True:
            pipe.send_bytes(pickle.dumps(results.get(), pickle.HIGHEST_PROTOCOL))
    os._exit(0)  # the parent is done with this process, or gone
