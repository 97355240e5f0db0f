"""Rewards: scikit-image's SSIM, the lpips package's LPIPS, the golden advantages, hand-computed PSNR and reward."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import GoldenFiles
from golden_table import close
from noisy_images import NO_LPIPS, images
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from persistworld_cli.config.settings import RewardSettings, WorldSettings
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.metrics.lpips import (
    LABEL,
    LABEL_UNTRAINED,
    SHIPPED,
    SHIPPED_SHA256,
    Lpips,
    find_backbone,
)
from persistworld_cli.metrics.psnr import CAP_DB, psnr
from persistworld_cli.metrics.registry import REWARDS
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.metrics.ssim import ssim
from persistworld_cli.objective.advantage import group_advantages, keep_extremes, optimality

LPIPS_GOLDEN = json.loads((Path(__file__).parent / "lpips_golden.json").read_text())


@pytest.mark.parametrize("size", [(48, 80), (24, 40), (7, 9)])
def test_ssim_is_scikit_images(size: tuple[int, int]) -> None:
    pred, target = images(3, 48, 80)
    pred, target = pred[..., : size[0], : size[1]], target[..., : size[0], : size[1]]
    want = [
        structural_similarity(a.double().numpy(), b.double().numpy(), channel_axis=0, data_range=1.0)
        for a, b in zip(pred, target, strict=True)
    ]
    np.testing.assert_allclose(ssim(pred, target).numpy(), want, atol=1e-5)
    assert torch.allclose(ssim(target, target), torch.ones(3))


def test_ssim_refuses_images_below_its_window() -> None:
    with pytest.raises(PersistWorldError, match="7x7"):
        ssim(torch.zeros(1, 3, 6, 20), torch.zeros(1, 3, 6, 20))


def test_psnr_by_hand_and_by_scikit_image() -> None:
    zero = torch.zeros(1, 3, 4, 4)
    assert psnr(zero + 0.1, zero).item() == pytest.approx(20.0, abs=1e-4)
    assert psnr(zero, zero).item() == CAP_DB
    pred, target = images(2)
    want = [peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1.0) for a, b in zip(pred, target, strict=True)]
    np.testing.assert_allclose(psnr(pred, target).numpy(), want, atol=1e-4)


def test_lpips_is_the_packages() -> None:
    metric = Lpips(backbone="untrained")
    assert metric.label == LABEL_UNTRAINED and not metric.higher_is_better
    pred, target = images(4)
    want = metric.model(pred, target, normalize=True).flatten()
    np.testing.assert_allclose(metric(pred, target, chunk=3).numpy(), want.detach().numpy(), rtol=1e-4, atol=1e-6)
    assert metric(target, target).abs().max() == 0
    worse, _ = images(4, noise=0.3)
    assert bool((metric(worse, target) > metric(pred, target)).all())


def test_untrained_lpips_is_the_same_everywhere_and_leaves_the_random_state() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = Lpips(backbone="untrained")
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    second = Lpips(backbone="untrained")
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def wave(size: tuple[int, int], pattern: int) -> np.ndarray:
    """A pattern of `lpips_golden.json`, (H, W, 3) uint8."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float64)
    layers = [np.sin(x / (7 + 3 * i + pattern)) + np.cos(y / (5 + 2 * i + pattern)) + 2 for i in range(3)]
    return np.round(255 * np.stack(layers, axis=-1) / 4).astype(np.uint8)


def blurred(image: np.ndarray) -> np.ndarray:
    """Box of 5x5, border reflected."""
    padded = np.pad(image.astype(np.float64), ((2, 2), (2, 2), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(0, 1))
    return np.round(windows.mean(axis=(-1, -2))).astype(np.uint8)


def as_images(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("row", LPIPS_GOLDEN["rows"], ids=lambda row: f"{row['size'][0]}-{row['against']}")
def test_the_shipped_backbone_gives_the_golden_distances(row: dict[str, Any]) -> None:
    metric = Lpips()
    assert metric.label == LABEL and metric.source == SHIPPED
    first = wave(row["size"], 0)
    other = {
        "other pattern": lambda: wave(row["size"], 1),
        "blurred 5x5": lambda: blurred(first),
        "shifted 3 pixels right": lambda: np.roll(first, 3, axis=1),
        "itself": lambda: first,
    }[row["against"]]()
    found = metric(as_images(other), as_images(first)).item()
    assert found == pytest.approx(row["float16_stored"], abs=2e-6)
    assert found == pytest.approx(row["float32"], abs=1e-4)


def test_the_default_backbone_is_the_shipped_one_whatever_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").write_bytes(b"not what is wanted")
    assert find_backbone("alex", RewardSettings().lpips_backbone) == SHIPPED
    assert find_backbone("alex", "untrained") is None
    described = Lpips().describe()
    assert described["backbone"] == "shipped" and described["backbone_sha256"] == SHIPPED_SHA256


def test_trained_lpips_tells_blur_from_a_shift() -> None:
    """What the untrained backbone gets wrong: a shift of three pixels is nearer than a strong blur."""
    generator = torch.Generator().manual_seed(5)
    target = torch.nn.functional.interpolate(torch.rand(1, 3, 24, 40, generator=generator), scale_factor=4)
    blur = torch.nn.functional.avg_pool2d(target, 9, stride=1, padding=4, count_include_pad=False)
    shift = target.roll(3, dims=-1)
    metric = Lpips()
    assert metric(blur, target) > metric(shift, target)


def test_other_networks_come_from_torchs_cache_or_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PersistWorldError, match="not on this machine") as caught:
        Lpips(net="squeeze")
    assert "squeezenet1_1-b8a52dc0.pth" in str(caught.value) and "shipped" in str(caught.value)
    source = Lpips(net="squeeze", backbone="untrained")
    weights = {"features." + key.split(".", 1)[1]: value + 0.01 for key, value in source.model.net.state_dict().items()}
    cached = tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    cached.parent.mkdir(exist_ok=True)
    torch.save({**weights, "classifier.1.weight": torch.zeros(1)}, cached)
    for choice in ("auto", str(cached)):
        metric = Lpips(net="squeeze", backbone=choice)
        assert metric.label == LABEL and metric.describe()["backbone"] == cached.name
        for key, value in metric.model.net.state_dict().items():
            assert torch.equal(value, weights["features." + key.split(".", 1)[1]])


def test_a_damaged_shipped_backbone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "features.safetensors"
    damaged.write_bytes(SHIPPED.read_bytes()[:-1] + b"x")
    monkeypatch.setattr("persistworld_cli.metrics.lpips.SHIPPED", damaged)
    with pytest.raises(PersistWorldError, match="damaged"):
        Lpips()


def test_an_untrained_backbone_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        scorer = Scorer(RewardSettings(lpips_backbone="untrained"), WorldSettings(), "cpu")
    assert "untrained" in caplog.text and scorer.caveat == LABEL_UNTRAINED
    caplog.clear()
    assert Scorer(RewardSettings(), WorldSettings(), "cpu").caveat == "" and not caplog.text


def test_lpips_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(PersistWorldError, match="no LPIPS backbone"):
        Lpips(backbone=str(tmp_path / "absent.pth"))
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not weights")
    with pytest.raises(PersistWorldError, match="does not hold"):
        Lpips(backbone=str(broken))
    with pytest.raises(UsageError, match="alexx"):
        Lpips(net="alexx")
    with pytest.raises(PersistWorldError, match="at least 31"):
        Lpips(backbone="untrained")(torch.zeros(1, 3, 24, 40), torch.zeros(1, 3, 24, 40))


def test_scorer_shapes_shared_targets_and_reward() -> None:
    settings = RewardSettings(lpips_backbone="untrained")
    scorer = Scorer(settings, WorldSettings(), "cpu")
    assert set(scorer.names) == set(REWARDS) and scorer.labels["lpips"] == LABEL_UNTRAINED
    pred = images(24)[0].view(2, 2, 2, 3, 3, 48, 80)  # 2 recordings, 2 candidates each, 2 frames, 3 cameras
    target = images(24)[1].view(2, 2, 2, 3, 3, 48, 80)[:, 0]
    shared = scorer.metrics(pred.flatten(0, 1), target)
    apart = scorer.metrics(pred.flatten(0, 1), target.repeat_interleave(2, 0))
    for name in scorer.names:
        assert shared[name].shape == (4, 2, 3)
        torch.testing.assert_close(shared[name], apart[name], rtol=1e-5, atol=1e-6)
    by_hand = (-shared["lpips"] + shared["ssim"] + shared["psnr"] / 32).mean(dim=(1, 2))
    torch.testing.assert_close(scorer.reward(shared), by_hand)


def test_camera_weights_and_metric_weights_count() -> None:
    settings = RewardSettings(weights={"psnr": 2.0}, camera_weights=(1.0, 0.0, 3.0))
    scorer = Scorer(settings, WorldSettings(), "cpu", names=("ssim",))
    assert scorer.names == ("ssim", "psnr")
    metrics = {"psnr": torch.tensor([[[1.0, 9.0, 3.0], [3.0, 9.0, 5.0]]]), "ssim": torch.full((1, 2, 3), 7.0)}
    assert scorer.reward(metrics).item() == pytest.approx(2 * (2.0 * 0.25 + 4.0 * 0.75))


def test_scorer_mistakes_are_named() -> None:
    world = WorldSettings()
    with pytest.raises(UsageError, match="unknown reward 'sim'") as caught:
        Scorer(RewardSettings(weights={"sim": 1.0}), world, "cpu")
    assert "ssim" in str(caught.value)
    with pytest.raises(UsageError, match="2 camera weights"):
        Scorer(RewardSettings(weights={"psnr": 1.0}, camera_weights=(1.0, 1.0)), world, "cpu")
    for wrong in ({"lpips": 0.5}, {"psnr": -1.0}):
        with pytest.raises(UsageError, match="worse images would be rewarded"):
            Scorer(RewardSettings(weights=wrong, lpips_backbone="untrained"), world, "cpu")
    scorer = Scorer(NO_LPIPS, world, "cpu")
    with pytest.raises(PersistWorldError, match="do not fit"):
        scorer.metrics(torch.zeros(1, 2, 3, 3, 8, 8), torch.zeros(1, 2, 2, 3, 8, 8))
    with pytest.raises(PersistWorldError, match="not finite"):
        scorer.metrics(torch.full((1, 1, 3, 3, 8, 8), float("nan")), torch.zeros(1, 1, 3, 3, 8, 8))


def test_advantages_are_the_golden_ones(golden: GoldenFiles) -> None:
    data = np.load(golden / "nft_schedule_advantage.npz")
    rewards = torch.from_numpy(data["rewards"])
    for prompt in np.unique(data["prompts"]):
        members = torch.from_numpy(data["prompts"] == prompt)
        got = group_advantages(rewards[members][None])[0]
        close("G advantages", got, data["adv_group_std"][members.numpy()], 1e-12)


def test_equal_rewards_give_zero_advantage_and_half_optimality() -> None:
    advantages = group_advantages(torch.full((2, 4), 0.3))
    assert torch.equal(advantages, torch.zeros(2, 4))
    assert torch.equal(optimality(advantages), torch.full((2, 4), 0.5))
    assert optimality(torch.tensor([-3.0, -0.5, 0.5, 3.0]), 1.0).tolist() == [0.0, 0.25, 0.75, 1.0]
    assert optimality(torch.tensor([1.0]), 2.0).item() == 0.75


def test_keep_extremes() -> None:
    rewards = torch.tensor([[0.1, 0.9, 0.5, 0.7, 0.3], [1.0, 1.0, 1.0, 1.0, 1.0]])
    kept = keep_extremes(rewards, 2, 2)
    assert kept.tolist() == [[1, 3, 0, 4], [0, 1, 4, 3]]
    assert sorted(keep_extremes(rewards, 3, 2)[0].tolist()) == [0, 1, 2, 3, 4]
    assert keep_extremes(rewards, 1, 0).tolist() == [[1], [0]]
    for best, worst in ((3, 3), (0, 0), (-1, 2)):
        with pytest.raises(UsageError, match="cannot keep"):
            keep_extremes(rewards, best, worst)
