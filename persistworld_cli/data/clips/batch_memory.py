"""Memory of batches, used over and over."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class BatchMemory:
    """Float32 tensors whose memory is used again once nobody holds them, or a view of them, any more.

    Fresh memory is zeroed by the kernel page by page, which took a third of the time of reading a clip.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[np.float32]] = []

    def take(self, shape: Sequence[int]) -> Tensor:
        """An uninitialised tensor."""
        size = math.prod(shape)
        self._free = [block for block in self._free if len(block) == size]
        block = self._free.pop() if self._free else np.empty(size, np.float32)
        lent = block[:]  # the tensor's storage holds this view, and its end gives the block back
        weakref.finalize(lent, self._free_again, block).atexit = False
        return torch.from_numpy(lent).view(*shape)

    def _free_again(self, block: NDArray[np.float32]) -> None:
        self._free.append(block)
