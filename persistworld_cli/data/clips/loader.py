"""Batches of clips read ahead by worker processes: the same batches, in the same order, as without them.

A worker is a fork of this process with the same `ClipMixture`. It receives the number of a step, reads its batch and
writes the latents into shared memory, so that only a few numbers and texts go through its pipe. (torch's DataLoader
takes 1.6 times the processor time per clip, and shares memory through /dev/shm, 64 MB in many containers.)
"""

from __future__ import annotations

import logging
import mmap
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from math import prod

import torch
from torch import Tensor

from persistworld_cli.data.clips.mixture import ClipBatch, ClipMixture
from persistworld_cli.data.processes import Worker, WorkerDied, in_turn
from persistworld_cli.errors import PersistWorldError

logger = logging.getLogger(__name__)


class ClipLoader:
    """Batches of ``size`` clips, read by worker processes. Use it as a context manager: its exit ends them.

    Create it before the model: the workers start at once, as copies of this process, and should not copy a model too.

    Args:
        clips, size: what is read, and how many clips a batch has (on this process).
        workers: processes; 0: read in this process, on demand. Linux only: elsewhere it is 0.
        ahead: batches that each worker may read in advance.
    """

    def __init__(self, clips: ClipMixture, size: int, *, workers: int = 0, ahead: int = 2) -> None:
        self.clips, self.size, self._ahead = clips, size, ahead
        if workers and not sys.platform.startswith("linux"):
            logger.info("clips.workers = %d works on Linux only: clips are read in the training process", workers)
            workers = 0
        shape = (workers * ahead + 1, *clips.batch_shape(size))  # those read in advance, and the one in use
        self._latents = torch.frombuffer(mmap.mmap(-1, 4 * prod(shape)), dtype=torch.float32).view(shape)
        self._workers = [Worker(partial(_read, clips, self._latents), "fork") for _ in range(workers)]

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:  # they only read: nothing is lost
            worker.end()
        self._workers.clear()

    def batches(self, seed: int, first: int, rank: int = 0, world: int = 1) -> Iterator[ClipBatch]:
        """``clips.batch(seed, step, size, rank, world)`` for step = first, first + 1, ... without end. Call it once.

        Raises:
            PersistWorldError: a clip cannot be read (raised at its step), or a worker was killed.
        """
        if not self._workers:
            for step in count(first):
                yield self.clips.batch(seed, step, self.size, rank, world)
        jobs = ((number % len(self._latents), seed, first + number, rank, world) for number in count())
        try:
            for number, batch in enumerate(in_turn(self._workers, jobs, self._ahead)):
                place = self._latents[number % len(self._latents)]  # will be used again
                yield replace(batch, latents=self.clips.memory.take(place.shape).copy_(place))
        except WorkerDied as error:
            raise PersistWorldError(
                f"a process that reads clips {error.what}",
                where="clips.workers",
                fix="if memory ran out (SIGKILL), take fewer clips.workers or a smaller batch; the same command "
                "continues from the last saved state",
            ) from None


def _read(clips: ClipMixture, latents: Tensor, job: tuple[int, int, int, int, int]) -> Iterator[ClipBatch]:
    """In a worker: read the batch of (place, seed, step, rank, world); its latents stay in shared memory."""
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    place, seed, step, rank, world = job
    yield replace(clips.batch_into(latents[place], seed, step, rank, world), latents=torch.empty(0))
