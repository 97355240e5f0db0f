"""Compute the numbers of a result from finished rollouts.

Shape legend: I rollouts, F frames, V cameras.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.settings import Settings
from persistworld_cli.files import jsonable
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.rollout.closed_loop import ScoredRollout, reward_of
from persistworld_cli.rollout.recording import Item, Recording
from persistworld_cli.rollout.scoring import MetricInfo, ScoringOptions, camera_groups, metric_infos
from persistworld_cli.statistics.paired import cluster_bootstrap, compare, mean

FloatArray = NDArray[np.float64]
FLOOR, CEILING = "copy first frame", "recording through VAE"
ALL = "all"  # the group of all cameras: the reward alone is a mean over it
Cameras = Sequence[int]
Drawn = tuple[Recording, dict[str, NDArray[np.uint8]]]  # a recording, and each model's frames (n, V, H, W, 3) of it
T = TypeVar("T")


def frame_scores(rollouts: Sequence[ScoredRollout], metric: str, cameras: Cameras) -> FloatArray:
    """Scores of rollouts, mean over some cameras: (I, F)."""
    scores = np.stack([rollout.scores[metric] for rollout in rollouts]).astype(np.float64)
    return mean(scores[..., list(cameras)], axis=-1)


@dataclass(frozen=True)
class EvalData:
    """Everything the report is made from.

    Attributes:
        settings: resolved settings.
        items: the rollouts.
        models: labels, paths and hashes, baseline first.
        rollouts: row of the table -> its rollouts in the order of ``items``; floor and ceiling among them.
        wrong: model -> wrong actions -> its rollouts under them (`action_following`).
        latents: (model label, item) -> predicted latents (S, L, C, h, w).
        draw: item -> its recording and every model's frames, as far as the recording goes.
        scorer, scoring: the metrics.
        protocol, benchmark, provenance: how the numbers were made (`protocol`).
    """

    settings: Settings
    items: list[Item]
    models: list[dict[str, Any]]
    rollouts: dict[str, list[ScoredRollout]]
    wrong: dict[str, dict[str, list[ScoredRollout]]]
    latents: Callable[[str, Item], NDArray[np.float16]]
    draw: Callable[[Item], Drawn]
    scorer: Scorer
    scoring: ScoringOptions
    protocol: dict[str, Any]
    benchmark: dict[str, Any] | None
    provenance: dict[str, Any]

    @property
    def labels(self) -> list[str]:
        """The models' names, baseline first."""
        return [model["label"] for model in self.models]

    @property
    def episodes(self) -> list[str]:
        """The episode of each rollout."""
        return [item.episode for item in self.items]

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """Camera groups that have cameras."""
        return camera_groups(self.settings.world)

    @property
    def metrics(self) -> dict[str, MetricInfo]:
        """Metrics in the order of tables."""
        return metric_infos(self.scorer, self.scoring)

    def frames(self, row: str, metric: str, cameras: Cameras) -> FloatArray:
        """Scores of a row of the table, mean over some cameras: (I, F)."""
        return frame_scores(self.rollouts[row], metric, cameras)

    def means(self, row: str, metric: str, cameras: Cameras) -> FloatArray:
        """Mean of every rollout over its frames and some cameras: (I,)."""
        return mean(self.frames(row, metric, cameras), 1)

    def rewards(self, row: str, cameras: Cameras | None = None) -> FloatArray:
        """Reward of every rollout (I,): the training reward, or its mean over some cameras."""
        weights = self.scorer.weights
        if cameras is None:
            rollouts = self.rollouts[row]
            return reward_of(self.scorer, {name: np.stack([r.scores[name] for r in rollouts]) for name in weights})
        total = sum(weight * self.frames(row, name, cameras) for name, weight in weights.items())
        return mean(np.asarray(total), axis=1)

    def interval(self, values: FloatArray) -> dict[str, Any]:
        """Mean of values (I, ...) over rollouts and its 95% interval over episodes."""
        low, high = cluster_bootstrap(values, self.episodes, samples=self.settings.eval.bootstrap)
        return {"mean": mean(values, 0), "low": low, "high": high}

    def by_metric(self, number: Callable[[str, Cameras], T]) -> dict[str, dict[str, T]]:
        """Camera group -> metric's label -> ``number(metric, cameras)``."""
        return {
            group: {info.label: number(name, cameras) for name, info in self.metrics.items()}
            for group, cameras in self.groups.items()
        }


def build_result(data: EvalData, extra: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers as one dictionary that JSON can hold (NaN becomes None).

    Args:
        data: finished rollouts.
        extra: entries computed elsewhere (`action_following`, `uncertainty`, `fvd`).
    """
    settings, rows, metrics = data.settings, list(data.rollouts), data.metrics
    rate, cameras = settings.world.rate_hz, settings.world.cameras
    pair = data.labels[:2] if len(data.labels) > 1 else []

    def changes(name: str, cams: Cameras) -> FloatArray:
        base, new = (data.means(label, name, cams) for label in pair)
        return new - base

    def horizon(name: str, cams: Cameras) -> dict[str, Any]:
        return {row: data.interval(data.frames(row, name, cams)) for row in rows}

    def drift(name: str, cams: Cameras) -> dict[str, Any]:
        return {
            row: data.interval(np.array([slope(curve, rate) for curve in data.frames(row, name, cams)])) for row in rows
        }

    by_rollout: dict[str, dict[str, Any]] = {}  # each rollout's mean, in the order of the items: `comparing` pairs them
    by_rollout |= data.by_metric(lambda name, cams: {row: data.means(row, name, cams) for row in rows})
    for group, cams in data.groups.items():
        by_rollout[group]["reward"] = {row: data.rewards(row, cams) for row in rows}
    by_rollout[ALL] = {"reward": {row: data.rewards(row) for row in rows}}
    result = {
        "kind": "eval",
        "benchmark": data.benchmark,
        "n": {
            "rollouts": len(data.items),
            "episodes": len(set(data.episodes)),
            "steps": settings.eval.steps,
            "frames_per_step": settings.model.num_frames - 1,
            "rate_hz": rate,
            "sampler": settings.sampling.sampler,
            "sampling_steps": settings.sampling.steps,
        },
        "metrics": [{"name": name, **asdict(info)} for name, info in metrics.items()],
        "groups": list(data.groups),
        "floor": FLOOR,
        "ceiling": CEILING,
        "models": data.models,
        "table": [_table_row(data, group, cams, row) for group, cams in data.groups.items() for row in rows],
        "cameras": [_table_row(data, camera, (index,), row) for index, camera in enumerate(cameras) for row in rows],
        "reward": {row: mean(data.rewards(row), 0) for row in rows},
        "paired": _paired(data, *pair) if pair else [],
        "changes": data.by_metric(changes) if pair else {},
        "rollouts": by_rollout,
        "times_s": [(frame + 1) / rate for frame in range(settings.eval.steps * (settings.model.num_frames - 1))],
        "horizon": data.by_metric(horizon),
        "drift_per_s": data.by_metric(drift),
        **extra,
        "seconds_per_rollout": {label: np.mean([r.seconds for r in data.rollouts[label]]) for label in data.labels},
        "protocol": data.protocol,
        **data.provenance,
    }
    cleaned: dict[str, Any] = jsonable(result)
    return cleaned


def _table_row(data: EvalData, group: str, cameras: Cameras, row: str) -> dict[str, Any]:
    """Means over rollouts (each the mean of its frames), by label."""
    values = {info.label: mean(data.means(row, name, cameras), 0) for name, info in data.metrics.items()}
    return {"cameras": group, "model": row, **values}


def _paired(data: EvalData, base: str, new: str) -> list[dict[str, Any]]:
    """Statistics of every metric in every camera group, and of the reward."""

    def entry(group: str, metric: str, a: FloatArray, b: FloatArray, higher_is_better: bool) -> dict[str, Any]:
        samples = data.settings.eval.bootstrap
        pair = compare(a, b, data.episodes, higher_is_better=higher_is_better, samples=samples)
        return {"cameras": group, "metric": metric, **vars(pair)}

    metrics = [
        entry(group, info.label, data.means(base, name, cams), data.means(new, name, cams), info.higher_is_better)
        for group, cams in data.groups.items()
        for name, info in data.metrics.items()
    ]
    groups: list[tuple[str, Cameras | None]] = [*data.groups.items(), (ALL, None)]
    rewards = [
        entry(group, "reward", data.rewards(base, cams), data.rewards(new, cams), True) for group, cams in groups
    ]
    return metrics + rewards


def slope(curve: FloatArray, rate: float) -> float:
    """Least-squares slope per second of a curve (F,) sampled at ``rate`` Hz, NaN left out; NaN below 2 points."""
    there = np.isfinite(curve)
    if there.sum() < 2:
        return math.nan
    times = (np.arange(curve.size) + 1) / rate
    return float(np.polyfit(times[there], curve[there], 1)[0])
