"""Masks and colour survival on images whose answer is known."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch

from persistworld_cli.metrics.masks import (
    hsv,
    hue_distance,
    masked_psnr,
    moving_mask,
    object_mask,
)

RED, WOOD, GREY = (210, 30, 25), (168, 120, 80), (150, 150, 150)


def scene(block: tuple[int, int, int] | None, table: tuple[int, int, int] = GREY) -> np.ndarray:
    """uint8 (1, 1, 20, 30, 3): a table, and a block of 6 x 10 pixels."""
    image = np.full((1, 1, 20, 30, 3), table, np.uint8)
    if block:
        image[:, :, 5:11, 8:18] = block
    return image


def test_hsv_is_the_standard_one() -> None:
    rng = np.random.default_rng(0)
    colours = rng.random((50, 3))
    hue, saturation, value = hsv(colours)
    want = np.array([colorsys.rgb_to_hsv(*colour) for colour in colours])
    np.testing.assert_allclose(hue / 360, want[:, 0], atol=1e-12)
    np.testing.assert_allclose(saturation, want[:, 1], atol=1e-12)
    np.testing.assert_allclose(value, want[:, 2], atol=1e-12)
    assert float(hue_distance(np.array(350.0), 10.0)) == 20.0
    assert hsv(np.zeros(3))[1] == 0.0


def test_moving_mask_sees_block_and_what_it_uncovered_but_not_one_pixel() -> None:
    start, later = torch.full((1, 3, 20, 30), 0.5), torch.full((1, 3, 20, 30), 0.5)
    start[:, 0, 5:11, 4:10] = 0.9
    later[:, 0, 5:11, 16:22] = 0.9
    later[:, :, 15, 25] = 1.0  # one noisy pixel: 0.5/9 after the 3x3 mean
    mask = moving_mask(later, start)
    assert mask[0, 8, 6] and mask[0, 8, 18] and not mask[0, 8, 13] and not mask[0, 15, 25]
    assert not moving_mask(start, start).any()


def test_masked_psnr_by_hand() -> None:
    target = torch.zeros(2, 3, 10, 10)
    pred = target.clone()
    pred[:, :, :5] = 0.1
    mask = torch.zeros(2, 10, 10, dtype=torch.bool)
    mask[0, :5] = True
    value = masked_psnr(pred, target, mask)
    assert value[0].item() == pytest.approx(20.0, abs=1e-4) and math.isnan(value[1].item())
    mask[0] = True
    assert masked_psnr(pred, target, mask)[0].item() == pytest.approx(23.0103, abs=1e-3)


def test_a_wooden_table_is_not_an_object_when_colours_are_known() -> None:
    saturated_wood = (168, 110, 70)
    image = scene(RED, saturated_wood)
    assert object_mask(image).sum() == 600
    assert object_mask(image, [tuple(c / 255 for c in RED)]).sum() == 60
    yellow = scene((245, 205, 15), WOOD)
    assert object_mask(yellow, [(0.98, 0.82, 0.05)]).sum() == 60
    assert object_mask(yellow, [(0.08, 0.2, 0.9)]).sum() == 0
