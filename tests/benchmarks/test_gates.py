"""The gates' colour survival on images whose answer is known."""

from __future__ import annotations

import math

import numpy as np

from benchmarks.gates import coloured_pixel_survival

RED, GREY = (210, 30, 25), (150, 150, 150)


def scene(block: tuple[int, int, int] | None, table: tuple[int, int, int] = GREY) -> np.ndarray:
    """uint8 (1, 1, 20, 30, 3): a table, and a block of 6 x 10 pixels."""
    image = np.full((1, 1, 20, 30, 3), table, np.uint8)
    if block:
        image[:, :, 5:11, 8:18] = block
    return image


def test_survival_of_kept_faded_recoloured_and_moved_blocks() -> None:
    original = scene(RED)
    assert coloured_pixel_survival(original, original).share.tolist() == [1.0]
    assert coloured_pixel_survival(original, original).pixels.tolist() == [60]
    darker = scene(tuple(int(0.7 * c) for c in RED))  # type: ignore[arg-type]
    assert coloured_pixel_survival(original, darker).share.tolist() == [1.0]
    for lost in (scene(None), scene((165, 120, 115)), scene((30, 180, 40)), scene((60, 8, 7))):
        assert coloured_pixel_survival(original, lost).share.tolist() == [0.0]
    moved = np.roll(original, 5, axis=3)
    assert coloured_pixel_survival(original, moved).share.tolist() == [0.5]


def test_survival_is_per_camera_and_pools() -> None:
    original = np.concatenate([scene(RED), scene(None)], axis=1)
    one = coloured_pixel_survival(original, original)
    assert one.share[0] == 1.0 and math.isnan(one.share[1]) and one.pixels.tolist() == [60, 0]
    pooled = one + coloured_pixel_survival(original, np.concatenate([scene(None), scene(None)], axis=1))
    assert pooled.share[0] == 0.5 and math.isnan(pooled.share[1]) and pooled.pixels.tolist() == [120, 0]
