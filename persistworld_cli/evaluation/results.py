"""From finished rollouts to numbers.

Shape legend: I rollouts, F frames, V cameras.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.settings import Settings
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.files import jsonable
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.rollout.closed_loop import ScoredRollout, reward_of
from persistworld_cli.rollout.images import draw_frames
from persistworld_cli.rollout.recording import Item, Recording, load_recording
from persistworld_cli.rollout.scoring import MetricInfo, ScoringOptions, metric_infos
from persistworld_cli.statistics.paired import cluster_bootstrap, compare, mean

FloatArray = NDArray[np.float64]
TABLE_ORDER = ("ssim", "psnr", "lpips")  # then what else there is


@dataclass(frozen=True)
class EvalData:
    """Everything the report is made from.

    Attributes:
        settings: resolved settings.
        items: the rollouts.
        labels: the models' names, baseline first.
        rollouts: row of the table -> its rollouts in the order of ``items``; floor and ceiling among them.
        latents: (model label, item) -> predicted latents (S, L, C, h, w).
        floor, ceiling: names of those rows.
        scorer, scoring: the metrics.
        protocol, benchmark, models, provenance: what the numbers were made with (`protocol`).
        wrong: model -> wrong actions -> its rollouts under them (`following`).
    """

    settings: Settings
    items: list[Item]
    labels: list[str]
    rollouts: dict[str, list[ScoredRollout]]
    latents: Callable[[str, Item], NDArray[np.float16]]
    floor: str
    ceiling: str
    scorer: Scorer
    scoring: ScoringOptions
    protocol: dict[str, Any]
    benchmark: dict[str, Any] | None
    models: list[dict[str, Any]]
    provenance: dict[str, Any]
    wrong: dict[str, dict[str, list[ScoredRollout]]]

    def draw(
        self, item: Item, store: EpisodeStore, painter: Callable[[str], WorldModel]
    ) -> tuple[Recording, dict[str, NDArray[np.uint8]]]:
        """A rollout's recording, and each model's frames (n, V, H, W, 3) of it as far as was recorded.

        Args:
            item: which rollout.
            store: for the recorded frames.
            painter: model's label -> the model whose VAE draws its images.
        """
        settings = self.settings
        recording = load_recording(store, settings.eval.split, item, settings.eval.steps, settings.model.num_frames)
        length = int(recording.valid.sum())
        drawn = {
            label: draw_frames(painter(label), self.latents(label, item), settings.sampling, recording.size)[:length]
            for label in self.labels
        }
        return recording, drawn

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """Camera groups that have cameras."""
        world = self.settings.world
        return {name: cams for name, cams in (("exterior", world.exterior), ("wrist", world.wrist)) if cams}

    @property
    def metrics(self) -> dict[str, MetricInfo]:
        """Metrics in the order of tables."""
        infos = metric_infos(self.scorer, self.scoring)
        order = [name for name in TABLE_ORDER if name in infos]
        return {name: infos[name] for name in [*order, *(name for name in infos if name not in order)]}

    def stacked(self, row: str, name: str) -> FloatArray:
        """Scores (I, F, V) of one row of the table."""
        return np.stack([rollout.scores[name] for rollout in self.rollouts[row]]).astype(np.float64)

    def frames(self, row: str, name: str, cameras: Sequence[int]) -> FloatArray:
        """Mean over some cameras: (I, F)."""
        return mean(self.stacked(row, name)[..., list(cameras)], axis=-1)

    def rewards(self, row: str, cameras: Sequence[int] | None = None) -> FloatArray:
        """Reward of every rollout (I,): the training reward, or its mean over some cameras."""
        names = list(self.scorer.weights)
        scores = {name: self.stacked(row, name).astype(np.float32) for name in names}
        if cameras is None:
            return reward_of(self.scorer, scores)
        total = sum(self.scorer.weights[name] * self.frames(row, name, cameras) for name in names)
        return mean(np.asarray(total), axis=1)


# -- numbers ------------------------------------------------------------------------------------------------------


def build_result(data: EvalData, extra: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers as one dictionary that JSON can hold (NaN becomes None).

    Args:
        data: finished rollouts.
        extra: entries made from them elsewhere (`following`, `trust`).
    """
    settings, episodes = data.settings, [item.episode for item in data.items]
    rows, metrics = list(data.rollouts), data.metrics
    horizon_length = data.stacked(rows[0], next(iter(metrics))).shape[1]
    rate = settings.world.rate_hz
    result = {
        "kind": "eval",
        "benchmark": data.benchmark,
        "n": {
            "rollouts": len(data.items),
            "episodes": len(set(episodes)),
            "steps": settings.eval.steps,
            "frames_per_step": settings.model.num_frames - 1,
            "rate_hz": rate,
            "sampler": settings.sampling.sampler,
            "sampling_steps": settings.sampling.steps,
        },
        "metrics": [{"name": name, **asdict(info)} for name, info in metrics.items()],
        "groups": list(data.groups),
        "floor": data.floor,
        "ceiling": data.ceiling,
        "models": data.models,
        "table": [_table_row(data, group, cams, row) for group, cams in data.groups.items() for row in rows],
        "cameras": [
            _table_row(data, camera, (index,), row)
            for index, camera in enumerate(settings.world.cameras)
            for row in rows
        ],
        "reward": {row: _mean1(data.rewards(row)) for row in rows},
        "paired": _paired(data, episodes),
        "changes": _changes(data),
        "rollouts": _by_rollout(data),
        "times_s": [(frame + 1) / rate for frame in range(horizon_length)],
        "horizon": {group: _horizon(data, cams, episodes) for group, cams in data.groups.items()},
        "drift_per_s": _drift(data, rate, episodes),
        **extra,
        "seconds_per_rollout": {
            label: float(np.mean([r.seconds for r in data.rollouts[label]])) for label in data.labels
        },
        "protocol": data.protocol,
        **data.provenance,
    }
    cleaned = jsonable(result)
    assert isinstance(cleaned, dict)
    return cleaned


def _table_row(data: EvalData, group: str, cameras: Sequence[int], row: str) -> dict[str, Any]:
    """Means over rollouts (each the mean of its frames), by label."""
    values = {
        info.label: float(_mean1(mean(data.frames(row, name, cameras), 1))) for name, info in data.metrics.items()
    }
    return {"cameras": group, "model": row, **values}


def _mean1(values: FloatArray) -> float:
    return float(mean(values, 0))


def _paired(data: EvalData, episodes: list[str]) -> list[dict[str, Any]]:
    """Statistics of every metric in every camera group, and of the reward; [] without a comparison."""
    if len(data.labels) < 2:
        return []
    base, new = data.labels[:2]
    samples = data.settings.eval.bootstrap
    out = []
    for group, cams in data.groups.items():
        for name, info in data.metrics.items():
            a, b = (mean(data.frames(row, name, cams), 1) for row in (base, new))
            pair = compare(a, b, episodes, higher_is_better=info.higher_is_better, samples=samples)
            out.append({"cameras": group, "metric": info.label, **pair.as_dict()})
    for group, some in [*data.groups.items(), ("all", None)]:
        pair = compare(
            data.rewards(base, some), data.rewards(new, some), episodes, higher_is_better=True, samples=samples
        )
        out.append({"cameras": group, "metric": "reward", **pair.as_dict()})
    return out


def _changes(data: EvalData) -> dict[str, dict[str, list[float]]]:
    """new - base of every rollout, in the order of the items."""
    if len(data.labels) < 2:
        return {}
    base, new = data.labels[:2]
    return {
        group: {
            info.label: (mean(data.frames(new, name, cams), 1) - mean(data.frames(base, name, cams), 1)).tolist()
            for name, info in data.metrics.items()
        }
        for group, cams in data.groups.items()
    }


def _horizon(data: EvalData, cameras: Sequence[int], episodes: list[str]) -> dict[str, Any]:
    """label -> row -> mean, low, high over the horizon; each episode counts by its rollouts."""
    out: dict[str, Any] = {}
    for name, info in data.metrics.items():
        out[info.label] = {}
        for row in data.rollouts:
            values = data.frames(row, name, cameras)
            low, high = cluster_bootstrap(values, episodes, samples=data.settings.eval.bootstrap)
            out[info.label][row] = {"mean": mean(values, 0).tolist(), "low": low.tolist(), "high": high.tolist()}
    return out


def _by_rollout(data: EvalData) -> dict[str, Any]:
    """Mean of every rollout in the order of the items: group -> label -> row -> (I,); what `comparing` pairs."""
    out: dict[str, Any] = {}
    for group, cams in data.groups.items():
        out[group] = {
            info.label: {row: mean(data.frames(row, name, cams), 1) for row in data.rollouts}
            for name, info in data.metrics.items()
        }
        out[group]["reward"] = {row: data.rewards(row, cams) for row in data.rollouts}
    return out


def _drift(data: EvalData, rate: float, episodes: list[str]) -> dict[str, Any]:
    """How fast rollouts get worse: the least-squares slope of each over the horizon, a second; mean, low, high."""
    out: dict[str, Any] = {}
    for group, cams in data.groups.items():
        out[group] = {}
        for name, info in data.metrics.items():
            out[group][info.label] = {}
            for row in data.rollouts:
                slopes = np.array([slope(curve, rate) for curve in data.frames(row, name, cams)])
                low, high = cluster_bootstrap(slopes, episodes, samples=data.settings.eval.bootstrap)
                out[group][info.label][row] = {"mean": _mean1(slopes), "low": float(low), "high": float(high)}
    return out


def slope(curve: FloatArray, rate: float) -> float:
    """Least-squares slope a second of a curve (F,) sampled at ``rate`` Hz, NaN left out; NaN below 2 points."""
    there = np.isfinite(curve)
    if there.sum() < 2:
        return math.nan
    times = (np.arange(curve.size) + 1) / rate
    return float(np.polyfit(times[there], curve[there], 1)[0])
