"""Training clips: which frames, their latents and normalised actions (method.md section 2).

Legend: B batch, N = num_history + num_frames frames, C latent channels, h latent height of the stacked cameras,
w latent width, D action numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from persistworld_cli.config.settings import ClipSettings, SamplingSettings
from persistworld_cli.data.store import ActionStat, EpisodeStore
from persistworld_cli.errors import PersistWorldError

_PRELOAD_LIMIT = 2 * 2**30
_STREAM = 0xC11B  # keeps these random numbers apart from others drawn with the same seed


@dataclass(frozen=True)
class Clip:
    """One clip: latents (N, C, h, w) float32, actions (N, D) float32 in [-1, 1], frame ids (N,) within the episode."""

    latents: Tensor
    actions: Tensor
    text: str
    episode: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class ClipBatch:
    """Stacked clips: latents (B, N, C, h, w), actions (B, N, D), ids (B, N)."""

    latents: Tensor
    actions: Tensor
    texts: list[str]
    episodes: list[str]
    ids: Tensor


def clip_ids(
    now: int, step: int, last: int, *, num_history: int = 6, num_frames: int = 5, history_step: int = 4
) -> tuple[int, ...]:
    """Frame ids of a clip: history ``now - i * history_step`` (i = num_history..1), then ``now + i * step`` (i = 0..).

    All clipped to [0, last]. ``history_step`` 0 shows the current frame as its own history.
    """
    history = [now - i * history_step for i in range(num_history, 0, -1)]
    future = [now + i * step for i in range(num_frames)]
    return tuple(min(max(i, 0), last) for i in history + future)


def rollout_history_ids(now: int, start: int, history: Sequence[int], fill: int, stride: int) -> tuple[int, ...]:
    """Frame ids that a rollout begun at ``start`` holds as history once its current frame is ``now`` (ours).

    The rollout's buffer is ``fill`` copies of the start frame, then one entry an interaction: start + stride, ..., now.
    ``history`` are entries of that buffer (negative: from its end), oldest first.

    Raises:
        ValueError: ``now`` is no frame at which such a rollout stands.
    """
    if start > now or (now - start) % stride:
        raise ValueError(f"a rollout from {start} in steps of {stride} does not stand at {now}")
    buffer = [start] * fill + list(range(start + stride, now + 1, stride))
    return tuple(buffer[entry] for entry in history)


class ClipSource:
    """Draws clips from one split of a dataset; a draw is a pure function of the random generator, or of (seed, step).

    Args:
        store: the dataset (with metadata from build-meta).
        split: "train" or "val".
        settings: frame steps and history spacing.
        num_history, num_frames: frames of history, and of prediction (the first is the current frame).
        sampling: layout of a rollout's history, for ``settings.rollout_history_prob`` of the clips.
        stat: percentiles to normalise with; the store's own by default.
        preload: hold all latents of the split in memory as one float16 array (small worlds; rounds float32 latents);
            None: if they take no more than 2 GiB.
        rollout_max: longest rollout, in interactions, that a rollout-like history pretends to.

    Raises:
        PersistWorldError: no metadata, no episodes, or (with preload) no latents.
    """

    def __init__(
        self,
        store: EpisodeStore,
        split: str,
        settings: ClipSettings,
        num_history: int = 6,
        num_frames: int = 5,
        sampling: SamplingSettings | None = None,
        *,
        stat: ActionStat | None = None,
        preload: bool | None = False,
        rollout_max: int | None = None,
    ) -> None:
        self.store, self.split, self.settings = store, split, settings
        self.num_history, self.num_frames = num_history, num_frames
        self.sampling = sampling or SamplingSettings()
        self.rollout_max = rollout_max
        self._check()
        self.index = store.index(split)
        stat = stat or store.stat()
        self.actions = stat.normalise(self.index.states)
        # one sample for every start frame that leaves num_frames - 1 frames after it; short episodes give one
        self.starts = np.maximum(1, self.index.lengths - (num_frames - 1))
        self._start_offsets = np.concatenate([[0], np.cumsum(self.starts)])
        if preload is None:
            preload = self._size() <= _PRELOAD_LIMIT
        self._latents = self._load_all() if preload else None

    def __len__(self) -> int:
        """Number of (episode, start frame) pairs."""
        return int(self._start_offsets[-1])

    def locate(self, sample: int) -> tuple[int, int]:
        """(row of the episode in the index, start frame) of sample number 0 <= sample < len(self)."""
        row = int(np.searchsorted(self._start_offsets, sample, side="right")) - 1
        return row, int(sample - self._start_offsets[row])

    def draw_ids(self, rng: np.random.Generator) -> tuple[int, tuple[int, ...]]:
        """Draw (row of the episode, frame ids); always the same number of draws, whatever their outcome."""
        cfg = self.settings
        row, now = self.locate(int(rng.integers(len(self))))
        step = int(rng.integers(1, cfg.max_step + 1))
        zero, rollout, back = rng.random(3)
        last = int(self.index.lengths[row]) - 1
        stride = self.num_frames - 1
        if rollout < cfg.rollout_history_prob:
            longest = now // stride if self.rollout_max is None else min(now // stride, self.rollout_max)
            start = now - stride * int(back * (longest + 1))
            past = rollout_history_ids(now, start, self.sampling.history, self.sampling.buffer_fill, stride)
            future = clip_ids(now, 1, last, num_history=0, num_frames=self.num_frames)
            return row, past + future
        spacing = 0 if zero < cfg.zero_history_prob else cfg.history_stride * step
        ids = clip_ids(now, step, last, num_history=self.num_history, num_frames=self.num_frames, history_step=spacing)
        return row, ids

    def clip(self, rng: np.random.Generator) -> Clip:
        """Draw one clip."""
        return self.fetch(*self.draw_ids(rng))

    def fetch(self, row: int, ids: Sequence[int]) -> Clip:
        """The clip of given frames of the episode in row ``row`` of the index."""
        frames = np.asarray(ids, dtype=np.int64)
        rows = frames + int(self.index.offsets[row])
        episode = self.index.ids[row]
        if self._latents is None:
            latents = self.store.latents(self.split, episode, frames)
        else:
            latents = self._latents[torch.from_numpy(rows)].to(torch.float32)
        return Clip(
            latents=latents,
            actions=torch.from_numpy(self.actions[rows]),
            text=self.index.texts[row],
            episode=episode,
            ids=tuple(int(i) for i in frames),
        )

    def batch(self, seed: int, step: int, size: int, rank: int = 0, world: int = 1) -> ClipBatch:
        """The ``size`` clips of process ``rank`` at update ``step``: a pure function of its arguments.

        Clip number ``rank * size + i`` has its own generator, so two processes of size 1 see what one of size 2 sees.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        clips = [self.clip(np.random.default_rng([_STREAM, seed, step, rank * size + i])) for i in range(size)]
        return ClipBatch(
            latents=torch.stack([c.latents for c in clips]),
            actions=torch.stack([c.actions for c in clips]),
            texts=[c.text for c in clips],
            episodes=[c.episode for c in clips],
            ids=torch.tensor([c.ids for c in clips], dtype=torch.int64),
        )

    def batches(
        self, seed: int, first_step: int, size: int, rank: int = 0, world: int = 1, *, ahead: int = 2
    ) -> Iterator[ClipBatch]:
        """``batch(seed, step, ...)`` for step = first_step, first_step + 1, ... without end, read ahead by a thread.

        For data that comes from disk; close the generator (or drop it) to stop the thread.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="clips") as pool:
            waiting = deque(pool.submit(self.batch, seed, first_step + k, size, rank, world) for k in range(ahead))
            step = first_step + ahead
            try:
                while True:
                    waiting.append(pool.submit(self.batch, seed, step, size, rank, world))
                    step += 1
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _check(self) -> None:
        """Refuse settings that cannot be meant."""
        cfg, sampling = self.settings, self.sampling
        if cfg.max_step < 1 or self.num_frames < 2:
            raise PersistWorldError(
                f"clips.max_step {cfg.max_step} with {self.num_frames} frames", where="[clips]", fix="at least 1 and 2"
            )
        if cfg.rollout_history_prob > 0 and len(sampling.history) != self.num_history:
            raise PersistWorldError(
                f"sampling.history has {len(sampling.history)} entries, the model takes {self.num_history}",
                where="[sampling] history",
                fix="give one entry for each history frame, or set clips.rollout_history_prob to 0",
            )
        if cfg.rollout_history_prob > 0 and not all(-sampling.buffer_fill <= e < 1 for e in sampling.history):
            raise PersistWorldError(
                f"sampling.history {sampling.history} reaches beyond a new rollout's {sampling.buffer_fill} entries",
                where="[sampling] history",
                fix="take 0 (the start) or entries counted from the end, -1 .. -buffer_fill",
            )

    def _size(self) -> int:
        """Bytes that all latents of the split take as float16, judged by the first episode's."""
        frame = self.store.latents(self.split, self.index.ids[0], [0])
        return 2 * frame.numel() * int(self.index.offsets[-1])

    def _load_all(self) -> Tensor:
        """All latents of the split in one float16 tensor (all frames, C, h, w)."""
        out: Tensor | None = None
        for row, episode in enumerate(self.index.ids):
            length, begin = int(self.index.lengths[row]), int(self.index.offsets[row])
            latents = self.store.latents(self.split, episode, range(length))
            if out is None:
                out = torch.empty((int(self.index.offsets[-1]), *latents.shape[1:]), dtype=torch.float16)
            out[begin : begin + length] = latents
        if out is None:
            raise PersistWorldError("no episodes to preload", where=str(self.store.root), fix="run extract-latents")
        return out
