"""Paired statistics against hand-computed and textbook values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from persistworld_cli.statistics.paired import (
    bootstrap_interval,
    cluster_bootstrap,
    compare,
    episode_means,
    mean,
    sign_test,
    wilcoxon,
    wilson,
)


def test_wilson_against_published_values() -> None:
    low, high = wilson(81, 263)  # Newcombe 1998, table I: 0.2553, 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 20)[0] == 0.0 and wilson(0, 20)[1] == pytest.approx(0.1611, abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(3.5, 7)[0] + wilson(3.5, 7)[1] == pytest.approx(1.0)


def test_sign_test_by_hand() -> None:
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(6, 0) == pytest.approx(2 / 64)
    assert sign_test(3, 1) == pytest.approx(2 * (1 + 4) / 16)
    assert sign_test(0, 0) == 1.0


def test_wilcoxon_by_hand() -> None:
    assert wilcoxon(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])) == pytest.approx(2 / 64)
    assert wilcoxon(np.array([0.0, 0.0])) == 1.0
    assert wilcoxon(np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])) == pytest.approx(2 / 64)


def test_definitions_are_scipys() -> None:
    rng = np.random.default_rng(3)
    for wins, n in ((0, 9), (3, 9), (9, 9), (81, 263)):
        interval = scipy_stats.binomtest(wins, n).proportion_ci(method="wilson")
        assert wilson(wins, n) == pytest.approx((interval.low, interval.high), abs=1e-12)
        assert sign_test(wins, n - wins) == pytest.approx(scipy_stats.binomtest(wins, n, 0.5).pvalue)
    for n in (7, 12, 60):
        apart = rng.normal(0.3, 1.0, n)
        assert wilcoxon(apart) == pytest.approx(scipy_stats.wilcoxon(apart, zero_method="wilcox").pvalue)
    signs = np.array(list(itertools.product((-1, 1), repeat=7)))  # every way that chance could fall
    apart = np.array([0.5, -0.1, 1.2, 0.9, -0.3, 2.0, 0.7])
    ranks = scipy_stats.rankdata(np.abs(apart))
    totals = np.minimum((signs > 0) @ ranks, (signs < 0) @ ranks)
    assert wilcoxon(apart) == pytest.approx((totals <= min((apart > 0) @ ranks, (apart < 0) @ ranks)).mean())


def test_bootstrap_agrees_with_scipys_percentiles() -> None:
    values = np.random.default_rng(5).normal(size=25)
    names = [str(i) for i in range(25)]
    theirs = scipy_stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, random_state=0)
    own = cluster_bootstrap(values, names, samples=20000)
    assert own == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)
    rows = bootstrap_interval(lambda picked: float(values[picked].mean()), names, samples=4000)
    assert rows == pytest.approx(tuple(theirs.confidence_interval), abs=0.04)
    assert all(math.isnan(edge) for edge in bootstrap_interval(lambda picked: 1.0, ["a", "a"]))


def test_means_leave_nan_out() -> None:
    values = np.array([[1.0, math.nan], [3.0, math.nan]])
    assert mean(values, 0)[0] == 2.0 and math.isnan(mean(values, 0)[1])
    names, per_episode = episode_means(np.array([1.0, 3.0, 10.0, math.nan]), ["b", "b", "a", "a"])
    assert names == ["b", "a"] and per_episode.tolist() == [2.0, 10.0]


def test_bootstrap_resamples_episodes_not_rollouts() -> None:
    rng = np.random.default_rng(0)
    level = np.repeat(rng.normal(size=20), 10)  # ten equal rollouts an episode: 20 independent numbers, not 200
    episodes = [str(i // 10) for i in range(200)]
    low, high = cluster_bootstrap(level, episodes, samples=4000)
    alone_low, alone_high = cluster_bootstrap(level, [str(i) for i in range(200)], samples=4000)
    ratio = float((high - low) / (alone_high - alone_low))
    assert 2.6 < ratio < 3.8  # sqrt(10) = 3.16
    expected = 2 * 1.96 * level.std() / math.sqrt(20)
    assert float(high - low) == pytest.approx(expected, rel=0.1)


def test_bootstrap_of_curves_with_missing_ends() -> None:
    curves = np.array([[1.0, 2.0, math.nan], [3.0, math.nan, math.nan]])
    low, high = cluster_bootstrap(curves, ["a", "b"], samples=200)
    assert low.shape == (3,) and low[0] == 1.0 and high[0] == 3.0
    assert low[1] == high[1] == 2.0 and math.isnan(low[2])
    again = cluster_bootstrap(curves, ["a", "b"], samples=200)
    np.testing.assert_array_equal(again, (low, high))


def test_compare_better_worse_and_direction() -> None:
    episodes = [str(i) for i in range(8)]
    base = np.linspace(20, 22, 8)
    gain = 0.5 + 0.1 * np.arange(8)
    up = compare(base, base + gain, episodes, higher_is_better=True, samples=500)
    assert (up.wins, up.losses, up.win_rate, up.verdict) == (8, 0, 1.0, "better")
    assert up.change == pytest.approx(gain.mean()) and up.change_low > 0.5
    assert up.sign_p == pytest.approx(2 / 256) and up.wilcoxon_p_episodes == pytest.approx(2 / 256)
    down = compare(base, base + gain, episodes, higher_is_better=False, samples=500)
    assert (down.wins, down.verdict) == (0, "worse") and down.change == up.change


def test_compare_says_when_it_cannot_tell() -> None:
    few = compare(np.zeros(5), np.ones(5), list("abcde"), higher_is_better=True, samples=100)
    assert few.verdict == "too few" and "5 episodes" in few.words and "6% of the time" in few.words
    one = compare(np.zeros(8), np.ones(8), ["a"] * 8, higher_is_better=True, samples=100)
    assert one.verdict == "too few" and one.wins == 8 and one.episodes == 1  # many rollouts of one episode are one
    noise = np.array([1.0, -1.1, 0.9, -1.0, 1.2, -0.8, 0.7, -0.9])
    same = compare(np.zeros(8), noise, list("abcdefgh"), higher_is_better=True, samples=300)
    assert same.verdict == "undecided" and "no difference shown" in same.words


def test_compare_ties_and_missing_pairs() -> None:
    nan = math.nan
    pair = compare(np.array([1.0, 1.0, nan]), np.array([1.0, 2.0, 5.0]), list("abc"), higher_is_better=True, samples=50)
    assert (pair.rollouts, pair.wins, pair.losses, pair.ties, pair.win_rate) == (2, 1, 0, 1, 0.75)
    none = compare(np.array([nan]), np.array([1.0]), ["a"], higher_is_better=True)
    assert none.rollouts == 0 and none.verdict == "too few" and math.isnan(none.change)
