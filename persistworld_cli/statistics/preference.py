"""Statistics of people's preferences: preference rate, Elo ratings of models, agreement between raters.

Shape legend: N items rated, K categories, M models, E episodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from persistworld_cli.statistics.paired import FEWEST, FloatArray, Paired, compare

ELO_MEAN = 1500.0
_ITERATIONS = 500  # of the fit below; two models need one, five on a chain under 100


def preference(scores: FloatArray, episodes: Sequence[str], *, samples: int = 2000, seed: int = 0) -> Paired:
    """How often the new model is preferred.

    Args:
        scores: (n,) one number per response: 1 the new model, 0 the baseline, 1/2 cannot tell.
        episodes: n episode ids; responses about one episode resemble each other.
        samples, seed: of the bootstrap.

    Returns:
        ``win_rate`` is the preference rate with its Wilson interval over responses, ``sign_p`` the two-sided binomial p
        of the decided ones, ``(1 + change) / 2`` the rate again with its interval over episodes; ``verdict`` and
        ``words`` rest on episodes.
    """
    return compare(1 - scores, scores, episodes, higher_is_better=True, samples=samples, seed=seed)


def fleiss_kappa(counts: NDArray[np.int64]) -> float:
    """Fleiss' kappa: agreement of raters beyond chance; 1 at most, 0 at chance.

    Fleiss, Psychological Bulletin 76 (1971), eq. 4-7, in the form for any number of raters per item; items with fewer
    than two responses are left out.

    Args:
        counts: (N, K) how many raters put each item into each category.

    Returns:
        NaN if undefined: no item has two responses, or all responses are in one category.
    """
    counts = np.asarray(counts, dtype=np.float64)
    counts = counts[counts.sum(axis=1) >= 2]
    if not len(counts):
        return math.nan
    raters = counts.sum(axis=1)
    agreed = ((counts**2).sum(axis=1) - raters) / (raters * (raters - 1))
    shares = counts.sum(axis=0) / raters.sum()
    chance = float((shares**2).sum())
    return math.nan if chance >= 1 else (float(agreed.mean()) - chance) / (1 - chance)


def kappa_words(kappa: float) -> str:
    """A kappa in words, by Landis and Koch (Biometrics 33, 1977); "-" for NaN."""
    if math.isnan(kappa):
        return "-"
    if kappa < 0:
        return "less than chance"
    names = ("slight", "fair", "moderate", "substantial", "almost perfect")
    return names[min(4, max(0, math.ceil(kappa * 5 - 1e-9) - 1))]


def elo(wins: FloatArray) -> FloatArray:
    """Elo ratings by maximum likelihood (Bradley-Terry), independent of the order of the games.

    A model that is 400 points ahead is preferred 10 times of 11. One drawn game is added to every pair that met, so
    that a model that won every game has a finite rating. Models that no chain of games connects are rated separately.

    Args:
        wins: (..., M, M) games that the row's model won against the column's; a draw counts as half a win for both.

    Returns:
        (..., M), with mean 1500 among models that are connected.
    """
    met = (wins + np.swapaxes(wins, -1, -2)) > 0
    won = wins + 0.5 * met
    games = won + np.swapaxes(won, -1, -2)
    strength = np.ones(wins.shape[:-1])
    for _ in range(_ITERATIONS):  # Hunter, Annals of Statistics 32 (2004): the MM algorithm
        each = games / (strength[..., :, None] + strength[..., None, :])
        total = each.sum(axis=-1)
        strength = np.where(total > 0, won.sum(axis=-1) / np.where(total > 0, total, 1), 1.0)
        strength /= np.exp(np.log(strength).mean(axis=-1, keepdims=True))
    ratings = 400 * np.log10(strength)
    together = np.asarray(met.reshape(-1, *met.shape[-2:]).any(axis=0))
    for members in islands(together):
        ratings[..., members] -= ratings[..., members].mean(axis=-1, keepdims=True)
    return np.asarray(ratings + ELO_MEAN)


def islands(met: NDArray[np.bool_]) -> list[list[int]]:
    """Models that a chain of games connects; from (M, M), whether two met."""
    count, label = connected_components(met, directed=False)
    return [np.flatnonzero(label == index).tolist() for index in range(count)]


def elo_interval(wins: FloatArray, *, samples: int = 1000, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    """95% bootstrap interval of `elo` over episodes; NaN below 6 episodes, and where all episodes agree.

    Args:
        wins: (E, M, M) games of each episode.
        samples, seed: of the bootstrap.

    Returns:
        (low, high), each (M,).
    """
    count = len(wins)
    if count < FEWEST:
        return np.full(wins.shape[-1], np.nan), np.full(wins.shape[-1], np.nan)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=samples)
    ratings = elo(np.tensordot(draws.astype(np.float64), wins, axes=1))
    low, high = np.quantile(ratings, [0.025, 0.975], axis=0)
    empty = np.isclose(low, high)
    return np.where(empty, np.nan, low), np.where(empty, np.nan, high)
