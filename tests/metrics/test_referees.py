"""Referees outside the reward: what each one sees, and that shift-tolerant LPIPS is the published one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from persistworld_cli.config.presets import load_settings
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.metrics import referees, st_lpips
from persistworld_cli.metrics.referees import SharpnessGap, load_referees
from persistworld_cli.metrics.st_lpips import StLpips, find_weights
from persistworld_cli.policies.bundled_world.presence import ObjectsKept

CPU = torch.device("cpu")
OBJECTS = "persistworld_cli.policies.bundled_world.presence:ObjectsKept"


def scene(block: bool = True, left: int = 20) -> Tensor:
    """(1, 3, 48, 80): a grey ramp with a red block."""
    image = torch.linspace(0.2, 0.8, 80).expand(1, 3, 48, 80).clone()
    if block:
        image[:, 0, 10:30, left : left + 20] = 0.9
        image[:, 1:, 10:30, left : left + 20] = 0.1
    return image


def moved() -> Tensor:
    return scene(left=22)


def blurred() -> Tensor:
    return functional.avg_pool2d(functional.pad(scene(), (2, 2, 2, 2), "replicate"), 5, 1)


def test_sharpness_sees_blur_and_noise_but_no_shift() -> None:
    noisy = (scene() + 0.1 * torch.randn(scene().shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    own, shift, blur, noise = SharpnessGap()(torch.cat([scene(), moved(), blurred(), noisy]), scene()).tolist()
    assert own == 0 and shift < 0.1 and blur > 0.1 and noise > 0.5


def test_objects_are_kept_where_they_stand_and_where_they_moved_but_not_where_they_fade() -> None:
    faded = 0.7 * scene(block=False) + 0.3 * scene()
    half = scene()
    half[:, :, 20:30] = scene(block=False)[:, :, 20:30]
    kept = ObjectsKept()(torch.cat([scene(), moved(), half, faded, scene(block=False)]), scene())
    assert kept.tolist() == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert ObjectsKept()(scene(), scene(block=False)).tolist() == [1.0]  # nothing to lose
    two = torch.cat([scene(), scene(block=False)])  # two records, two candidates of each
    assert ObjectsKept()(torch.cat([scene(), moved(), scene(), moved()]), two).tolist() == [1.0] * 4


@pytest.mark.skipif(find_weights() is None, reason="stlpips-pytorch is not installed")
def test_shift_tolerant_lpips_is_the_packages() -> None:
    """Values of stlpips_pytorch 0.0.2: stlpips.LPIPS(net="alex", variant="shift_tolerant"), normalize=True."""
    made = torch.cat([scene(), moved(), blurred(), scene(block=False)])
    assert StLpips()(made, scene()).tolist() == pytest.approx([0.0, 0.02912319, 0.09386426, 0.80512661], abs=1e-6)


def test_a_referee_that_is_not_installed_is_left_out_and_said_to_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (referees, st_lpips):
        monkeypatch.setattr(module, "find_weights", lambda: None)
    with caplog.at_level(logging.INFO):
        assert list(load_referees(("sharpness_gap", "st_lpips", OBJECTS), CPU)) == ["sharpness_gap", "objects_kept"]
    assert "st_lpips is not installed" in caplog.text and "pip install stlpips-pytorch" in caplog.text
    with pytest.raises(PersistWorldError, match="not installed"):
        StLpips()


def test_a_referee_of_the_bundled_world_refuses_other_datasets(tmp_path: Path) -> None:
    note = tmp_path / "annotation/train/0.json"
    note.parent.mkdir(parents=True)
    note.write_text('{"texts": ["go"], "states": [[0.0]], "sim.object_pose": [[0.0]]}')
    assert list(load_referees((OBJECTS,), CPU, tmp_path)) == ["objects_kept"]
    note.write_text('{"texts": ["go"], "states": [[0.0]]}')
    with pytest.raises(UsageError, match="coloured objects, which this dataset does not have"):
        load_referees((OBJECTS,), CPU, tmp_path)


def test_names_that_mean_nothing_are_refused_when_settings_are_read() -> None:
    with pytest.raises(UsageError, match="unknown referee 'sharpnes'") as caught:
        load_settings("tiny", ['post_train.referees=["sharpnes"]'], env={})
    assert "sharpness_gap" in caught.value.fix
    for name, words in (("nowhere:Class", "no module"), ("json:JSONDecoder", "__call__|label")):
        with pytest.raises(UsageError, match=words):
            load_referees((name,), CPU)
