"""Masks that the user gives: layout, and what is refused before any compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity

from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.metrics.masks import masked_ssim
from persistworld_cli.metrics.user_masks import open_masks

CAMERAS = ("front", "wrist")


def mask(left: int, size: tuple[int, int] = (10, 12)) -> np.ndarray:
    out = np.zeros(size, np.uint8)
    out[:, left : left + 3] = 200
    return out


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for frame in (3, 4, 5):
        write(tmp_path / "things" / "7" / "front" / f"{frame:05d}.png", mask(frame))
    return tmp_path / "things"


def test_images_and_arrays_give_the_same_masks(folder: Path) -> None:
    images = open_masks(str(folder), {"7": [3, 4, 5]}, CAMERAS, 10, 12)
    got = images.load("7", np.array([4, 5]))
    assert images.name == "things" and got.shape == (2, 2, 10, 12)
    np.testing.assert_array_equal(got[0, 0], mask(4) > 0)
    assert not got[:, 1].any()  # the camera that nobody marked
    (folder / "8").mkdir()
    np.savez(folder / "8" / "0.npz", mask=np.stack([mask(frame) > 0 for frame in range(6)]))
    both = open_masks(f"thing={folder}", {"7": [3, 4, 5], "8": [3, 4, 5]}, CAMERAS, 10, 12)
    assert both.name == "thing"
    np.testing.assert_array_equal(both.load("8", np.array([4, 5])), got)
    assert both.sha256 != images.sha256


def test_masks_that_do_not_fit_are_named(folder: Path) -> None:
    with pytest.raises(PersistWorldError, match=r"1 of 4 frames are missing \(first: frame 6"):
        open_masks(str(folder), {"7": [3, 4, 5, 6]}, CAMERAS, 10, 12)
    with pytest.raises(PersistWorldError, match="10x12 pixels, but the recorded images have 20x24"):
        open_masks(str(folder), {"7": [3]}, CAMERAS, 20, 24)
    with pytest.raises(PersistWorldError, match="no masks of the episodes 9"):
        open_masks(str(folder), {"9": [3]}, CAMERAS, 10, 12)
    with pytest.raises(PersistWorldError, match="episode '9' has no masks of camera front"):
        open_masks(str(folder), {"7": [3], "9": [3]}, CAMERAS, 10, 12)
    with pytest.raises(UsageError, match="no folder"):
        open_masks(str(folder / "nowhere"), {"7": [3]}, CAMERAS, 10, 12)
    np.savez(folder / "7" / "wrist.npz", mask=np.zeros((3, 10, 12)))
    with pytest.raises(PersistWorldError, match="at least 6, 10, 12"):
        open_masks(str(folder), {"7": [3, 4, 5]}, CAMERAS, 10, 12)
    (folder / "7" / "front" / "00003.png").write_bytes(b"no image")
    with pytest.raises(PersistWorldError, match="unreadable mask"):
        open_masks(str(folder), {"7": [3, 4, 5]}, CAMERAS, 10, 12)


def test_masked_ssim_is_scikit_images_map_over_the_mask() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 20, 24)), rng.random((2, 3, 20, 24))
    b = 0.7 * a + 0.3 * b
    inside = np.zeros((2, 20, 24), bool)
    inside[0, 5:15, 4:20] = True
    got = masked_ssim(*(torch.from_numpy(part)[:, None] for part in (a, b)), torch.from_numpy(inside)[:, None])
    _, whole = structural_similarity(a[0], b[0], channel_axis=0, data_range=1.0, full=True)
    assert got.shape == (2, 1) and got[0, 0].item() == pytest.approx(whole[:, 5:15, 4:20].mean(), abs=1e-5)
    assert torch.isnan(got[1, 0])
