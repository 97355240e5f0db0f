"""Rewards of a group of candidates -> advantages, optimality and the kept candidates (method.md section 4, step 3).

Shape legend: G groups (start states), K candidates of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from persistworld_cli.errors import UsageError


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """``(R - mean) / (std + eps)`` in each group, with the population's std (DiffusionNFT's code).

    Args:
        rewards: (G, K), or (G, K, ...) with rewards of parts of a candidate, each compared with the same part. All
            parts of a group share one std (root mean square over the parts), so that a part in which the candidates
            hardly differ hardly counts (ours).
        eps: gives a group of equal rewards 0 instead of 0/0.

    Returns:
        The same shape; mean 0 over the candidates.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    spread = centred.square().flatten(1).mean(dim=1).sqrt()
    return centred / (spread.view(-1, *[1] * (rewards.ndim - 1)) + eps)


def optimality(advantages: Tensor, clip: float = 1.0) -> Tensor:
    """``r = (clip(A, -c, c)/c + 1)/2`` in [0, 1]: how far a candidate is pulled towards (1) or pushed away from (0)."""
    return (advantages.clamp(-clip, clip) / clip + 1.0) / 2.0


def keep_extremes(rewards: Tensor, best: int, worst: int) -> Tensor:
    """The candidates of each group that the update uses.

    Args:
        rewards: (G, K).
        best, worst: how many of the highest and of the lowest rewards.

    Returns:
        (G, best + worst) int64 candidate indices: the best from the top down, then the worst from the bottom up.
        Equal rewards are ordered by index, so that every process and run picks the same ones.

    Raises:
        UsageError: more than there are candidates, or none at all.
    """
    candidates = rewards.shape[1]
    if best < 0 or worst < 0 or not 0 < best + worst <= candidates:
        raise UsageError(
            f"cannot keep {best} best and {worst} worst of {candidates} candidates",
            where="post_train.keep_best, keep_worst, candidates",
            fix="keep at least one and at most `candidates` in all",
        )
    order = torch.sort(rewards, dim=1, descending=True, stable=True).indices
    return torch.cat([order[:, :best], order[:, candidates - worst :].flip(1)], dim=1)


def credit_map(optimality: Tensor, weights: Tensor, size: tuple[int, int]) -> Tensor:
    """Optimality of image parts, for each latent pixel (ours).

    Args:
        optimality: (M, N, V, rows, columns) of N frames and V cameras.
        weights: (V,) of the cameras; those with 0 teach nothing (at r = 1/2 both branches cancel).
        size: (h1, w) of one camera's latent.

    Returns:
        (M, 1 + N, 1, V * h1, w); the first frame, which is not scored, gets 1/2.
    """
    count, frames, views = optimality.shape[:3]
    used = torch.where(weights.view(1, 1, -1, 1, 1) > 0, optimality, 0.5)
    fine = functional.interpolate(used.flatten(0, 1), size=size, mode="nearest").unflatten(0, (count, frames))
    stacked = fine.reshape(count, frames, 1, views * size[0], size[1])
    return functional.pad(stacked, (0, 0, 0, 0, 0, 0, 1, 0), value=0.5)
