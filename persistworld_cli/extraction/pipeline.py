"""From raw LeRobot recordings to a processed dataset: images at the model's rate and size, latents, annotations.

Decoding processes prepare episodes (`decoding`, `preparing`), batches of them go through the encoder (`batching`),
finished ones are put in place (`publish`). Runs over the same output share the work by locks (`claims`). An annotation
means a finished episode, so a stopped run continues where it was.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from persistworld_cli.config.settings import WorldSettings
from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.errors import PersistWorldError, nearest
from persistworld_cli.extraction.batching import Batcher, Encode
from persistworld_cli.extraction.decoding import Done, Event, Failed, Job, decoded
from persistworld_cli.extraction.locks import Claims
from persistworld_cli.extraction.preparing import EpisodeHeader, Recipe, split_of
from persistworld_cli.extraction.publish import SUFFIX, Changing, Encoder, Output
from persistworld_cli.extraction.report import ExtractReport, Progress, path_of, ranges

_UNNAMED, _REFUSED = Encoder(), Changing()
_PUBLISHING = 2  # episodes that may wait to be put in place


@dataclass(frozen=True, kw_only=True)
class Told:
    """Whom a run talks to.

    Args:
        ready: called once, when episodes are being decoded; the encoder may be loaded meanwhile.
        progress: called after every episode.
        stop: asked often; True ends the run with KeyboardInterrupt.
        strict: raise at the first bad episode instead of naming it in the report.
    """

    ready: Callable[[], None] = lambda: None
    progress: Callable[[Progress], None] = lambda at: None
    stop: Callable[[], bool] = lambda: False
    strict: bool = False


def extract_latents(
    world: WorldSettings,
    raw: Path,
    out: Path,
    encode: Encode,
    *,
    episodes: set[int] | None = None,
    layout: str = "native",
    split_rule: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    batch_frames: int = 32,
    told: Told = Told(),
    encoder: Encoder = _UNNAMED,
    changes: Changing = _REFUSED,
    run: str = "",
) -> ExtractReport:
    """Extract this process's share of the episodes of ``raw`` into ``out``; finished ones are skipped.

    Args:
        world: cameras, image size, rate and state columns.
        raw, out: raw dataset and processed dataset.
        encode: images uint8 (N, V, H, W, 3) to scaled latents (N, C, h, w), cameras stacked along height.
        episodes: only these indices; all on disk by default.
        layout: 'native' (.npy float16) or 'ctrl-world' (.pt float32).
        split_rule: see `split_of`; ``world.val_rule`` by default.
        rank, world_size: number of this process among those that share the episodes.
        workers: decoding processes; 0: this one decodes too.
        batch_frames: frames (of all cameras) encoded at once.
        told: who hears of it.
        encoder: what makes the latents; a dataset never mixes two.
        changes: what becomes of a dataset that was begun with other settings.
        run: its name, where other processes or runs write to the same dataset: the report is then a part of one.

    Raises:
        PersistWorldError: bad raw dataset, unknown layout or rule, ``out`` was begun with other settings; strict: any.
    """
    if layout not in SUFFIX:
        raise PersistWorldError(f"unknown latent layout '{layout}'", where="--layout", fix=f"use one of {[*SUFFIX]}")
    dataset = RawDataset(raw)
    _check_world(world, dataset)
    rule = split_rule or world.val_rule
    split_of(0, "every-2" if rule == "info-splits" else rule, {})  # an unknown rule is no fault of the episodes
    output, claims = Output(out, layout), Claims(out)
    try:
        output.settle(claims, Recipe(raw, world, rule, SUFFIX[layout]), encoder, changes)
        output.clean(claims)
        shares = _Shares.of(dataset, episodes, rank, world_size, output)
        loop = _Loop(shares, dataset, output, claims, Batcher(encode, batch_frames), len(world.cameras), told)
        try:
            loop.run(Recipe(raw, world, rule, SUFFIX[layout]), workers)
        finally:
            loop.report.write(path_of(out, rank, run) if run or world_size > 1 else path_of(out))
        return loop.report
    finally:
        claims.close()


def _check_world(world: WorldSettings, dataset: RawDataset) -> None:
    """Refuse cameras or columns that the whole dataset lacks: that is the preset's fault, not each episode's."""
    for name, known, what in (
        *((c, dataset.cameras, "camera") for c in world.cameras),
        *((c, tuple(dataset.features), "column") for c in (*world.state_fields, *world.joint_fields)),
    ):
        if name not in known:
            raise PersistWorldError(
                f"the dataset has no {what} '{name}'",
                where=str(dataset.path / "meta/info.json"),
                fix=nearest(name, known),
            )


@dataclass
class _Shares:
    """This process's episodes as they were found at the start."""

    todo: list[int]
    finished: list[int]
    unknown: dict[int, PersistWorldError]  # asked for by number, but not there
    absent: list[int]  # of all processes

    @classmethod
    def of(cls, dataset: RawDataset, episodes: set[int] | None, rank: int, world_size: int, output: Output) -> _Shares:
        """Shared out before finished ones are dropped: every process sees the same shares whenever it starts."""
        present = set(dataset.episodes)
        absent = set(dataset.declared if episodes is None else episodes) - present
        there = output.finished()
        shares = cls([], [], {}, sorted(absent))
        for index in sorted(present if episodes is None else episodes)[rank::world_size]:
            if str(index) in there:
                shares.finished.append(index)
                continue
            try:
                dataset.episode(index)
                shares.todo.append(index)
            except PersistWorldError as error:
                shares.unknown[index] = error
        return shares


class _Loop:
    """What happens while images come: they are encoded; episodes are put in place and told of."""

    def __init__(
        self,
        shares: _Shares,
        dataset: RawDataset,
        output: Output,
        claims: Claims,
        batcher: Batcher,
        cameras: int,
        told: Told,
    ) -> None:
        self.report = ExtractReport(
            skipped=[str(index) for index in shares.finished],
            absent=len(shares.absent),
            absent_ids=ranges(shares.absent),
        )
        self._shares, self._dataset, self._output, self._claims = shares, dataset, output, claims
        self._batcher, self._cameras, self._told = batcher, cameras, told
        self._todo, self._elsewhere = deque(shares.todo), deque[int]()
        self._total = len(shares.todo) + len(shares.unknown)
        self._jobs: dict[int, Job] = {}  # claimed, and not yet in place
        self._decoding: set[int] = set()  # of these, the ones whose images are still to come
        self._begun: dict[int, EpisodeHeader] = {}
        self._latents: dict[int, Tensor] = {}  # encoded as a whole
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publisher")
        self._publishing: deque[tuple[int, Future[None]]] = deque()
        self._clock = time.perf_counter()

    def run(self, recipe: Recipe, workers: int) -> None:
        """All episodes, to the end."""
        for index, error in self._shares.unknown.items():
            self._fail(index, error)
        if not self._todo:
            return
        try:
            workers = min(workers, len(self._todo))
            with decoded(recipe, self._next_job, workers, self._idle) as events, self._publisher:
                self._told.ready()
                self._clock = time.perf_counter()
                for index, event in events:
                    self._take(index, event)
                    self._look_up()
                self._complete(self._batcher.flush())
                while self._publishing:
                    self._published()
        finally:
            self.report.wall_s = time.perf_counter() - self._clock
            self.report.waited_s = max(0.0, self.report.wall_s - self._batcher.encode_s)
            self.report.frames = self._batcher.frames
            for index in self._jobs:  # of a run that was stopped; nobody writes there any more
                self._output.unstage(index)

    def _next_job(self) -> Job | None:
        """See `decoding.Feed`. An episode that another run has in hand is looked at again when all else is done."""
        queue = self._todo or self._elsewhere
        for _ in range(len(queue)):
            index = queue.popleft()
            if not self._claims.take(index):
                self._elsewhere.append(index)
            elif self._output.has(index):  # another run has finished it meanwhile
                self._claims.drop(index)
                self._total -= 1
                self.report.skipped.append(str(index))
            else:
                self._decoding.add(index)
                self._jobs[index] = Job(self._dataset.episode(index), self._output.stage(index))
                return self._jobs[index]
        if not self._todo and not self._elsewhere:
            raise StopIteration
        return None

    def _take(self, index: int, event: Event) -> None:
        """One event of an episode."""
        if isinstance(event, EpisodeHeader):
            self._begun[index] = event
            self._batcher.begin(index, event.frames)
        elif isinstance(event, Done):
            self._decoding.remove(index)
            self._publish(index)
        elif isinstance(event, Failed):
            self._decoding.remove(index)
            self._batcher.drop(index)
            self._latents.pop(index, None)
            self._begun.pop(index, None)
            self._jobs.pop(index)
            self._output.unstage(index)
            self._claims.drop(index)
            self._fail(index, event.error)
        else:
            self._complete(self._batcher.add(index, event))

    def _complete(self, episodes: Iterable[tuple[int, Tensor]]) -> None:
        """Episodes whose latents are there as a whole."""
        for index, latents in episodes:
            self._latents[index] = latents
            self._publish(index)

    def _publish(self, index: int) -> None:
        """Put an episode in place, in another thread, if both its latents and its videos are there."""
        if index in self._decoding or index not in self._latents:
            return
        latents, begun, stage = self._latents.pop(index), self._begun[index], self._jobs[index].stage
        work = self._publisher.submit(self._output.publish, index, begun.split, stage, latents, self._cameras)
        self._publishing.append((index, work))
        while len(self._publishing) > _PUBLISHING:
            self._published()

    def _published(self) -> None:
        """Wait for the oldest episode that is being put in place."""
        index, work = self._publishing.popleft()
        work.result()
        del self._jobs[index]
        self._claims.drop(index)
        self.report.done.append(str(index))
        if not self._begun.pop(index).told:
            self.report.untold.append(str(index))
        self._tell(index, "done")

    def _fail(self, index: int, error: PersistWorldError) -> None:
        """Name a bad episode."""
        if self._told.strict:
            raise error
        self.report.fail(index, error)
        self._tell(index, "failed")

    def _tell(self, index: int, outcome: str) -> None:
        elapsed = time.perf_counter() - self._clock
        settled = len(self.report.done) + len(self.report.failed)
        waited = 1 - self._batcher.encode_s / elapsed if elapsed > self._batcher.encode_s else 0.0
        self._told.progress(Progress(settled, self._total, str(index), outcome, waited))

    def _look_up(self) -> None:
        """Between two events: what is done elsewhere, and whether to stop."""
        while self._publishing and self._publishing[0][1].done():
            self._published()
        if self._told.stop():
            raise KeyboardInterrupt

    def _idle(self) -> None:
        """While nothing comes. Where all that is left is in the hands of another run, half-filled batches must not wait
        for it: that run may wait for the episodes in them.
        """
        if not self._decoding:
            self._complete(self._batcher.flush())
        self._look_up()
