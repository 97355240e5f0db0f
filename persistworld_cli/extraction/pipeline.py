"""From raw LeRobot recordings to a processed dataset: images at the model's rate and size, latents, annotations.

Decoding processes prepare episodes (`decoding`, `preparing`), batches of them go through the encoder (`batching`),
finished ones are published (`publish`). Runs on the same output share the work by locks (`locks`). An episode with an
annotation is finished, so a stopped run continues with the others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from persistworld_cli.config.settings import WorldSettings
from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.errors import PersistWorldError, nearest
from persistworld_cli.extraction.batching import Batcher, Encode
from persistworld_cli.extraction.decoding import Done, Event, Job, decoded
from persistworld_cli.extraction.locks import EpisodeLocks
from persistworld_cli.extraction.preparing import SUFFIX, EpisodeHeader, Recipe, split_of
from persistworld_cli.extraction.publish import Changing, Encoder, Output
from persistworld_cli.extraction.report import ExtractReport, path_of, ranges

_UNNAMED, _REFUSED = Encoder(), Changing()
_PUBLISHING = 2  # episodes that may wait to be published


@dataclass(frozen=True)
class Progress:
    """How far this process is: frames and episodes (done or failed), and the share of time the encoder was idle.

    ``of_frames`` is estimated from the metadata for episodes that are not open yet.
    """

    frames: int
    of_frames: int
    episodes: int
    of_episodes: int
    waited: float


@dataclass(frozen=True, kw_only=True)
class ExtractCallbacks:
    """Functions that a run calls.

    Args:
        ready: once, after decoding has started: the time to load the encoder.
        progress: at the start, and after every chunk of frames and every episode.
        stop: often; True ends the run with KeyboardInterrupt.
    """

    ready: Callable[[], None] = lambda: None
    progress: Callable[[Progress], None] = lambda progress: None
    stop: Callable[[], bool] = lambda: False


def extract_latents(
    world: WorldSettings,
    raw: Path,
    out: Path,
    encode: Encode,
    *,
    episodes: set[int] | None = None,
    numbers: int | None = None,
    layout: str = "native",
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    batch_frames: int = 32,
    strict: bool = False,
    callbacks: ExtractCallbacks = ExtractCallbacks(),
    encoder: Encoder = _UNNAMED,
    changes: Changing = _REFUSED,
    run: str = "",
) -> ExtractReport:
    """Extract this process's share of the episodes of ``raw`` into ``out``; finished ones are skipped.

    Args:
        world: cameras, image size, rate, state columns and split rule.
        raw, out: raw dataset and processed dataset.
        encode: images uint8 (N, V, H, W, 3) to scaled latents (N, C, h, w), cameras stacked along height.
        episodes: only these indices; all on disk by default.
        numbers: of a state, that the model takes (``model.action_dim``); None: any.
        layout: 'native' (.npy float16) or 'ctrl-world' (.pt float32).
        rank, world_size: number of this process among those that share the episodes.
        workers: decoding processes; 0: this one decodes too.
        batch_frames: frames (of all cameras) encoded at once.
        strict: raise at the first bad episode instead of naming it in the report.
        callbacks: see `ExtractCallbacks`.
        encoder: what makes the latents; a dataset never mixes two.
        changes: how to treat a dataset that was started with other settings.
        run: its name, if other processes or runs write to the same dataset; the report then covers this process only.

    Raises:
        PersistWorldError: bad raw dataset, states of another width, unknown layout or rule, ``out`` has other settings;
            strict: any bad episode.
    """
    if layout not in SUFFIX:
        raise PersistWorldError(f"unknown latent layout '{layout}'", where="--layout", fix=f"use one of {[*SUFFIX]}")
    dataset = RawDataset(raw)
    _check_world(world, dataset, numbers)
    output, locks = Output(out, Recipe(raw, world, layout)), EpisodeLocks(out)
    try:
        output.settle(locks, encoder, changes)
        output.clean(locks)
        extraction = _Extraction(dataset, output, locks, Batcher(encode, batch_frames), callbacks, strict)
        try:
            extraction.run(episodes, rank, world_size, workers)
        finally:
            extraction.report.write(path_of(out, rank, run) if run or world_size > 1 else path_of(out))
        return extraction.report
    finally:
        locks.close()


def _check_world(world: WorldSettings, dataset: RawDataset, numbers: int | None) -> None:
    """Refuse settings with which every episode would fail: the preset is wrong, not the episodes."""
    split_of(0, "every-2" if world.val_rule == "info-splits" else world.val_rule, {})
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
    width = dataset.width(world.state_fields)
    if numbers and width and width != numbers:
        raise PersistWorldError(
            f"states ({', '.join(world.state_fields)}) have {width} numbers, but model.action_dim = {numbers}",
            where=str(dataset.path / "meta/info.json"),
            fix=f"set model.action_dim = {width}, or name other columns in world.state_fields",
        )


@dataclass
class _Episode:
    """An episode that is locked and not yet published."""

    job: Job
    header: EpisodeHeader | None = None
    decoded: bool = False  # all of its images have arrived
    latents: Tensor | None = None  # all of them


@dataclass
class _Extraction:
    """One run: encodes images as they arrive, publishes episodes and reports them."""

    dataset: RawDataset
    output: Output
    locks: EpisodeLocks
    batcher: Batcher
    callbacks: ExtractCallbacks
    strict: bool
    report: ExtractReport = field(default_factory=ExtractReport)
    todo: deque[int] = field(default_factory=deque)
    elsewhere: deque[int] = field(default_factory=deque)  # locked by another run
    open: dict[int, _Episode] = field(default_factory=dict)
    publisher: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "publisher"))
    publishing: deque[tuple[int, Future[None]]] = field(default_factory=deque)
    clock: float = field(default_factory=time.perf_counter)
    frames: dict[int, tuple[int, int]] = field(default_factory=dict)  # episode to do -> frames taken, and in all
    sums: tuple[int, int] = (0, 0)  # of the same

    def run(self, episodes: set[int] | None, rank: int, world_size: int, workers: int) -> None:
        """Extract all episodes of this process."""
        unknown = self._share(episodes, rank, world_size)
        self._progress()
        for index, error in unknown.items():
            self._fail(index, error)
        if not self.todo:
            return
        try:
            workers = min(workers, len(self.todo))
            with decoded(self.output.recipe, self._next_job, workers, self._idle) as events, self.publisher:
                self.callbacks.ready()
                self.clock = time.perf_counter()
                for index, event in events:
                    self._take(index, event)
                    self._look_up()
                self._complete(self.batcher.flush())
                while self.publishing:
                    self._published()
        finally:
            self.report.wall_s = time.perf_counter() - self.clock
            self.report.waited_s = max(0.0, self.report.wall_s - self.batcher.encode_s)
            self.report.frames = self.batcher.frames
            for index in self.open:  # unfinished episodes; no process writes there any more
                self.output.unstage(index)

    def _share(self, episodes: set[int] | None, rank: int, world_size: int) -> dict[int, PersistWorldError]:
        """List the episodes of this process; returns the requested ones that do not exist.

        Shares are made before finished episodes are dropped: every process sees the same shares whenever it starts.
        """
        present, finished = set(self.dataset.episodes), self.output.finished()
        absent = sorted(set(self.dataset.declared if episodes is None else episodes) - present)
        self.report.absent, self.report.absent_ids = len(absent), ranges(absent)
        unknown: dict[int, PersistWorldError] = {}
        kept = self.output.recipe.world.rate_hz / self.dataset.fps
        for index in sorted(present if episodes is None else episodes)[rank::world_size]:
            if str(index) in finished:
                self.report.skipped.append(str(index))
                continue
            try:
                self._count(index, 0, round(self.dataset.episode(index).length * kept))
                self.todo.append(index)
            except PersistWorldError as error:
                unknown[index] = error
        return unknown

    def _next_job(self) -> Job | None:
        """See `decoding.Feed`. An episode that another run has locked is tried again after all others."""
        queue = self.todo or self.elsewhere
        for _ in range(len(queue)):
            index = queue.popleft()
            if not self.locks.acquire(index):
                self.elsewhere.append(index)
            elif self.output.has(index):  # another run has finished it meanwhile
                self.locks.release(index)
                self._count(index, 0, 0)
                del self.frames[index]
                self.report.skipped.append(str(index))
            else:
                job = Job(self.dataset.episode(index), self.output.stage(index))
                self.open[index] = _Episode(job)
                return job
        if not self.todo and not self.elsewhere:
            raise StopIteration
        return None

    def _take(self, index: int, event: Event) -> None:
        """Handle one event of an episode."""
        if isinstance(event, EpisodeHeader):
            self.open[index].header = event
            self._count(index, 0, event.frames)
            self.batcher.begin(index, event.frames)
        elif not isinstance(event, Done):
            self._complete(self.batcher.add(index, event))
            taken, frames = self.frames[index]
            self._count(index, taken + len(event), frames)
            self._progress()
        elif event.error is None:
            self.open[index].decoded = True
            self._publish(index)
        else:
            self.batcher.drop(index)
            del self.open[index]
            self.output.unstage(index)
            self.locks.release(index)
            self._fail(index, event.error)

    def _complete(self, episodes: Iterable[tuple[int, Tensor]]) -> None:
        """Publish episodes whose latents are complete, if their videos are too."""
        for index, latents in episodes:
            self.open[index].latents = latents
            self._publish(index)

    def _publish(self, index: int) -> None:
        """Publish an episode, in another thread, if both its latents and its videos are complete."""
        episode = self.open[index]
        if not episode.decoded or episode.latents is None or episode.header is None:
            return
        latents, episode.latents = episode.latents, None
        work = self.publisher.submit(self.output.publish, index, episode.header.split, episode.job.stage, latents)
        self.publishing.append((index, work))
        while len(self.publishing) > _PUBLISHING:
            self._published()

    def _published(self) -> None:
        """Wait for the oldest episode that is being published."""
        index, work = self.publishing.popleft()
        work.result()
        header = self.open.pop(index).header
        self.locks.release(index)
        self.report.done.append(str(index))
        if header is not None and not header.has_instruction:
            self.report.without_instruction.append(str(index))
        if header is not None and header.raw_fps != self.dataset.fps:
            self.report.other_fps[str(index)] = header.raw_fps
        self._progress()

    def _fail(self, index: int, error: PersistWorldError) -> None:
        """Report a bad episode, or raise if strict."""
        if self.strict:
            raise error
        where = f" ({error.where})" if error.where else ""
        self.report.failed.append({"episode": str(index), "reason": f"{error.what}{where}"})
        self._count(index, 0, 0)
        self._progress()

    def _progress(self) -> None:
        elapsed = time.perf_counter() - self.clock
        settled = len(self.report.done) + len(self.report.failed)
        waited = 1 - self.batcher.encode_s / elapsed if elapsed > self.batcher.encode_s else 0.0
        self.callbacks.progress(Progress(*self.sums, settled, len(self.frames), waited))

    def _count(self, index: int, taken: int, frames: int) -> None:
        """Note an episode's frames."""
        before = self.frames.get(index, (0, 0))
        self.sums = self.sums[0] + taken - before[0], self.sums[1] + frames - before[1]
        self.frames[index] = taken, frames

    def _look_up(self) -> None:
        """Between two events: report published episodes, and stop if requested."""
        while self.publishing and self.publishing[0][1].done():
            self._published()
        if self.callbacks.stop():
            raise KeyboardInterrupt

    def _idle(self) -> None:
        """Called while there is no event. If another run has locked all remaining episodes, encode the partial batch:
        that run may wait for the episodes in it.
        """
        if all(episode.decoded for episode in self.open.values()):
            self._complete(self.batcher.flush())
        self._look_up()
