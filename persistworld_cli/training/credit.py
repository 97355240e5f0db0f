"""Who gets the credit: from scored candidates to each one's optimality r in [0, 1], whole or by place.

The paper gives a candidate one number. A candidate is good in one corner and bad in another, though, and a group of 8
cannot tell which corner made the difference; finer credit compares each frame, camera and patch with the same part of
the other candidates (ours).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from persistworld_cli.config.settings import PostTrainSettings
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.objective.advantage import credit_map, group_advantages, optimality
from persistworld_cli.training.candidates import Candidates


def credit(
    made: Candidates, scorer: Scorer, options: PostTrainSettings, whole: Callable[[Tensor], Tensor] = lambda part: part
) -> Tensor:
    """Optimality of every candidate, for `objective.nft.nft_loss`.

    Args:
        made: candidates; their reward is of all K of a group, the rest of those that this rank drew.
        scorer, options: how they are scored and credited.
        whole: values of this rank's candidates -> of all of their groups (`sharing.Share.whole`).

    Returns:
        (G * K,) by ``rollout``, (G * K, F, L, 1, h, w) by ``frame`` and ``patch``.
    """
    groups, candidates = made.reward.shape
    if options.credit == "rollout":
        return optimality(group_advantages(made.reward), options.adv_clip).flatten()
    if options.credit == "frame":
        local = whole(scorer.by_image(made.metrics))[..., None, None]
    else:
        rows, columns = options.credit_grid
        local = whole(scorer.local(made.images, made.recorded, (rows, columns)))
    advantage = group_advantages(local.unflatten(0, (groups, candidates)))
    r = optimality(advantage, options.adv_clip).flatten(0, 1)  # (G * K, F * (L - 1), V, rows, columns)
    height, width = made.x0[0].shape[-2:]
    size = (height // r.shape[2], width)
    chunks = r.unflatten(1, (options.chunks, -1)).unbind(1)
    return torch.stack([credit_map(chunk, scorer.camera_weights, size) for chunk in chunks], dim=1)
