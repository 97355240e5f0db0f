"""From finished rollouts to the result: numbers, tables, curves, sheets, videos, one page.

Shape legend: I rollouts, F frames, V cameras.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.settings import Settings
from persistworld_cli.data.store import EpisodeStore
from persistworld_cli.evaluation.closed_loop import Rollout, draw_frames, reward_of
from persistworld_cli.evaluation.metrics import MetricInfo, metric_infos
from persistworld_cli.evaluation.pictures import write_rollout_sheet, write_rollout_video
from persistworld_cli.evaluation.recording import Item, load_recording
from persistworld_cli.evaluation.stats import cluster_bootstrap, compare, mean
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.reports.csvs import write_csv
from persistworld_cli.reports.curves import change_plot, horizon_curves
from persistworld_cli.reports.page import write_page
from persistworld_cli.reports.tables import eval_table, plain, reward_words
from persistworld_cli.rewards.score import Scorer

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
        scorer: the metrics.
        protocol, models, device: provenance.
    """

    settings: Settings
    items: list[Item]
    labels: list[str]
    rollouts: dict[str, list[Rollout]]
    latents: Callable[[str, Item], NDArray[np.float16]]
    floor: str
    ceiling: str
    scorer: Scorer
    protocol: dict[str, Any]
    models: list[dict[str, str]]
    device: str

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """Camera groups that have cameras."""
        world = self.settings.world
        return {name: cams for name, cams in (("exterior", world.exterior), ("wrist", world.wrist)) if cams}

    @property
    def metrics(self) -> dict[str, MetricInfo]:
        """Metrics in the order of tables."""
        infos = metric_infos(self.scorer)
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


def build_result(data: EvalData) -> dict[str, Any]:
    """All numbers as one dictionary that JSON can hold (NaN becomes None)."""
    settings, episodes = data.settings, [item.episode for item in data.items]
    rows, metrics = list(data.rollouts), data.metrics
    horizon_length = data.stacked(rows[0], next(iter(metrics))).shape[1]
    rate = settings.world.rate_hz
    result = {
        "kind": "eval",
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
        "reward": {row: float(np.nanmean(data.rewards(row))) for row in rows},
        "paired": _paired(data, episodes),
        "changes": _changes(data),
        "times_s": [(frame + 1) / rate for frame in range(horizon_length)],
        "horizon": {group: _horizon(data, cams, episodes) for group, cams in data.groups.items()},
        "drift_per_s": _drift(data, rate),
        "seconds_per_rollout": {
            label: float(np.mean([r.seconds for r in data.rollouts[label]])) for label in data.labels
        },
        "protocol": data.protocol,
        "device": data.device,
        "versions": {name: version(name) for name in ("torch", "diffusers", "lpips", "scikit-image", "numpy")}
        | {"python": platform.python_version()},
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


def _drift(data: EvalData, rate: float) -> dict[str, Any]:
    """Slope of the horizon curve by least squares, a second: how fast a rollout gets worse."""
    out: dict[str, Any] = {}
    for group, cams in data.groups.items():
        out[group] = {}
        for name, info in data.metrics.items():
            out[group][info.label] = {row: slope(mean(data.frames(row, name, cams), 0), rate) for row in data.rollouts}
    return out


def slope(curve: FloatArray, rate: float) -> float:
    """Least-squares slope a second of a curve (F,) sampled at ``rate`` Hz, NaN left out; NaN below 2 points."""
    there = np.isfinite(curve)
    if there.sum() < 2:
        return math.nan
    times = (np.arange(curve.size) + 1) / rate
    return float(np.polyfit(times[there], curve[there], 1)[0])


def jsonable(value: Any) -> Any:
    """Dataclasses, arrays, tuples and numpy numbers as plain JSON values; NaN and infinities as None."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- files --------------------------------------------------------------------------------------------------------


def write_report(
    data: EvalData, store: EpisodeStore, output: Path, load_model: Callable[[], WorldModel], films: bool
) -> dict[str, Any]:
    """Write every file of the report; returns `summary`.

    Args:
        data: finished rollouts.
        store: for the recorded frames of the sheets.
        output: folder.
        load_model: gives the model whose VAE draws the pictures.
        films: whether to write mp4s.
    """
    output.mkdir(parents=True, exist_ok=True)
    result = build_result(data)
    write_csv(output / "rollouts.csv", rollout_rows(data))
    write_csv(output / "steps.csv", step_rows(data))
    pictures = [output / "curves.png"]
    horizon_curves(pictures[0], result)
    if len(data.labels) > 1:
        pictures.append(output / "changes.png")
        change_plot(pictures[1], result)
    sheets, videos = draw_picks(data, store, output, load_model(), films)
    (output / "table.txt").write_text(plain(eval_table(result)), encoding="utf-8")
    result["files"] = [str(file.relative_to(output)) for file in [*pictures, *sheets, *videos]]
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    beside = output / ".eval.json"
    beside.write_text(text, encoding="utf-8")
    beside.replace(output / "eval.json")
    write_page(output / "report.html", result, [*pictures, *sheets], videos)
    return summary(result, output, sheets, videos)


def summary(result: Mapping[str, Any], output: Path, sheets: Sequence[Path], videos: Sequence[Path]) -> dict[str, Any]:
    """What the command prints: the table, the comparison, and where things lie."""
    keys = ("cameras", "metric", "base", "new", "change", "change_low", "change_high")
    paired = [
        {key: row[key] for key in keys}
        | {"win_rate": row["win_rate"], "win_low": row["win_low"], "win_high": row["win_high"], "n": row["rollouts"]}
        | {"p": row["wilcoxon_p_episodes"], "verdict": row["verdict"]}
        for row in result["paired"]
    ]
    return {
        "output": str(output),
        "rollouts": result["n"]["rollouts"],
        "episodes": result["n"]["episodes"],
        "steps": result["n"]["steps"],
        "table": result["table"],
        **({"paired": paired} if paired else {}),
        **({"reward": reward_words(result)} if paired else {}),
        "report": str(output / "report.html"),
        "text": str(output / "table.txt"),
        "json": str(output / "eval.json"),
        "csv": [str(output / "rollouts.csv"), str(output / "steps.csv")],
        "curves": str(output / "curves.png"),
        "sheets": [str(sheet) for sheet in sheets],
        "videos": [str(video) for video in videos],
    }


def rollout_rows(data: EvalData) -> list[dict[str, Any]]:
    """One line for every model, rollout and camera group."""
    out = []
    for row in data.rollouts:
        for group, cams in data.groups.items():
            values = {info.label: mean(data.frames(row, name, cams), 1) for name, info in data.metrics.items()}
            values["reward"] = data.rewards(row, cams)
            for index, item in enumerate(data.items):
                numbers = {label: jsonable(float(value[index])) for label, value in values.items()}
                out.append({"model": row, **asdict(item), "cameras": group, **numbers})
    return out


def step_rows(data: EvalData) -> list[dict[str, Any]]:
    """One line for every model, rollout, interaction and camera."""
    fresh, rate = data.settings.model.num_frames - 1, data.settings.world.rate_hz
    out = []
    for row in data.rollouts:
        scores = {info.label: data.stacked(row, name) for name, info in data.metrics.items()}
        for index, item in enumerate(data.items):
            for step in range(data.settings.eval.steps):
                part = {label: mean(v[index, step * fresh : (step + 1) * fresh], 0) for label, v in scores.items()}
                for camera, name in enumerate(data.settings.world.cameras):
                    numbers = {label: jsonable(float(value[camera])) for label, value in part.items()}
                    when = {"step": step + 1, "time_s": round((step + 1) * fresh / rate, 6), "camera": name}
                    out.append({"model": row, **asdict(item), **when, **numbers})
    return out


# -- pictures -----------------------------------------------------------------------------------------------------


def picks(data: EvalData) -> list[tuple[str, int]]:
    """(name, index) of the rollouts to show: best, median, worst gain in reward (reward itself without a baseline)."""
    values = data.rewards(data.labels[-1])
    if len(data.labels) > 1:
        values = values - data.rewards(data.labels[0])
    order = np.argsort(-values, kind="stable")
    count = min(data.settings.eval.sheets, len(order))
    if count <= 0:
        return []
    places = [0] if count == 1 else [round(i * (len(order) - 1) / (count - 1)) for i in range(count)]
    names = {0: "best", len(order) - 1: "worst", (len(order) - 1) // 2: "median", len(order) // 2: "median"}
    if len(order) < 3:
        names = {0: "best", len(order) - 1: "worst"}
    return [(names.get(place, f"rank{place + 1}"), int(order[place])) for place in dict.fromkeys(places)]


def draw_picks(
    data: EvalData, store: EpisodeStore, output: Path, model: WorldModel, films: bool
) -> tuple[list[Path], list[Path]]:
    """Contact sheets and mp4s of `picks`."""
    settings = data.settings
    rows = settings.model.num_frames
    sheets, videos = [], []
    for name, index in picks(data):
        item = data.items[index]
        recording = load_recording(store, settings.eval.split, item, settings.eval.steps, rows)
        high, wide = recording.frames.shape[2:4]
        length = int(recording.valid.sum())
        drawn = {
            label: draw_frames(model, data.latents(label, item), settings.sampling.decode_chunk, high, wide)[:length]
            for label in data.labels
        }
        title = f"{name}: episode {item.episode}, frame {item.start}, seed {item.seed}: {recording.annotation.text}"
        stem = f"{name}_episode-{item.episode}_start-{item.start}_seed-{item.seed}"
        scores = {label: data.rollouts[label][index] for label in data.labels}
        sheets.append(output / "sheets" / f"{stem}.png")
        write_rollout_sheet(sheets[-1], title, settings, recording, drawn, scores)
        if films:
            videos.append(output / "videos" / f"{stem}.mp4")
            write_rollout_video(videos[-1], title, settings, recording, drawn, scores)
    return sheets, videos
