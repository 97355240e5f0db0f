from __future__ import annotations

from typing import Any

from persistworld_cli.config.settings import PostTrainSettings


def small_groups(**options: Any) -> PostTrainSettings:
    """Post-training with the smallest group that has a better and a worse candidate."""
    return PostTrainSettings(groups=1, candidates=2, keep_best=1, keep_worst=1, **options)
