"""Encode the images of many episodes in batches of one size; the last batch is padded.

The last digit of latents may depend on the batch size (convolutions choose their algorithm by it), but not on the other
images in the batch. So an episode's latents are the same bytes whichever episodes are encoded with it, and a resumed
run gives the same result as an uninterrupted one.

Legend: N frames in a batch, n in a chunk, T of an episode, V cameras, H, W image pixels, C latent channels,
h = V * h1 latent rows of the stacked cameras, w latent width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persistworld_cli.errors import PersistWorldError

Encode = Callable[[Tensor], Tensor]  # uint8 (N, V, H, W, 3) -> (N, C, h, w), cameras stacked, on any device


class Batcher:
    """Collects images, encodes them in batches of ``size`` frames, and hands whole episodes back.

    A batch is copied from the GPU while the next one is encoded, so that the GPU does not wait for the copy. NaN or
    infinite latents raise PersistWorldError.
    """

    def __init__(self, encode: Encode, size: int) -> None:
        self.frames, self.encode_s = 0, 0.0  # frames encoded, and the time spent on it
        self._encode, self.size = encode, size
        self._batch: Tensor | None = None
        self._filled = 0
        self._rows: list[tuple[int, int]] = []  # (episode, frames), in the order of the batch
        self._flying: tuple[Tensor, list[tuple[int, int]]] | None = None
        self._open: dict[int, tuple[int, list[Tensor]]] = {}  # episode -> frames T, latents so far

    def begin(self, episode: int, frames: int) -> None:
        """Register an episode with this number of frames."""
        self._open[episode] = frames, []

    def drop(self, episode: int) -> None:
        """Forget an episode and its latents so far."""
        self._open.pop(episode, None)

    def add(self, episode: int, images: NDArray[np.uint8]) -> Iterator[tuple[int, Tensor]]:
        """More images (n, V, H, W, 3) of an episode; yields the episodes that are complete, latents (T, C, h, w)."""
        source = torch.from_numpy(images)
        if self._batch is None:
            self._batch = torch.zeros((self.size, *source.shape[1:]), dtype=torch.uint8)
        while len(source):
            count = min(len(source), self.size - self._filled)
            self._batch[self._filled : self._filled + count] = source[:count]
            self._filled += count
            self._rows.append((episode, count))
            source = source[count:]
            if self._filled == self.size:
                yield from self._run()

    def flush(self) -> Iterator[tuple[int, Tensor]]:
        """Encode what is left; yields the episodes that are complete now."""
        if self._filled:
            yield from self._run()
        yield from self._land()

    def _run(self) -> Iterator[tuple[int, Tensor]]:
        """Encode the batch and distribute the latents of the previous one."""
        assert self._batch is not None
        begun = time.perf_counter()
        with torch.inference_mode():
            latents = self._encode(self._batch)
        if latents.ndim != 4 or len(latents) != self.size or latents.shape[2] % self._batch.shape[1]:
            raise ValueError(f"encoder returned {tuple(latents.shape)} for {tuple(self._batch.shape)}")
        rows, self._rows, self.frames, self._filled = self._rows, [], self.frames + self._filled, 0
        before, self._flying = self._flying, (latents, rows)
        self.encode_s += time.perf_counter() - begun
        yield from self._land(before)
        if latents.device.type == "cpu":
            yield from self._land()

    def _land(self, batch: tuple[Tensor, list[tuple[int, int]]] | None = None) -> Iterator[tuple[int, Tensor]]:
        """Distribute the latents of a batch (by default the pending one) to its episodes."""
        if batch is None:
            batch, self._flying = self._flying, None
        if batch is None:
            return
        begun = time.perf_counter()
        latents = batch[0].detach().to("cpu", torch.float32)
        self.encode_s += time.perf_counter() - begun
        at = 0
        for episode, count in batch[1]:
            part, at = latents[at : at + count], at + count
            if episode not in self._open:
                continue
            if not torch.isfinite(part).all():
                raise PersistWorldError(
                    "encoder returned NaN or infinite values",
                    where=f"encoder, episode {episode}",
                    fix="check its weights; fp16 is too narrow for some VAEs: take --dtype bf16 or fp32",
                )
            frames, parts = self._open[episode]
            parts.append(part)
            if sum(map(len, parts)) == frames:
                del self._open[episode]
                yield episode, torch.cat(parts)
