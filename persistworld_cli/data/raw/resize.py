"""Resizing of 8-bit images without torch, bit for bit as torch does it: bilinear with antialiasing.

Torch's CPU kernel (and Pillow-SIMD, whose arithmetic it is) weights pixels by 16-bit integers and rounds once after the
columns and once after the rows. Here the same sums are matrix products of integers, which floats represent exactly, so
a decoding process need not load torch (half a second and 130 MB each). The result does not depend on the machine.

Shapes: frames are uint8 (N, H, W, C).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_EXACT_FLOAT32 = 2**24  # below this every whole number is a float32
_COLUMNS, _ROWS = 4, 8  # outputs that share one product: wider ones multiply by more zeros, narrower ones call more


_Bands = tuple[tuple[int, int, NDArray[Any]], ...]  # inputs low:high, and their weights (outputs, high - low)


def resize(frames: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize uint8 (N, H, W, C) to (N, height, width, C): bilinear with antialiasing (torch's, nearly PIL's BILINEAR).

    The aspect ratio is not kept: Ctrl-World's 180x320 -> 192x320 stretches too.
    """
    count, rows, columns, channels = frames.shape
    if (rows, columns) == (height, width):
        return frames
    out = np.empty((count, height, width, channels), np.uint8)
    across = _bands(columns, width, channels, _COLUMNS) if columns != width else ()
    down = _bands(rows, height, 1, _ROWS) if rows != height else ()
    for frame, target in zip(frames, out, strict=True):
        image: NDArray[Any] = frame.reshape(rows, columns * channels)
        if across:
            image = image.astype(across[0][2].dtype)
            parts = [image[:, low * channels : high * channels] @ weights.T for low, high, weights in across]
            image = _rounded(np.concatenate(parts, axis=1))
        if down:
            image = image.astype(down[0][2].dtype, copy=False)
            image = _rounded(np.concatenate([weights @ image[low:high] for low, high, weights in down]))
        target.reshape(height, width * channels)[:] = image
    return out


def _rounded(sums: NDArray[Any]) -> NDArray[Any]:
    """To the nearest whole number from 0 to 255, in place; halves go up."""
    sums += 0.5
    np.floor(sums, out=sums)
    return np.minimum(sums, 255, out=sums)


@lru_cache(maxsize=16)
def _bands(size: int, wanted: int, channels: int, width: int) -> _Bands:
    """The weights from ``size`` to ``wanted`` pixels in bands of ``width`` outputs, for interleaved channels."""
    scale = size / wanted
    support = max(scale, 1.0)
    centre = scale * (np.arange(wanted) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), size)
    place = np.arange(size)
    weights = np.maximum(0.0, 1 - np.abs(place - centre[:, None] + 0.5) / support)
    weights[(place < first[:, None]) | (place >= end[:, None])] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    bits = 0  # as many as keep the largest weight within 16 bits
    while bits < 22 and int(0.5 + weights.max() * 2 ** (bits + 1)) < 2**15:
        bits += 1
    whole = np.floor(weights * 2**bits + 0.5)
    # divided by a power of two, which changes no digit: the sums come out in pixels
    exact = np.float32 if 256 * whole.sum(axis=1).max() < _EXACT_FLOAT32 else np.float64
    bands = []
    for begin in range(0, wanted, width):
        stop = min(begin + width, wanted)
        low, high = int(first[begin]), int(end[stop - 1])
        block = np.kron(whole[begin:stop, low:high] / 2**bits, np.eye(channels))
        bands.append((low, high, np.ascontiguousarray(block.astype(exact))))
    return tuple(bands)
