"""Credit by rollout, by image and by patch: shapes, means, and that a patch is moved only by its own reward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from noisy_images import NO_LPIPS, images

from persistworld_cli.config.settings import PostTrainSettings, RewardSettings, WorldSettings
from persistworld_cli.metrics.registry import REWARDS
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.objective.advantage import credit_map
from persistworld_cli.objective.nft import nft_loss
from persistworld_cli.training.candidates import Candidates, credit, exploration

WORLD = replace(WorldSettings(), cameras=("left", "wrist"), exterior=(0,), wrist=(1,))
OPTIONS = PostTrainSettings(candidates=4, keep_best=2, keep_worst=2, credit_grid=(3, 5))


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_cells_sum_to_the_image_by_the_slope(name: str) -> None:
    metric = REWARDS[name](RewardSettings(), torch.device("cpu"))
    pred, target = images(4)
    near = pred + 0.01 * (target - pred)
    values = [metric(drawn, target[::2]) for drawn in (pred, near)]
    means = [metric.maps(drawn, target[::2], (1, 1)).flatten() for drawn in (pred, near)]
    slope = metric.slope(torch.stack(values).mean(dim=0))
    torch.testing.assert_close(slope * (means[1] - means[0]), values[1] - values[0], rtol=1e-3, atol=1e-5)
    cells = metric.maps(pred, target, (3, 5))
    assert cells.shape == (4, 3, 5)
    worse = pred.clone()
    worse[:, :, 32:, 64:] = 1 - worse[:, :, 32:, 64:]  # the last cell
    change = (metric.maps(worse, target, (3, 5)) - cells).abs().mean(0)
    assert change[2, 4] > 5 * change[0, 0]


def made(groups: int = 2, frames: int = 4) -> tuple[Candidates, Scorer]:
    """Candidates whose images are noisy copies of the record, and the scorer they were scored by."""
    scorer = Scorer(NO_LPIPS, WORLD, "cpu")
    drawn, known = images(groups * OPTIONS.candidates * frames * 2)
    drawn = drawn.view(groups * OPTIONS.candidates, frames, 2, 3, 48, 80)
    known = known.view(groups * OPTIONS.candidates, frames, 2, 3, 48, 80)[:: OPTIONS.candidates]
    metrics = scorer.metrics(drawn, known)
    x0 = [torch.randn(len(drawn), frames + 1, 4, 24, 20)]
    reward = scorer.reward(metrics).view(groups, OPTIONS.candidates)
    return Candidates([], x0, reward, metrics, drawn, known, {}), scorer


def test_credit_has_the_shape_the_objective_takes() -> None:
    candidates, scorer = made()
    assert credit(candidates, scorer, OPTIONS).shape == (8,)
    for kind in ("frame", "patch"):
        r = credit(candidates, scorer, replace(OPTIONS, credit=kind))
        assert r.shape == (8, 1, 5, 1, 24, 20)
        assert (r[:, :, 0] == 0.5).all() and r.min() >= 0 and r.max() <= 1
    frame = credit(candidates, scorer, replace(OPTIONS, credit="frame"))[:, 0, 1:, 0]
    assert (frame[:, :, :12] == frame[:, :, :1, :1]).all()  # one number for a camera's frame
    best = scorer.by_image(candidates.metrics).view(2, 4, 4, 2).argmax(1)[0, 0, 0]
    assert frame[int(best), 0, 0, 0] == frame[:4, 0, 0, 0].max()


def test_a_patch_counts_by_its_share_of_the_difference_in_reward() -> None:
    """One candidate is better in one patch; all else differs by noise that an image hardly shows."""
    scorer = Scorer(replace(NO_LPIPS, weights={"psnr": 1.0}), WORLD, "cpu")
    _, known = images(2)
    known = known.view(1, 1, 2, 3, 48, 80)
    drawn = (known + 0.002 * torch.randn(4, 1, 2, 3, 48, 80)).clamp(0, 1)
    drawn[1:, :, 0, :, :16, :16] = 1 - drawn[1:, :, 0, :, :16, :16]
    metrics = scorer.metrics(drawn, known)
    x0 = [torch.randn(4, 2, 4, 24, 20)]
    options = replace(OPTIONS, credit="patch")
    r = credit(Candidates([], x0, scorer.reward(metrics).view(1, 4), metrics, drawn, known, {}), scorer, options)
    parts = r[:, 0, 1, 0]
    assert (parts[0, :4, :4] == 1).all() and (parts[1:, :4, :4] < 0.5).all()
    assert (parts[:, 12:] - 0.5).abs().max() < 0.1  # the other camera


def test_an_unweighted_camera_and_the_first_frame_teach_nothing() -> None:
    r = credit_map(torch.ones(1, 2, 2, 3, 5), torch.tensor([1.0, 0.0]), (12, 20))
    assert (r[:, 0] == 0.5).all() and (r[:, 1:, :, :12] == 1).all() and (r[:, 1:, :, 12:] == 0.5).all()
    theta = torch.randn(1, 3, 4, 24, 20, requires_grad=True)
    old = theta.detach().clone()
    nft_loss(theta, old, torch.randn_like(old), r, beta=0.5, weighting="plain").sum().backward()
    gradient = theta.grad
    assert gradient is not None
    assert (gradient[:, 0].abs().max() < 1e-9) and (gradient[:, 1:, :, 12:].abs().max() < 1e-9)
    assert gradient[:, 1:, :, :12].abs().min() > 0


def test_exploration_is_smooth_and_a_function_of_its_key() -> None:
    x0 = torch.zeros(2, 5, 4, 24, 20)  # two cameras of 12 x 20
    keys = [(0, "branch 3 1", 0, 0), (0, "branch 3 1", 1, 0)]
    options = replace(OPTIONS, explore=0.2)
    noise = exploration(keys, x0, 2, options)
    assert noise.shape == x0.shape and (noise[:, 0] == 0).all()  # the current frame is scored by no image
    cells = noise[:, 1:].unflatten(3, (6, 4)).unflatten(5, (5, 4))  # 3 x 5 cells a camera
    assert (cells == cells[:, :, :, :, :1, :, :1]).all()
    assert 0.17 < float(noise[:, 1:].std()) < 0.23 and abs(float(noise.mean())) < 0.02
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise[:, 1, :, :12], noise[:, 1, :, 12:])
    assert torch.equal(exploration(keys[1:], x0[1:], 2, options)[0], noise[1])
