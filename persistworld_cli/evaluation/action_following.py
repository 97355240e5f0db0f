"""Does a model follow its actions? Under wrong actions it should score worse against the record.

A model that ignores its actions scores the same under all actions. The margin is the score under the recorded actions
minus the score under wrong actions, from the same frame with the same noise:

- ``swapped``: the poses of the benchmark's next episode, from the same frame number on;
- ``null``: the pose of the start, held.

The first pose is always the episode's own. Shape legend: as in `recording`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.evaluation.results import EvalData, frame_scores
from persistworld_cli.rollout.closed_loop import Commands
from persistworld_cli.rollout.recording import Item, Recording, recorded_poses
from persistworld_cli.statistics.paired import compare, mean

NULL, SWAPPED = "null", "swapped"
HEADLINE = "psnr_moving"  # actions show there; most of the whole image is background


def partners(items: Sequence[Item]) -> dict[str, str]:
    """Episode -> the episode whose actions it gets (the next in the benchmark's order); {} for a single episode."""
    episodes = list(dict.fromkeys(item.episode for item in items))
    if len(episodes) < 2:
        return {}
    return dict(zip(episodes, [*episodes[1:], episodes[0]], strict=True))


def wrong_kinds(kinds: Sequence[str], items: Sequence[Item]) -> list[str]:
    """The kinds in ``eval.following`` that are possible: with a single episode, actions cannot be swapped."""
    return [kind for kind in kinds if kind != SWAPPED or partners(items)]


def commands_of(kind: str, store: EpisodeStore, split: str, items: Sequence[Item]) -> Commands:
    """Wrong poses (F + 1, D) for a recording: ``swapped`` or ``null``."""
    others = partners(items)

    def commands(recording: Recording) -> NDArray[np.float64]:
        count = len(recording.frame_ids) + 1
        if kind == NULL:
            return np.repeat(recording.pose[None], count, axis=0)
        states = store.annotation(split, others[recording.item.episode]).states
        return np.concatenate([recording.pose[None], recorded_poses(states, recording.item.start, 0, count)[1:]])

    return commands


def following_result(data: EvalData) -> dict[str, Any]:
    """Margins of every model, wrong action, camera group and metric, with intervals over episodes.

    Returns:
        ``{"steps", "kinds", "metric", "note", "rows": [{model, actions, cameras, metric, ...}]}``; ``kinds`` is empty
        where nothing was rolled out, and ``note`` gives the reason.
    """
    asked = data.settings.eval.following
    kinds = list(next(iter(data.wrong.values()), {}))
    if not kinds:
        note = "actions cannot be swapped with a single episode" if asked else "not requested (eval.following)"
        return {"steps": 0, "kinds": [], "metric": "", "note": note, "rows": []}
    steps = min(data.settings.eval.steps, data.settings.eval.following_steps)
    frames = slice(0, steps * (data.settings.model.num_frames - 1))
    rows = []
    for model, by_kind in data.wrong.items():
        for kind, rollouts in by_kind.items():
            for group, cameras in data.groups.items():
                for name, info in data.metrics.items():
                    own, wrong = (
                        mean(frame_scores(some, name, cameras)[:, frames], 1)
                        for some in (data.rollouts[model], rollouts)
                    )
                    samples, better_up = data.settings.eval.bootstrap, info.higher_is_better
                    pair = compare(wrong, own, data.episodes, higher_is_better=better_up, samples=samples)
                    rows.append(
                        {"model": model, "actions": kind, "cameras": group, "metric": info.label, **_margin(pair)}
                    )
    headline = data.metrics[HEADLINE].label
    return {"steps": steps, "kinds": kinds, "metric": headline, "note": _note(asked, kinds), "rows": rows}


def _margin(pair: Any) -> dict[str, Any]:
    """`compare`'s result for a model against itself, in words: the margin is the change."""
    verdicts = {"better": "follows", "worse": "better under wrong actions", "undecided": "not shown"}
    return {
        "margin": pair.change,
        "low": pair.change_low,
        "high": pair.change_high,
        "wins": pair.wins,
        "rollouts": pair.rollouts,
        "episodes": pair.episodes,
        "sign_p": pair.sign_p,
        "wilcoxon_p_episodes": pair.wilcoxon_p_episodes,
        "verdict": verdicts.get(pair.verdict, pair.verdict),
    }


def _note(asked: Sequence[str], kinds: Sequence[str]) -> str:
    left = [kind for kind in asked if kind not in kinds]
    return f"{', '.join(left)}: needs a second episode" if left else ""
