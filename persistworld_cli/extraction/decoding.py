"""Decoding processes: raw episodes become chunks of images ahead of the encoder, in bounded memory.

Each process is ``python -m persistworld_cli.extraction.decoding``, a plain child with a pipe in and a pipe out: nothing
is forked, nothing is shared, and it never loads torch. It prepares one episode at a time (`preparing.prepare`) and
blocks on its pipe when nobody reads. One thread of the parent reads the pipes into a bounded queue, hands out the next
episode, and notices a process that died.

Memory, whatever the length of an episode: in the parent at most `Decoders.ahead` + 1 chunks of 16 frames x V cameras;
in each process one such chunk, the images of one camera's chunk at the recorded size, and one table (of a version 3
file, the row groups that hold the episode).
"""

from __future__ import annotations

import io
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.compat import end_with_parent
from persistworld_cli.data.raw.lerobot import RawDataset, RawEpisode
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.extraction.preparing import Begun, Recipe, prepare
from persistworld_cli.files import CannotWrite

_IGNORED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
)  # the parent hears them, and ends its children
_DEATHS = 3  # this many processes died one after the other, none of them having finished an episode: something is amiss
_POLL_S = 0.2  # how often somebody who waits looks up


@dataclass(frozen=True)
class Job:
    """An episode to prepare, and the folder to stage it in."""

    episode: RawEpisode
    stage: Path


@dataclass(frozen=True)
class Done:
    """Comes last: all images were handed on, annotation and videos are staged."""


@dataclass(frozen=True)
class Failed:
    """Comes last: the episode cannot be used."""

    error: PersistWorldError


Event = tuple[int, "Begun | NDArray[np.uint8] | Done | Failed"]  # episode and what came of it
Feed = Callable[[], "Job | None"]  # the next job; None: none at present. Raises StopIteration when there are no more.


def in_process(recipe: Recipe, feed: Feed, idle: Callable[[], None]) -> Generator[Event, None, None]:
    """The same events without other processes: the caller waits for every image.

    Args:
        recipe: what all episodes share.
        feed: see `Feed`.
        idle: called now and then while there is no job at present; may raise.
    """
    dataset = RawDataset(recipe.raw)
    while True:
        try:
            job = feed()
        except StopIteration:
            return
        if job is None:
            time.sleep(_POLL_S)
            idle()
            continue
        for event in _prepared(recipe, dataset, job):
            yield job.episode.index, event


class Decoders:
    """Decoding processes and the thread that serves them. Use as a context manager; leaving it ends them all.

    Args:
        recipe: what all episodes share.
        feed: called from the thread; see `Feed`.
        workers: processes.
        ahead: chunks that may wait for the encoder.
    """

    def __init__(self, recipe: Recipe, feed: Feed, workers: int, ahead: int) -> None:
        self.ahead = ahead
        self._recipe, self._feed, self._count = recipe, feed, workers
        self._queue: queue.Queue[Event | BaseException | None] = queue.Queue(ahead)
        self._workers: dict[Connection, _Child] = {}
        self._closing = threading.Event()
        self._deaths = 0
        self._thread = threading.Thread(target=self._serve, name="decoders")

    def __enter__(self) -> Decoders:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for child in list(self._workers.values()):
            child.kill()
        while self._thread.is_alive():
            with suppress(queue.Empty):  # the thread may be waiting for room
                self._queue.get(timeout=0.05)
        self._thread.join()

    def events(self, idle: Callable[[], None]) -> Iterator[Event]:
        """What comes of the episodes, as it comes; those of several episodes mingle.

        Args:
            idle: called now and then while nothing comes; may raise.

        Raises:
            PersistWorldError: the disk is full, or processes die again and again.
        """
        while True:
            try:
                item = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                idle()
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    # -- the thread -----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        # Children inherit which signals are blocked: a Ctrl-C reaches the whole foreground group, and must end nothing
        # but the parent's loop.
        signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
        try:
            self._work()
            self._put(None)
        except BaseException as error:  # every error belongs to the one who reads the queue
            self._put(error)
        finally:
            for child in self._workers.values():
                child.end()

    def _work(self) -> None:
        more = True
        while more or self._workers:
            if self._closing.is_set():
                return
            more = more and self._hand_out()
            busy = [connection for connection, child in self._workers.items() if child.job is not None]
            if not busy and not more:
                return
            for connection in wait(busy, timeout=_POLL_S) if busy else []:
                self._hear(connection)  # type: ignore[arg-type]
            if not busy:
                self._closing.wait(_POLL_S)

    def _hand_out(self) -> bool:
        """Give idle processes work, starting them as needed; False when there is no more work."""
        while True:
            child = next((child for child in self._workers.values() if child.job is None), None)
            if child is None and len(self._workers) >= self._count:
                return True
            try:
                job = self._feed()
            except StopIteration:
                return False
            if job is None:
                return True
            if child is None:
                child = _Child(self._recipe)
                self._workers[child.out] = child
            child.give(job)

    def _hear(self, connection: Connection) -> None:
        """One message of a process, or its end."""
        child = self._workers[connection]
        assert child.job is not None
        index = child.job.episode.index
        try:
            event = child.receive()
        except (EOFError, OSError):
            if not self._closing.is_set():
                self._bury(child)
            return
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, Done | Failed):
            child.job = None
            self._deaths = 0
        self._put((index, event))

    def _bury(self, child: _Child) -> None:
        """A process died: its episode is reported, and another process will take its place."""
        assert child.job is not None
        how = child.end(patience=5.0)  # its pipe closes a moment before it is gone
        del self._workers[child.out]
        self._deaths += 1
        error = PersistWorldError(
            f"its decoding process {how}",
            where=str(child.job.episode.table),
            fix="extract it again; if that repeats itself, the recording is damaged or memory is short",
        )
        if self._deaths >= _DEATHS:
            raise PersistWorldError(
                f"{self._deaths} decoding processes died one after the other; the last one {how}",
                where=f"episode {child.job.episode.index}",
                fix="if memory was short, take fewer --workers; --workers 0 decodes in this process",
            )
        self._put((child.job.episode.index, Failed(error)))

    def _put(self, item: Event | BaseException | None) -> None:
        """Into the queue, when there is room."""
        while not self._closing.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=_POLL_S)
                return


class _Child:
    """One decoding process, seen from the parent."""

    def __init__(self, recipe: Recipe) -> None:
        command = [sys.executable, "-m", "persistworld_cli.extraction.decoding"]
        path = os.pathsep.join(p for p in sys.path if p)  # finds the package where the parent found it
        one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**kept, **one, "PYTHONPATH": path}
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self.job: Job | None = None
        self.out = Connection(os.dup(self._process.stdout.fileno()), writable=False)
        self._jobs = Connection(os.dup(self._process.stdin.fileno()), readable=False)
        self._process.stdin.close()
        self._process.stdout.close()
        self._send(recipe)

    def give(self, job: Job) -> None:
        """Hand over an episode. That the process is dead already shows when its answer is read."""
        self.job = job
        self._send(job)

    def receive(self) -> Any:
        """The next event of its job, or an error that must stop the run."""
        message = self.out.recv()
        if not isinstance(message, _Shape):
            return message
        images = np.empty(message.shape, np.uint8)
        self.out.recv_bytes_into(images.data.cast("B"))
        return images

    def kill(self) -> None:
        """End it now."""
        self._process.kill()

    def end(self, patience: float = 0.0) -> str:
        """End it, unless it ends by itself within ``patience`` seconds; returns in words how it ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self._process.kill()
        code = self._process.wait()
        for connection in (self.out, self._jobs):
            connection.close()
        if code >= 0:
            return f"ended with code {code}"
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{hint}"

    def _send(self, item: Recipe | Job) -> None:
        with suppress(BrokenPipeError):
            self._jobs.send(item)


@dataclass(frozen=True)
class _Shape:
    """Announces images: their bytes follow."""

    shape: tuple[int, ...]


def _prepared(recipe: Recipe, dataset: RawDataset, job: Job) -> Iterator[Begun | NDArray[np.uint8] | Done | Failed]:
    """All events of one episode; a bad recording is one of them, a full disk is not."""
    dataset.adopt(job.episode)
    try:
        yield from prepare(recipe, dataset, job.episode.index, job.stage)
        yield Done()
    except CannotWrite:
        raise
    except PersistWorldError as error:
        yield Failed(error)


def _child_main() -> None:
    """A decoding process: jobs from standard input until it closes, events to standard output."""
    end_with_parent(signal.SIGKILL)
    jobs, out = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
    os.dup2(2, 1)  # what a library prints must not end up between the events
    try:
        recipe: Recipe = jobs.recv()
        dataset = RawDataset(recipe.raw)
        while True:
            job: Job = jobs.recv()
            for event in _prepared(recipe, dataset, job):
                if isinstance(event, np.ndarray):
                    out.send(_Shape(event.shape))
                    out.send_bytes(event.data.cast("B"))
                else:
                    out.send(event)
    except (EOFError, BrokenPipeError):
        return  # the parent is done with us, or gone
    except PersistWorldError as error:
        out.send(error)
    except BaseException as error:
        text = io.StringIO()
        traceback.print_exc(file=text)
        out.send(RuntimeError(f"a decoding process failed: {error!r}\n{text.getvalue()}"))


if __name__ == "__main__":
    # under the name by which the parent knows the classes that travel
    from persistworld_cli.extraction.decoding import _child_main as main

    main()
