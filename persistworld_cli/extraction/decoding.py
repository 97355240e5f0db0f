"""Decoding processes: raw episodes become chunks of images ahead of the encoder, in bounded memory.

Each process prepares one episode at a time (`preparing.prepare`), never loads torch, and waits while its results are
not read. Memory does not depend on the length of an episode: this process holds one chunk of 16 frames x V cameras;
each decoding process holds four, one camera's chunk at the recorded size, and one table (of a version 3 file, the row
groups with the episode; images in it still encoded).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.data.processes import Worker, WorkerDied
from persistworld_cli.data.raw.lerobot import RawDataset, RawEpisode
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.extraction.preparing import EpisodeHeader, Recipe, prepare
from persistworld_cli.files import CannotWrite

_DEATHS = 3  # the run fails after this many deaths in a row without a finished episode between them
_POLL_S = 0.2  # how often `idle` is called


@dataclass(frozen=True)
class Job:
    """An episode to prepare, and the folder to stage it in."""

    episode: RawEpisode
    stage: Path


@dataclass(frozen=True)
class Done:
    """The last event: annotation and videos are staged; or, with an error, the episode cannot be used."""

    error: PersistWorldError | None = None


Event = EpisodeHeader | NDArray[np.uint8] | Done
Feed = Callable[[], Job | None]  # the next job; None: none at present. Raises StopIteration when there are no more.


@contextmanager
def decoded(
    recipe: Recipe, feed: Feed, workers: int, idle: Callable[[], None]
) -> Iterator[Iterator[tuple[int, Event]]]:
    """(episode, event) as they come, those of several episodes interleaved. Leaving the context ends all processes.

    Args:
        recipe: what all episodes share.
        feed: see `Feed`.
        workers: processes; 0: everything is done in this one.
        idle: called repeatedly while there is no event; may raise.

    Raises:
        PersistWorldError: the disk is full, or several processes died in a row.
    """
    decoders = _Decoders(recipe, feed, workers)
    try:
        if workers:
            decoders.hand_out()  # they start before the first event is requested
        with closing(decoders.events(idle) if workers else _here(recipe, feed, idle)) as events:
            yield events
    finally:
        for worker in decoders.jobs:
            worker.end()


def _here(recipe: Recipe, feed: Feed, idle: Callable[[], None]) -> Generator[tuple[int, Event], None, None]:
    """`decoded` without other processes: the caller waits for every image."""
    prepared = _Prepared(recipe)
    while True:
        try:
            job = feed()
        except StopIteration:
            return
        if job is None:
            time.sleep(_POLL_S)
            idle()
            continue
        for event in prepared(job):
            yield job.episode.index, event


class _Prepared:
    """Yields all events of a job. A bad recording becomes an event; a full disk raises."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._dataset: RawDataset | None = None  # opened where it is used

    def __call__(self, job: Job) -> Iterator[Event]:
        self._dataset = self._dataset or RawDataset(self._recipe.raw)
        self._dataset.adopt(job.episode)
        try:
            yield from prepare(self._recipe, self._dataset, job.episode.index, job.stage)
            yield Done()
        except CannotWrite:
            raise
        except PersistWorldError as error:
            yield Done(error)


class _Decoders:
    """The processes, and what each works on; arguments as for `decoded`."""

    def __init__(self, recipe: Recipe, feed: Feed, count: int) -> None:
        self._recipe, self._feed, self._count = recipe, feed, count
        self.jobs: dict[Worker, Job | None] = {}
        self._deaths = 0

    def events(self, idle: Callable[[], None]) -> Generator[tuple[int, Event], None, None]:
        """See `decoded`."""
        more = True
        while True:
            more = more and self.hand_out()
            busy = {worker.pipe: (worker, job) for worker, job in self.jobs.items() if job}
            if not busy and not more:
                return
            ready = wait(list(busy), _POLL_S)
            if not ready:
                idle()
            for pipe in ready:
                worker, job = busy[pipe]
                event = self._next(worker, job)
                yield job.episode.index, event

    def hand_out(self) -> bool:
        """Give idle processes work, starting them as needed; False when there is no more work."""
        while True:
            worker = next((worker for worker, job in self.jobs.items() if job is None), None)
            if worker is None and len(self.jobs) >= self._count:
                return True
            try:
                job = self._feed()
            except StopIteration:
                return False
            if job is None:
                return True
            worker = worker or Worker(_Prepared(self._recipe))
            self.jobs[worker] = job
            worker.give(job)

    def _next(self, worker: Worker, job: Job) -> Event:
        """A process's next event; if it died, its episode failed, and another process will take its place."""
        try:
            event: Event = worker.take()
        except WorkerDied as died:
            del self.jobs[worker]
            self._deaths += 1
            return Done(self._error(died.what, job))
        if isinstance(event, Done):
            self.jobs[worker] = None
            self._deaths = 0
        return event

    def _error(self, how: str, job: Job) -> PersistWorldError:
        """The error of a process that died. Raises if several died in a row."""
        how += " (out of memory?)" if "SIGKILL" in how else ""
        if self._deaths >= _DEATHS:
            raise PersistWorldError(
                f"{self._deaths} decoding processes died in a row; the last one {how}",
                where=f"episode {job.episode.index}",
                fix="if memory was short, take fewer --workers; --workers 0 decodes in this process",
            )
        return PersistWorldError(
            f"its decoding process {how}",
            where=str(job.episode.table),
            fix="extract it again; if this happens again, the recording is damaged or memory is short",
        )
