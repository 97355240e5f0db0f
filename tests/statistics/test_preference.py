"""Preference rate, Elo and Fleiss' kappa against numbers worked out by hand or printed in books."""

from __future__ import annotations

import math

import numpy as np
import pytest

from persistworld_cli.statistics.preference import elo, elo_interval, fleiss_kappa, islands, kappa_words, preference

# Fleiss 1971's table in the form of Wikipedia's "Fleiss' kappa": 14 raters, 10 subjects, 5 categories; kappa 0.210.
PRINTED = [
    [0, 0, 0, 0, 14],
    [0, 2, 6, 4, 2],
    [0, 0, 3, 5, 6],
    [0, 3, 9, 2, 0],
    [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0],
    [3, 2, 6, 3, 0],
    [2, 5, 3, 2, 2],
    [6, 5, 2, 1, 0],
    [0, 2, 2, 3, 7],
]


def test_fleiss_kappa_is_the_printed_one_and_the_one_by_hand() -> None:
    assert fleiss_kappa(np.array(PRINTED)) == pytest.approx(0.210, abs=5e-4)
    # Two raters, three things: agree on A, agree on B, differ. P = (1 + 1 + 0)/3, chance 1/4 + 1/4: (2/3 - 1/2)/(1/2).
    assert fleiss_kappa(np.array([[2, 0], [0, 2], [1, 1]])) == pytest.approx(1 / 3)
    # What one rater alone has judged says nothing about agreement.
    assert fleiss_kappa(np.array([[2, 0], [0, 2], [1, 1], [1, 0], [1, 0]])) == pytest.approx(1 / 3)
    # Three raters on one thing, two on another: P = ((9+0-3)/6 + 0)/2 = 1/2, shares 4/5 and 1/5: chance 17/25.
    assert fleiss_kappa(np.array([[3, 0], [1, 1]])) == pytest.approx((1 / 2 - 17 / 25) / (8 / 25))


def test_kappa_is_undefined_where_agreement_cannot_be_told_from_chance() -> None:
    assert math.isnan(fleiss_kappa(np.array([[3, 0], [2, 0]])))
    assert math.isnan(fleiss_kappa(np.array([[1, 0], [0, 1]])))
    assert math.isnan(fleiss_kappa(np.zeros((0, 3), np.int64)))
    words = [kappa_words(kappa) for kappa in (-0.1, 0.0, 0.2, 0.21, 0.6, 0.8, 1.0, math.nan)]
    assert words[:4] == ["less than chance", "slight", "slight", "fair"]
    assert words[4:] == ["moderate", "substantial", "almost perfect", "-"]


def test_elo_of_two_models_is_the_logarithm_of_their_odds() -> None:
    # 3 wins to 1 and one draw added: odds 3.5 to 1.5.
    apart = 400 * math.log10(3.5 / 1.5)
    assert elo(np.array([[0, 3.0], [1.0, 0]])) == pytest.approx([1500 + apart / 2, 1500 - apart / 2])
    assert elo(np.array([[0, 2.0], [2.0, 0]])) == pytest.approx([1500, 1500])
    assert np.isfinite(elo(np.array([[0, 50.0], [0, 0]]))).all()
    assert elo(np.array([[0, 999.5], [99.5, 0]])) @ [1, -1] == pytest.approx(400)  # ten to one: 400 points


def test_elo_of_a_chain_adds_up_and_unconnected_models_are_rated_apart() -> None:
    wins = np.zeros((3, 3))
    wins[0, 1], wins[1, 0], wins[1, 2], wins[2, 1] = 9.5, 0.5, 9.5, 0.5  # ten to one, twice
    ratings = elo(wins)
    assert ratings[0] - ratings[1] == pytest.approx(400, abs=0.1) and ratings.mean() == pytest.approx(1500)
    assert ratings[0] - ratings[2] == pytest.approx(800, abs=0.1)
    apart = np.zeros((4, 4))
    apart[0, 1], apart[2, 3] = 4, 2
    ratings = elo(apart)
    assert ratings[:2].mean() == pytest.approx(1500) and ratings[2:].mean() == pytest.approx(1500)
    assert islands(apart > 0) == [[0, 1], [2, 3]]


def test_elo_interval_spans_what_episodes_say() -> None:
    one, other = [[0, 3.0], [1.0, 0]], [[0, 1.0], [3.0, 0]]
    same = np.array([one] * 6)
    for nothing in (*elo_interval(same, samples=50), *elo_interval(np.array([one, other]), samples=50)):
        assert np.isnan(nothing).all()
    low, high = elo_interval(np.array([one, other] * 6), samples=400)
    assert low[0] < 1500 < high[0] and low[0] > 1400


def test_preference_counts_ties_half_and_rests_on_episodes() -> None:
    scores = np.array([1.0] * 8 + [0.5] * 2 + [0.0] * 2)  # 8 new, 2 neither, 2 base: 9 of 12
    found = preference(scores, [str(i) for i in range(12)])
    assert (found.wins, found.losses, found.ties, found.win_rate) == (8, 2, 2, 0.75)
    z2, n = 1.959964**2, 12
    centre, half = 0.75 + z2 / 2 / n, math.sqrt(z2) * math.sqrt(0.75 * 0.25 / n + z2 / 4 / n**2)
    assert (found.win_low, found.win_high) == pytest.approx(
        ((centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)), abs=1e-5
    )
    assert found.sign_p == pytest.approx(2 * (1 + 10 + 45) / 1024)  # 8 or more of 10, both sides
    assert preference(np.ones(40), ["9"] * 40).verdict == "too few"
    assert preference(np.ones(12), [str(i) for i in range(12)]).verdict == "better"
