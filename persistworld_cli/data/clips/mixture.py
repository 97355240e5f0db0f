"""Batches of clips from one dataset or several; their order is a function of the seed and the clip's number alone.

Legend: B batch, N frames of a clip, C latent channels, h latent height of the stacked cameras, w latent width, D action
numbers.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.clips.clips import ClipSource
from persistworld_cli.data.clips.order import Order
from persistworld_cli.data.clips.store import ActionStat, open_store, store_of
from persistworld_cli.errors import PersistWorldError, UsageError

_STREAM = 0xC11B  # keeps these random numbers apart from others drawn with the same seed
_POSITIVE = 2**64 - 1
Drawn = tuple[int, int, tuple[int, ...]]  # number of the dataset, row of the episode in its index, frame ids


@dataclass(frozen=True)
class ClipBatch:
    """Stacked clips: latents (B, N, C, h, w) and actions (B, N, D) float32, frame ids (B, N), dataset numbers."""

    latents: Tensor
    actions: Tensor
    texts: list[str]
    episodes: list[str]
    ids: Tensor
    sources: list[int]


class BatchMemory:
    """Float32 tensors whose memory is reused once neither they nor a view of them are referenced any more.

    The kernel zeroes new memory page by page, which took a third of the time to read a clip.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[np.float32]] = []

    def take(self, shape: Sequence[int]) -> Tensor:
        """An uninitialised tensor."""
        size = math.prod(shape)
        self._free = [block for block in self._free if len(block) == size]
        block = self._free.pop() if self._free else np.empty(size, np.float32)
        lent = block[:]  # the tensor's storage holds this view; when it is freed, so is the block
        weakref.finalize(lent, self._free_again, block).atexit = False
        return torch.from_numpy(lent).view(*shape)

    def _free_again(self, block: NDArray[np.float32]) -> None:
        self._free.append(block)


class ClipMixture:
    """Clips of several datasets in one order, each with its share.

    Args:
        sources: the datasets' clips: same number of frames, same shape of latents and states.
        weights: shares of the clips; equal by default.

    Raises:
        PersistWorldError: datasets that do not fit together.
    """

    def __init__(self, sources: Sequence[ClipSource], weights: Sequence[float] | None = None) -> None:
        self.sources = tuple(sources)
        self.order = Order([len(s) for s in sources], weights or [1.0] * len(sources))
        self.frame_shape = sources[0].frame_shape
        self.num_frames = sources[0].num_history + sources[0].num_frames
        self.memory = BatchMemory()
        self._check()

    def __len__(self) -> int:
        """Start frames of all datasets together."""
        return sum(self.order.sizes)

    def describe(self) -> str:
        """The datasets, their shares and start frames."""
        pairs = zip(self.order.shares, self.sources, strict=True)
        return ", ".join(f"{share:.1%} {source.store.root} ({len(source)} start frames)" for share, source in pairs)

    def batch(self, seed: int, step: int, size: int, rank: int = 0, world: int = 1) -> ClipBatch:
        """The ``size`` clips of process ``rank`` at step ``step``: a pure function of its arguments.

        They are the clips ``(step * world + rank) * size + i`` of the run: two processes with size 1 read the same
        clips as one with size 2, and a resumed run the same as an uninterrupted one.

        Raises:
            PersistWorldError: latents that are missing, damaged or shorter than the index says.
        """
        return self.batch_into(self.memory.take(self.batch_shape(size)), seed, step, rank, world)

    def batch_shape(self, size: int) -> tuple[int, ...]:
        """Shape of a batch's latents."""
        return (size, self.num_frames, *self.frame_shape)

    def batch_into(self, latents: Tensor, seed: int, step: int, rank: int = 0, world: int = 1) -> ClipBatch:
        """`batch`, with its latents written into a tensor of that shape."""
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        first = (step * world + rank) * len(latents)
        drawn = [self.draw(seed, first + i) for i in range(len(latents))]
        ids = np.array([frames for _, _, frames in drawn])
        actions = self._actions(drawn, ids)  # before the latents, which evict all else from the caches
        episodes = [self.sources[source].index.ids[row] for source, row, _ in drawn]
        for out, episode, (source, _, frames) in zip(latents, episodes, drawn, strict=True):
            self.sources[source].store.latents(self.sources[source].split, episode, frames, out)
        return ClipBatch(
            latents=latents,
            actions=torch.from_numpy(actions),
            texts=[self.sources[source].index.texts[row] for source, row, _ in drawn],
            episodes=episodes,
            ids=torch.from_numpy(ids),
            sources=[source for source, _, _ in drawn],
        )

    def draw(self, seed: int, number: int) -> Drawn:
        """(dataset, row of the episode in its index, frame ids) of clip ``number`` of a run."""
        place = self.order.place(seed, number)
        rng = np.random.default_rng([_STREAM, seed & _POSITIVE, number])
        row, ids = self.sources[place.source].draw_ids(rng, place.sample)
        return place.source, row, ids

    def _actions(self, drawn: Sequence[Drawn], ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Normalised actions (B, N, D), dataset by dataset."""
        out = np.empty((*ids.shape, self.sources[0].index.states.shape[1]), np.float32)
        for number in {source for source, _, _ in drawn}:
            mine = [i for i, (source, _, _) in enumerate(drawn) if source == number]
            out[mine] = self.sources[number].actions([drawn[i][1] for i in mine], ids[mine])
        return out

    def _check(self) -> None:
        """Refuse datasets whose clips cannot share a batch."""
        first = self.sources[0]
        for other in self.sources[1:]:
            for what, ours, theirs in (
                ("latents of a frame have shape", first.frame_shape, other.frame_shape),
                ("numbers of a state:", first.index.states.shape[1], other.index.states.shape[1]),
            ):
                if ours != theirs:
                    raise PersistWorldError(
                        f"datasets that cannot be mixed: {what} {ours} in {first.store.root}, but {theirs} here",
                        where=str(other.store.root),
                        fix="extract both with the same [world] settings and the same VAE",
                    )


def open_clips(settings: Settings, split: str = "train", stat: ActionStat | None = None) -> ClipMixture:
    """The clips that settings name: for training ``clips.datasets`` with their weights; else ``world.dataset`` alone.

    All are normalised by the same percentiles: ``stat``, else those of ``model.stat`` or of ``world.dataset``.

    Raises:
        PersistWorldError: a dataset is missing, has no metadata or does not match the others.
    """
    own = settings.world.dataset
    shares = training_shares(settings) if split == "train" else {own: 1.0}
    stat = stat or open_store(settings).stat()
    frames = settings.model.num_history, settings.model.num_frames
    stores = [store_of(settings.world, name) for name in shares]
    sources = [ClipSource(store, split, settings.clips, *frames, settings.sampling, stat) for store in stores]
    return ClipMixture(sources, list(shares.values()))


def training_shares(settings: Settings) -> dict[str, float]:
    """Dataset -> weight, if above 0. Raises UsageError: no dataset, or ``world.dataset`` is not among them."""
    own, datasets = settings.world.dataset, settings.clips.datasets
    if not own:
        raise UsageError("no dataset to train on", where="world.dataset", fix="give --dataset, or take a preset")
    if not datasets:
        return {own: 1.0}
    if Path(resolve_path(own)).absolute() not in {Path(resolve_path(name)).absolute() for name in datasets}:
        raise UsageError(
            f"world.dataset = '{own}' is not among clips.datasets: {', '.join(datasets)}",
            where="[clips.datasets]",
            fix="add it there (with weight 0 to use it only for percentiles and validation clips), "
            "or point world.dataset (--dataset) to one of them",
        )
    return {name: weight for name, weight in datasets.items() if weight > 0}
