"""Rewards and samplers of the user's own, named as module:Class."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from eval_world import make_world, settings

from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.requests import EvalRequest, FrontierRequest
from persistworld_cli.config.resume import find_changes
from persistworld_cli.config.settings import RewardSettings, SamplingSettings, WorldSettings
from persistworld_cli.cost.interaction import sampler_calls
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.evaluation import run as eval_run
from persistworld_cli.frontier.grid import make_grid
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.models.samplers import euler, find_sampler

MODULE = '''
from persistworld_cli.metrics.registry import Metric


class MeanError(Metric):
    label = "mean_error"
    higher_is_better = False

    def __call__(self, pred, target):
        return (pred - target.repeat_interleave(len(pred) // len(target), 0)).abs().mean(dim=(1, 2, 3))


class Taken(MeanError):
    label = "psnr"


class Spaced(MeanError):
    label = "mean error"


class Same(MeanError):
    pass


class Short(MeanError):
    label = "short"

    def __call__(self, pred, target):
        return pred.mean().reshape(1)


class Bare:
    pass


class Midpoint:
    """Two calls a step but for the last."""

    def __call__(self, denoise, x, sigmas):
        for sigma, below in zip(sigmas, sigmas[1:]):
            slope = (x - denoise(x, sigma)) / sigma
            if below > 0:
                middle = (sigma * below).sqrt()
                ahead = x + slope * (middle - sigma)
                slope = (ahead - denoise(ahead, middle)) / middle
            x = x + slope * (below - sigma)
        return x


class Cut:
    def __call__(self, denoise, x, sigmas):
        return denoise(x, sigmas[0])[:, 1:]


class Broken(MeanError):
    label = "broken"

    def __call__(self, pred, target):
        return {}[0]


class Failing:
    def __init__(self):
        raise RuntimeError("my mistake")
'''
OWN = "own_parts:MeanError"


@pytest.fixture(autouse=True)
def own_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_parts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_parts", raising=False)


def scorer(*names: str) -> Scorer:
    return Scorer(RewardSettings(weights=dict.fromkeys(names, -1.0)), WorldSettings(), "cpu")


def test_eval_with_an_own_reward_and_sampler_shows_them_by_name(tmp_path: Path) -> None:
    make_world(tmp_path, {"9": 10})
    own = settings(tmp_path, episodes=("9",), sheets=0)
    own = replace(
        own,
        sampling=replace(own.sampling, sampler="own_parts:Midpoint"),
        rewards=replace(own.rewards, weights={"psnr": 1.0, OWN: -2.0}),
    )
    summary = eval_run.run(own, EvalRequest(output=tmp_path / "out"))
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert "mean_error" in [metric["label"] for metric in result["metrics"]] and summary["table"][0]["mean_error"] > 0
    assert "mean_error↓" in (tmp_path / "out" / "table.txt").read_text()
    protocol = result["protocol"]
    assert protocol["sampling"]["sampler"] == "own_parts:Midpoint"
    assert protocol["metrics"]["mean_error"] == {"label": "mean_error", "class": OWN}
    assert protocol["reward"]["weights"] == {"psnr": 1.0, "mean_error": -2.0}


def test_an_own_reward_is_weighted_and_has_maps_without_places() -> None:
    own = scorer(OWN)
    pred, target = torch.rand(4, 2, 3, 3, 8, 12), torch.rand(2, 2, 3, 3, 8, 12)
    metrics = own.metrics(pred, target)
    torch.testing.assert_close(metrics["mean_error"], (pred - target.repeat_interleave(2, 0)).abs().mean(dim=(3, 4, 5)))
    torch.testing.assert_close(own.local(pred, target, (2, 3), metrics)[..., 1, 2], -metrics["mean_error"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere_x:A", "no module 'nowhere_x'"),
        ("own_parts:Nobody", "has no class 'Nobody'"),
        ("own_parts:Bare", "has no 'label'"),
        ("own_parts:Taken", "has the label 'psnr'"),
        ("own_parts:Spaced", "has the label 'mean error'"),
        ("own_parts:Failing", "(?s)the reward failed.*my mistake"),
        ("psnrr", "unknown reward 'psnrr'"),
    ],
)
def test_what_is_wrong_with_an_own_reward_is_one_error(name: str, message: str) -> None:
    with pytest.raises(PersistWorldError, match=message) as caught:
        scorer(name)
    assert "rewards.weights" in str(caught.value.where)


def test_values_of_another_count_are_refused() -> None:
    images = torch.zeros(1, 1, 3, 3, 8, 8)
    with pytest.raises(PersistWorldError, match="short gives values of shape"):
        scorer("own_parts:Short").metrics(images, images)
    with pytest.raises(PersistWorldError, match=r"the metric failed in Broken.__call__: KeyError: 0"):
        scorer("own_parts:Broken").metrics(images, images)
    with pytest.raises(UsageError, match="two rewards have the label 'mean_error'"):
        scorer(OWN, "own_parts:Same")
    with pytest.raises(UsageError, match="the referee 'mean_error' has the label of a reward"):
        scorer(OWN).with_referees(scorer("own_parts:Same").registered)


def test_calls_of_an_own_sampler_are_counted_by_running_it() -> None:
    own = SamplingSettings(steps=4, sampler="own_parts:Midpoint")
    assert sampler_calls(own) == 7 and sampler_calls(replace(own, guidance=2.0)) == 14
    with pytest.raises(PersistWorldError, match=r"(?s)the sampler failed.*my mistake"):
        sampler_calls(SamplingSettings(sampler="own_parts:Failing"))
    with pytest.raises(TypeError):  # of this package's, which the sampler calls
        find_sampler("own_parts:Midpoint")(partial(euler, None), torch.zeros(1), torch.tensor([2.0, 1.0, 0.0]))
    plain = load_settings("tiny", env={})
    samplers = ("euler", "own_parts:Midpoint")
    request = FrontierRequest(reference="own_parts:Midpoint:8", samplers=samplers, calls=(1,))
    reference, grid = make_grid(plain, request)
    assert reference.calls == 15 and {"euler 1", "own_parts:Midpoint 1"} <= {setting.name for setting in grid}


def test_another_class_is_another_run() -> None:
    def record(sampler: str, reward: str) -> dict[str, object]:
        return {"settings": {"sampling": {"sampler": sampler}, "rewards": {"weights": {reward: 1.0}}}, "request": {}}

    changes = find_changes("eval", record("a:B", "a:C"), record("a:D", "a:E"))
    assert {change.key for change in changes.refused} == {"sampling.sampler", "rewards.weights"}
