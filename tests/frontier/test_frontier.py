"""The frontier of sampling settings: what is tried, who is close enough, what is written, and that it goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_world import make_world, settings
from typer.testing import CliRunner

from persistworld_cli.commands import app as commands
from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.requests import FrontierRequest
from persistworld_cli.config.settings import SamplingSettings, Settings
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.evaluation import plan as eval_plan
from persistworld_cli.frontier import run as frontier
from persistworld_cli.frontier.compare import Trial, build_frontier
from persistworld_cli.frontier.fast_preset import require_writable
from persistworld_cli.frontier.grid import Setting, make_grid
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.rollout.closed_loop import ScoredRollout
from persistworld_cli.rollout.finished import load_rollout
from persistworld_cli.rollout.recording import Item
from persistworld_cli.rollout.scoring import PLAIN, SHOWN

REQUEST = FrontierRequest(reference="euler:4", samplers=("euler", "heun"), calls=(1, 2, 3))


def grid(changes: dict[str, Any], **sampling: Any) -> tuple[Setting, list[Setting]]:
    return make_grid(Settings(sampling=SamplingSettings(**sampling)), replace(REQUEST, **changes))


# -- what is tried -----------------------------------------------------------------------------------------------------


def test_samplers_are_tried_at_equal_calls_and_each_clip_once() -> None:
    reference, tried = grid({}, steps=2)
    assert (reference.name, reference.calls) == ("euler 4", 4)
    # With one step heun is euler, and with two calls there is none; the preset's own 2 steps are in the grid.
    assert [one.name for one in tried] == ["euler 1", "euler 2", "euler 3", "heun 2"]
    assert [one.calls for one in tried] == [1, 2, 3, 3]


def test_other_numbers_are_varied_and_guidance_counts_twice() -> None:
    reference, tried = grid({"calls": [2], "vary": ["sigma_min=0.002,0.05", "sampling.guidance=1,2"]}, guidance=2.0)
    assert reference.calls == 8
    named = {one.name: one.calls for one in tried}
    assert named == {
        "euler 2, guidance 1": 2,
        "euler 2, guidance 1, sigma_min 0.05": 2,
        "euler 2": 4,
        "euler 2, sigma_min 0.05": 4,
        "euler 50": 100,
    }
    assert next(one for one in tried if one.name == "euler 2, sigma_min 0.05").sampling.sigma_min == 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samplers": ["eulr"]}, "unknown sampler 'eulr'"),
        ({"reference": "euler"}, "'euler' is not SAMPLER:STEPS"),
        ({"reference": "euler:0"}, "'euler:0' is not SAMPLER:STEPS"),
        ({"vary": ["steps=1,2"]}, "'steps' cannot be varied"),
        ({"vary": ["rho"]}, "'rho' is not KEY=VALUE,VALUE"),
        ({"vary": ["rho=7,x"]}, "sampling.rho = 'x' has the wrong type: expected a number"),
        ({"vary": ["sigma_min=-1"]}, "sampling.sigma_min"),
        ({"samplers": ["euler"], "calls": [4]}, "only the reference itself"),
    ],
)
def test_a_grid_that_cannot_be_meant_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as told:
        grid(changes, steps=4)
    assert message in told.value.what


@pytest.mark.parametrize(("flag", "value"), [("--calls", "0"), ("--calls", "1,x"), ("--percent", "-1")])
def test_mistakes_on_the_command_line_are_named(flag: str, value: str) -> None:
    result = CliRunner().invoke(commands.app, ["frontier", flag, value])
    assert result.exit_code == 2 and flag in result.stderr


# -- who is close enough -----------------------------------------------------------------------------------------------


def trial(name: str, calls: int, levels: list[float], noise: float = 0.0) -> Trial:
    """One rollout an episode whose SSIM and PSNR/25 are ``levels``, and whose LPIPS is 1 - level."""
    rng = np.random.default_rng(len(name))
    rollouts = []
    for index, level in enumerate(levels):
        one = np.full((4, 3), level + noise * rng.normal(), dtype=np.float32)
        scores = {"ssim": one, "psnr": 25 * one, "lpips": 1 - one, "psnr_moving": 20 * one}
        rollouts.append(ScoredRollout(Item(str(index), 0, 0), np.ones(4, dtype=bool), scores, None, 1.0))
    return Trial(Setting(name, SamplingSettings(), calls), rollouts, 1000 * calls)


def judged(trials: list[Trial], episodes: int = 8) -> dict[str, Any]:
    world = Settings()
    scorer = Scorer(replace(world.rewards, lpips_backbone="untrained"), world.world, "cpu", names=SHOWN)
    return build_frontier(
        world, scorer, PLAIN, trial("reference", 50, [0.5 + 0.02 * k for k in range(episodes)]), trials, 1
    )


def test_close_enough_is_a_matter_of_the_whole_interval() -> None:
    base = [0.5 + 0.02 * k for k in range(8)]
    result = judged(
        [
            trial("far", 1, [value - 0.05 for value in base]),
            trial("vague", 2, base, noise=0.05),
            trial("near", 4, [value - 0.001 for value in base]),
            trial("same", 8, base),
            trial("better", 4, [value + 0.05 for value in base]),
        ]
    )
    assert {row["name"]: row["within"] for row in result["settings"]} == {
        **{"far": "no", "vague": "open", "near": "yes", "same": "yes", "better": "yes"}
    }
    assert result["chosen"] == "better"  # of the two with 4 calls the one with the most to spare
    far = next(loss for loss in result["settings"][0]["losses"] if loss["metric"] == "ssim")
    assert far["loss"] == pytest.approx(100 * 0.05 / 0.57, rel=1e-4) and far["change"] == pytest.approx(-0.05, abs=1e-6)
    worse = next(loss for loss in result["settings"][0]["losses"] if loss["metric"].startswith("lpips"))
    assert worse["loss"] == pytest.approx(100 * 0.05 / 0.43, rel=1e-4)  # up is worse there
    assert "12.5x fewer" in result["conclusion"] and "do not make this model better" in result["conclusion"]


def test_few_episodes_settle_nothing() -> None:
    result = judged([trial("same", 1, [0.5, 0.52])], episodes=2)
    assert result["chosen"] is None and result["settings"][0]["within"] == "too few"
    assert "2 episodes are too few" in result["conclusion"]


# -- the whole of it ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frontier")
    make_world(folder, {str(index): 10 for index in range(6)})
    return folder


def test_end_to_end(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    own = settings(root, steps=1, batch=6)
    request = FrontierRequest(
        reference="euler:3",
        samplers=("euler",),
        calls=(1, 2),
        percent=1000.0,
        output=root / "out",
        write_preset=root / "fast.toml",
    )
    summary = frontier.run(own, request)
    result = json.loads((root / "out" / "frontier.json").read_text())
    assert summary["chosen"] == result["chosen"] == "euler 1"  # anything is within 1000%
    assert (root / "out" / "frontier.png").stat().st_size > 10_000
    assert "euler 1 *" in (root / "out" / "table.txt").read_text()

    plan = frontier.make_plan(own, request, frontier.torch.device("cpu"))
    means = {
        one.setting.name: np.mean([load_rollout(one.folder, item).scores["psnr"][:, :2].mean() for item in plan.items])
        for one in (plan.reference, *plan.grid)
    }
    row = next(row for row in result["settings"] if row["name"] == "euler 2")
    loss = next(x for x in row["losses"] if (x["cameras"], x["metric"]) == ("exterior", "psnr"))
    assert loss["change"] == pytest.approx(means["euler 2"] - means["euler 3"], abs=1e-5) and loss["change"] != 0

    fast = load_settings(str(root / "fast.toml"), env={})
    assert (fast.sampling.sampler, fast.sampling.steps, fast.sampling.sigma_max) == ("euler", 1, 80.0)
    assert fast.model == load_settings("tiny", env={}).model

    written = {path: path.stat().st_mtime_ns for path in (root / "out" / "rollouts").rglob("*.npz")}
    assert len(written) == 18
    monkeypatch.setattr(eval_plan, "load_for_sampling", lambda *_, **__: pytest.fail("all is there"))
    again = frontier.run(own, request)
    assert again["settings"] == summary["settings"]
    assert written == {path: path.stat().st_mtime_ns for path in (root / "out" / "rollouts").rglob("*.npz")}


def test_the_reference_may_be_other_weights(root: Path) -> None:
    own = settings(root, steps=1, batch=6)
    request = FrontierRequest(reference="euler:2", samplers=("euler",), calls=(1, 2), percent=1000.0)
    alone = frontier.run(own, replace(request, output=root / "alone"))
    other = str(root / "other.safetensors")
    others = replace(own, model=replace(own.model, inference=other))
    frontier.run(others, replace(request, output=root / "both", baseline=own.model.ckpt))
    frontier.run(own, replace(request, output=root / "swapped", baseline=other))
    results = [json.loads((root / name / "frontier.json").read_text()) for name in ("alone", "both", "swapped")]
    assert [[row["name"] for row in result["settings"]] for result in results] == [
        ["euler 1"],
        *[["euler 1", "euler 2"]] * 2,
    ]
    names = [result["reference"]["name"] for result in results]
    assert names == ["euler 2", "euler 2 of base.safetensors", "euler 2 of other.safetensors"]
    for result, weights in zip(results, (own.model.ckpt, other, own.model.ckpt), strict=True):
        assert result["model"]["ckpt"] == weights
    assert results[1]["reference"]["model"] == results[0]["model"] == results[2]["model"]
    first, second, third = (result["reference"]["figures"]["exterior"]["psnr"] for result in results)
    assert first == second != third  # the reference's weights, not the judged ones'
    losses = [
        next(x for x in result["settings"][-1]["losses"] if (x["cameras"], x["metric"]) == ("exterior", "psnr"))
        for result in results[1:]
    ]
    # with the same sampling, either is the other's reference
    assert losses[0]["value"] == third and losses[1]["value"] == first
    assert losses[0]["change"] == pytest.approx(-losses[1]["change"]) and losses[0]["change"] != 0
    assert alone["chosen"] == "euler 1" and "do not make" not in results[1]["conclusion"]


def test_no_preset_is_written_where_nothing_qualifies(root: Path) -> None:
    own = settings(root, steps=1, batch=6, episodes=("0", "1"))
    request = FrontierRequest(
        reference="euler:2", samplers=("euler",), calls=(1,), output=root / "few", write_preset=root / "none.toml"
    )
    assert frontier.run(own, request)["exit_code"] == 1
    assert not (root / "none.toml").exists()


def test_a_file_of_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('extends = "tiny"\n')
    for path in (tmp_path / "mine.toml", tmp_path / "fast.json"):
        with pytest.raises(PersistWorldError):
            require_writable(path)
    require_writable(tmp_path / "new.toml")
