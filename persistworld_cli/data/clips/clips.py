"""Clips of one dataset: which frames, and their normalised actions (method.md section 2).

Legend: N = num_history + num_frames frames of a clip, D action numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.settings import ClipSettings, SamplingSettings
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.data.metadata.health import count_starts
from persistworld_cli.data.metadata.index import ActionStat
from persistworld_cli.errors import PersistWorldError


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
    """Frame ids that a rollout from ``start`` has as history when its current frame is ``now`` (ours).

    The rollout's buffer is ``fill`` copies of the start frame, then one entry per interaction (start + stride,
    ..., now). ``history`` are entries of that buffer (negative: from its end), oldest first.

    Raises:
        ValueError: such a rollout never reaches ``now``.
    """
    if start > now or (now - start) % stride:
        raise ValueError(f"a rollout from {start} in steps of {stride} never reaches {now}")
    buffer = [start] * fill + list(range(start + stride, now + 1, stride))
    return tuple(buffer[entry] for entry in history)


class ClipSource:
    """The clips of one split of a dataset; a draw is a pure function of the sample and the random generator.

    Args:
        store: the dataset (with metadata from build-meta).
        split: "train" or "val".
        settings: frame steps and history spacing.
        num_history, num_frames: frames of history, and of prediction (the first is the current frame).
        sampling: layout of a rollout's history, for ``settings.rollout_history_prob`` of the clips.
        stat: percentiles to normalise with; the store's own by default.

    Raises:
        PersistWorldError: no metadata, or no episodes.
    """

    def __init__(
        self,
        store: EpisodeStore,
        split: str,
        settings: ClipSettings,
        num_history: int = 6,
        num_frames: int = 5,
        sampling: SamplingSettings | None = None,
        stat: ActionStat | None = None,
    ) -> None:
        self.store, self.split, self.settings = store, split, settings
        self.num_history, self.num_frames = num_history, num_frames
        self.sampling = sampling or SamplingSettings()
        self._check()
        self.index = store.index(split)
        self.stat = stat or store.stat()
        self._states = np.asarray(self.index.states)  # still memory-mapped, without numpy.memmap's cost at each use
        # one sample for every start frame that leaves num_frames - 1 frames after it; short episodes give one
        self.starts = count_starts(self.index.lengths, num_frames)
        if self.index.start_offsets is not None:  # Ctrl-World's own lists name them
            self.starts = np.diff(self.index.start_offsets)
        self._start_offsets = np.concatenate([[0], np.cumsum(self.starts)])

    def __len__(self) -> int:
        """Number of (episode, start frame) pairs."""
        return int(self._start_offsets[-1])

    def locate(self, sample: int) -> tuple[int, int]:
        """(row of the episode in the index, start frame) of sample number 0 <= sample < len(self)."""
        row = int(np.searchsorted(self._start_offsets, sample, side="right")) - 1
        listed = self.index.starts
        return row, int(sample - self._start_offsets[row] if listed is None else listed[sample])

    def draw_ids(self, rng: np.random.Generator, sample: int | None = None) -> tuple[int, tuple[int, ...]]:
        """(row of the episode, frame ids) of a sample, or of a random one; the number of random draws is fixed."""
        cfg = self.settings
        row, now = self.locate(int(rng.integers(len(self))) if sample is None else sample)
        step = int(rng.integers(1, cfg.max_step + 1))
        zero, rollout, back = rng.random(3)
        last = int(self.index.lengths[row]) - 1
        stride = self.num_frames - 1
        if rollout < cfg.rollout_history_prob:
            start = now - stride * int(back * (now // stride + 1))
            past = rollout_history_ids(now, start, self.sampling.history, self.sampling.buffer_fill, stride)
            future = clip_ids(now, 1, last, num_history=0, num_frames=self.num_frames)
            return row, past + future
        spacing = 0 if zero < cfg.zero_history_prob else cfg.history_stride * step
        ids = clip_ids(now, step, last, num_history=self.num_history, num_frames=self.num_frames, history_step=spacing)
        return row, ids

    def actions(self, rows: Sequence[int], ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Normalised actions (clips, N, D) of clips with frames ``ids`` (clips, N) of the episodes in these rows."""
        return self.stat.normalise(self._states[ids + self.index.offsets[list(rows), None]])

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of one frame's latents, from the first episode."""
        return self.store.latent_shape(self.split, self.index.ids[0])

    def _check(self) -> None:
        """Refuse invalid settings."""
        cfg, sampling = self.settings, self.sampling
        if cfg.max_step < 1 or self.num_frames < 2:
            raise PersistWorldError(
                f"clips.max_step is {cfg.max_step}, model.num_frames {self.num_frames}",
                where="[clips]",
                fix="set at least 1 and 2",
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
