"""Batches of clips read ahead by worker processes: the same batches, in the same order, as without them.

A worker is a fork of this process that holds the same `ClipMixture`; it is told which step to read and writes the
latents into memory that both share, so that only a few numbers and words go through its pipe. Worker k of W reads steps
k, k + W, ...; each is asked at most ``ahead`` steps in advance.
"""

from __future__ import annotations

import logging
import mmap
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from itertools import count
from math import prod
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persistworld_cli.compat import end_with_parent
from persistworld_cli.data.clips.mixture import ClipBatch, ClipMixture
from persistworld_cli.errors import PersistWorldError

logger = logging.getLogger(__name__)
_Request = tuple[int, int, int, int, int]  # which of the worker's slots; seed, step, rank, world


class _Answer(NamedTuple):
    """A `ClipBatch` without latents, as it goes through a pipe: a tensor would go as an open file of its own."""

    actions: NDArray[np.float32]
    texts: list[str]
    episodes: list[str]
    ids: NDArray[np.int64]
    sources: list[int]


class ClipLoader:
    """Batches of ``size`` clips, read by worker processes. Use it as a context: leaving it ends them.

    Make it early: the workers start at once, as copies of this process, and should not copy a model as well.

    Args:
        clips: what is read.
        size: clips of a batch (on this process).
        workers: processes; 0 reads in this process, when a batch is asked for. Linux only: elsewhere 0 is taken.
        ahead: batches that each of them may read in advance.
    """

    def __init__(self, clips: ClipMixture, size: int, *, workers: int = 0, ahead: int = 2) -> None:
        self.clips, self.size = clips, size
        if workers and not sys.platform.startswith("linux"):
            logger.info("clips.workers = %d: only Linux has them, clips are read in the training process", workers)
            workers = 0
        self._workers = [_Worker(clips, size, ahead) for _ in range(workers)]

    def __enter__(self) -> ClipLoader:
        """Leaving the context ends the workers."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; they only read, so nothing is lost."""
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def batches(self, seed: int, first: int, rank: int = 0, world: int = 1) -> Iterator[ClipBatch]:
        """``clips.batch(seed, step, size, rank, world)`` for step = first, first + 1, ... without end. Call it once.

        Raises:
            PersistWorldError: what reading the clips raises, at the step that it concerns; or a worker was killed.
        """
        workers = self._workers
        if not workers:
            for step in count(first):
                yield self.clips.batch(seed, step, self.size, rank, world)
        asked = count(first)
        for number in range(len(workers) * workers[0].slots):
            workers[number % len(workers)].ask(seed, next(asked), rank, world)
        for number in count():
            worker = workers[number % len(workers)]
            batch = worker.take()
            worker.ask(seed, next(asked), rank, world)
            yield batch


class _Worker:
    """One worker process, as seen from the process that it reads for."""

    def __init__(self, clips: ClipMixture, size: int, slots: int) -> None:
        shape = clips.batch_shape(size)
        self.slots, self._clips = slots, clips
        # not named shared memory: /dev/shm is 64 MB in many containers, and an anonymous map leaves nothing behind
        memory = mmap.mmap(-1, slots * prod(shape) * 4)
        self._latents = torch.frombuffer(memory, dtype=torch.float32).view(slots, *shape)
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(clips, self._latents, theirs), daemon=True, name="clips")
        self._process.start()
        theirs.close()
        self._asked = self._taken = 0

    def ask(self, seed: int, step: int, rank: int, world: int) -> None:
        """Have a batch read; at most ``slots`` may be waiting."""
        try:
            self._pipe.send((self._asked % self.slots, seed, step, rank, world))
        except OSError:
            raise self._dead() from None
        self._asked += 1

    def take(self) -> ClipBatch:
        """The batch that was asked for first; waits for it."""
        ready = wait([self._pipe, self._process.sentinel])
        if self._pipe not in ready and not self._pipe.poll():
            raise self._dead()
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise self._dead() from None
        if isinstance(answer, Exception):
            raise answer
        slot, self._taken = self._taken % self.slots, self._taken + 1
        return ClipBatch(
            latents=self._clips.memory.take(self._latents.shape[1:]).copy_(self._latents[slot]),  # used again next
            actions=torch.from_numpy(answer.actions),
            texts=answer.texts,
            episodes=answer.episodes,
            ids=torch.from_numpy(answer.ids),
            sources=answer.sources,
        )

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.kill()
        self._process.join()

    def _dead(self) -> PersistWorldError:
        """The error for a process that is gone."""
        self._process.join(1)
        code = self._process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return PersistWorldError(
            f"a process that reads clips {how}",
            where="clips.workers",
            fix="if memory ran out (SIGKILL), take fewer clips.workers or a smaller batch; the same command goes on "
            "from the last saved state",
        )


def _work(clips: ClipMixture, latents: Tensor, pipe: Connection) -> None:
    """A worker's life: read what is asked for until there is nobody to ask."""
    end_with_parent(signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group: the training process saves first, then ends us
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    while True:
        try:
            request: _Request = pipe.recv()
            pipe.send(_answer(clips, latents, *request))
        except (EOFError, OSError):
            os._exit(0)


def _answer(
    clips: ClipMixture, latents: Tensor, slot: int, seed: int, step: int, rank: int, world: int
) -> _Answer | Exception:
    """What a batch has beside its latents, which are in the slot; or what went wrong."""
    try:
        batch = clips.batch_into(latents[slot], seed, step, rank, world)
    except PersistWorldError as error:
        return error
    except Exception:
        return RuntimeError(f"reading clips failed in a worker process:\n{traceback.format_exc()}")
    return _Answer(batch.actions.numpy(), batch.texts, batch.episodes, batch.ids.numpy(), batch.sources)
