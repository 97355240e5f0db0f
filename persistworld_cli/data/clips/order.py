"""The order of samples: dataset and start frame of clip n of a run, as a pure function of (seed, n).

Among the first n clips, a dataset has n times its share (to less than one clip with two datasets, a few with many), not
only on average. Within a dataset every start frame comes once per epoch, and every epoch has its own order: a
permutation computed element by element, which needs no memory for ten million samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

_WHOLE = 2**32  # shares are counted in parts of this, so that all arithmetic is exact
_WORD = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Place(NamedTuple):
    """One clip of the order: number of the dataset, its epoch there, and the sample."""

    source: int
    epoch: int
    sample: int


class Order:
    """The order of clips over datasets of ``sizes`` samples, in shares proportional to ``weights`` (above 0)."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float]) -> None:
        if len(sizes) != len(weights) or min(sizes) < 1 or min(weights) <= 0:
            raise ValueError(f"sizes {sizes} and weights {weights}")
        self.sizes = tuple(sizes)
        self._parts = [max(1, round(weight / sum(weights) * _WHOLE)) for weight in weights]

    @property
    def shares(self) -> list[float]:
        """The weights, adding up to 1."""
        return [part / sum(self._parts) for part in self._parts]

    def place(self, seed: int, number: int) -> Place:
        """Clip ``number`` >= 0 of the run with this seed."""
        source, position = self._share(number)
        epoch, index = divmod(position, self.sizes[source])
        return Place(source, epoch, permuted(index, self.sizes[source], _key(seed, source, epoch)))

    def _share(self, number: int) -> tuple[int, int]:
        """Dataset of clip ``number``, and how many clips of that dataset come before it.

        Dataset 0 takes its share of all clips, evenly spread; dataset 1 its share of those that are left, and so on.
        """
        rest = sum(self._parts)
        for source, part in enumerate(self._parts[:-1]):
            before = number * part // rest
            if (number + 1) * part // rest > before:
                return source, before
            number, rest = number - before, rest - part
        return len(self._parts) - 1, number


def permuted(index: int, size: int, key: int) -> int:
    """The image of ``index`` under the permutation of 0 .. size - 1 with this key.

    A Feistel network permutes the next power of two; results outside are permuted again until they fall inside.
    """
    bits = (size - 1).bit_length()
    low, high = bits - bits // 2, bits // 2
    low_mask, high_mask = (1 << low) - 1, (1 << high) - 1
    while True:
        left, right = index >> low, index & low_mask
        for number in range(2 if bits > 16 else 4):  # pairs of rounds; short halves need more to look random
            left ^= _mixed(key + 2 * number * _GOLDEN ^ right) & high_mask
            right ^= _mixed(key + (2 * number + 1) * _GOLDEN ^ left) & low_mask
        index = left << low | right
        if index < size:
            return index


@lru_cache(maxsize=64)
def _key(seed: int, source: int, epoch: int) -> int:
    """A key for each epoch of each dataset."""
    key = 0
    for number in (seed, source, epoch):
        key = _mixed(key + _GOLDEN + number)
    return key


def _mixed(value: int) -> int:
    """SplitMix64's finaliser: every bit of a 64-bit word changes about half of the others."""
    value &= _WORD
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
    return value ^ value >> 31
