"""Action following, drift and trust on numbers whose answer is known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from eval_world import make_world, settings
from scipy import stats as scipy_stats

from persistworld_cli.evaluation.action_following import commands_of, following_result, partners, wrong_kinds
from persistworld_cli.evaluation.report import percentile_picks
from persistworld_cli.evaluation.results import CEILING, FLOOR, EvalData, build_result
from persistworld_cli.evaluation.uncertainty import NEEDED, seed_variance, uncertainty_result
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.reports.tables import diagnostics_table, plain
from persistworld_cli.rollout.closed_loop import ScoredRollout
from persistworld_cli.rollout.recording import Item, load_recording
from persistworld_cli.rollout.scoring import PLAIN
from persistworld_cli.statistics.paired import spearman

STEPS, FRESH, CAMERAS, EPISODES = 3, 4, 3, 8
NAMES = ("ssim", "psnr", "lpips", "psnr_moving")


def rollout(item: Item, level: np.ndarray) -> ScoredRollout:
    """Every score of every camera is ``level`` (F,)."""
    score = np.repeat(level[:, None], CAMERAS, axis=1).astype(np.float32)
    return ScoredRollout(item, np.ones(len(level), bool), dict.fromkeys(NAMES, score), None, 1.0)


def made_up(tmp_path: Path, seeds: tuple[int, ...] = (0, 1)) -> EvalData:
    """Eight episodes; PSNR falls by 1 dB a second, 2 dB less under swapped actions, and alike under none.

    The seeds lie further apart the worse a start is.
    """
    s = settings(tmp_path, steps=STEPS, seeds=seeds, following=("swapped", "null"), following_steps=2)
    items = [Item(str(episode), 0, seed) for episode in range(EPISODES) for seed in seeds]
    times = (np.arange(STEPS * FRESH) + 1) / 5.0
    own = [rollout(item, 30.0 - times - int(item.episode)) for item in items]
    worse = [rollout(item, 28.0 - times - int(item.episode)) for item in items]

    def latents(label: str, item: Item) -> np.ndarray:
        shape = (STEPS, FRESH + 1, 4, 2 * CAMERAS, 2)
        growth = (1 + np.arange(STEPS)).reshape(-1, 1, 1, 1, 1)
        return (item.seed * (1 + int(item.episode)) * growth * np.ones(shape)).astype(np.float16)

    return EvalData(
        settings=s,
        items=items,
        models=[{"label": "base"}],
        rollouts={FLOOR: own, "base": own, CEILING: own},
        wrong={"base": {"swapped": worse, "null": own}},
        latents=latents,
        draw=lambda item: pytest.fail("no image is looked at"),
        scorer=Scorer(s.rewards, s.world, "cpu", names=("ssim", "psnr", "lpips")),
        scoring=PLAIN,
        protocol={"hash": ""},
        benchmark=None,
        provenance={},
    )


def test_following_says_how_much_wrong_actions_cost(tmp_path: Path) -> None:
    told = following_result(made_up(tmp_path))
    rows = {(row["actions"], row["cameras"]): row for row in told["rows"] if row["metric"] == told["metric"]}
    swapped, null = rows["swapped", "wrist"], rows["null", "wrist"]
    assert told["metric"] == "psnr (moving)" and told["steps"] == 2
    assert swapped["margin"] == pytest.approx(2.0, abs=1e-5) and swapped["verdict"] == "follows"
    assert swapped["low"] == pytest.approx(2.0, abs=1e-5) and swapped["wins"] == 16
    assert null["margin"] == 0 and null["verdict"] == "not shown"


def test_conduct_in_the_table(tmp_path: Path) -> None:
    data = made_up(tmp_path)
    no_fvd = {"label": "", "rows": [], "note": ""}
    result = build_result(
        data, {"action_following": following_result(data), "uncertainty": uncertainty_result(data), "fvd": no_fvd}
    )
    drift = result["drift_per_s"]["exterior"]["psnr"]["base"]
    assert drift["mean"] == pytest.approx(-1.0, abs=1e-4) and drift["low"] == pytest.approx(-1.0, abs=1e-4)
    text = plain(diagnostics_table(result))
    assert "-1.00 [-1.00, -1.00]" in text and "+2.00 [+2.00, +2.00]" in text and "rho" in text
    assert "follows" in text and "not shown" in text
    few = replace(data, settings=replace(data.settings, eval=replace(data.settings.eval, following=())), wrong={})
    result |= {"action_following": following_result(few), "uncertainty": uncertainty_result(made_up(tmp_path, (0,)))}
    text = " ".join(plain(diagnostics_table(result)).split())  # the caption is wrapped
    assert "not requested" in text and NEEDED in text and "rho" not in text


def test_uncertainty_is_the_rank_correlation_of_variance_and_error(tmp_path: Path) -> None:
    told = uncertainty_result(made_up(tmp_path))
    assert told["seeds"] == 2 and told["pairs"] == EPISODES and told["note"] == ""
    row = next(row for row in told["rows"] if row["cameras"] == "wrist")
    variance = np.array([[(1 + e) ** 2 * (1 + s) ** 2 / 2 for s in range(STEPS)] for e in range(EPISODES)])
    np.testing.assert_allclose(row["points"]["variance"], variance, rtol=1e-2)
    want = scipy_stats.spearmanr(variance.ravel(), row["points"]["error"].ravel()).statistic
    assert row["rho"] == pytest.approx(want) and row["low"] <= row["rho"] <= row["high"]
    assert row["within_step"] == pytest.approx(1.0)  # the worse start is the less certain one at every step
    assert uncertainty_result(made_up(tmp_path, (0,)))["note"] == NEEDED


def test_variance_between_seeds_is_per_step_and_camera() -> None:
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(4, 2, 5, 3, 6, 2))
    got = seed_variance(latents, 3)
    want = latents[:, 1, 1:, :, 2:4].var(axis=0, ddof=1).mean()
    assert got.shape == (2, 3) and got[1, 1] == pytest.approx(want)


def test_spearman_is_scipys() -> None:
    rng = np.random.default_rng(1)
    a = rng.integers(0, 6, 40).astype(float)  # with ties
    b = a + rng.normal(size=40)
    assert spearman(a, b) == pytest.approx(scipy_stats.spearmanr(a, b).statistic)
    a[3] = math.nan
    kept = np.isfinite(a)
    assert spearman(a, b) == pytest.approx(scipy_stats.spearmanr(a[kept], b[kept]).statistic)
    assert math.isnan(spearman(np.ones(5), np.arange(5.0))) and math.isnan(spearman(a[:2], b[:2]))


def test_wrong_actions_start_where_the_recording_does(tmp_path: Path) -> None:
    store = make_world(tmp_path, {"9": 14, "19": 7})
    items = [Item("9", 2, 0), Item("9", 2, 1), Item("19", 2, 0)]
    assert partners(items) == {"9": "19", "19": "9"} and partners(items[:2]) == {}
    assert wrong_kinds(("swapped", "null"), items[:2]) == ["null"]
    recording = load_recording(store, "val", items[0], steps=2, num_frames=5)
    other = store.annotation("val", "19").states
    held = commands_of("null", store, "val", items)(recording)
    swapped = commands_of("swapped", store, "val", items)(recording)
    own = recording.annotation.states
    assert held.shape == swapped.shape == (9, 7) and (held == own[2]).all()
    np.testing.assert_array_equal(swapped, np.concatenate([own[2:3], other[[3, 4, 5, 6, 6, 6, 6, 6]]]))
    driven = replace(recording, commanded=swapped)
    np.testing.assert_array_equal(driven.poses(1, 5), swapped[4:9])
    np.testing.assert_array_equal(driven.poses(0, 5)[0], recording.poses(0, 5)[0])


def test_the_animation_shows_the_median_and_a_hard_episode_by_the_baseline_s_loss(tmp_path: Path) -> None:
    data = made_up(tmp_path)  # episode 7 is the worst, seeds 0 and 1 of each
    assert percentile_picks(data) == [("median", 8), ("90th percentile", 12)]  # episodes 4 and 6 of 0 .. 7, first seed
    assert percentile_picks(replace(data, items=data.items[:2], rollouts={"base": data.rollouts["base"][:2]})) == [
        ("median", 0)
    ]
