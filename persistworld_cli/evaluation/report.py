"""Write a result as files: JSON, tables, curves, contact sheets, videos, one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from persistworld_cli.evaluation.action_following import following_result
from persistworld_cli.evaluation.fvd import FeatureNet, fvd_result
from persistworld_cli.evaluation.results import EvalData, build_result
from persistworld_cli.evaluation.uncertainty import uncertainty_result
from persistworld_cli.files import jsonable, write_json, write_text
from persistworld_cli.reports.animation import AnimatedRow, write_animation
from persistworld_cli.reports.curves import change_plot, horizon_curves, uncertainty_plot
from persistworld_cli.reports.model_card import add_evaluation
from persistworld_cli.reports.page import write_page
from persistworld_cli.reports.tables import eval_tables, plain, reward_words, write_csv
from persistworld_cli.reports.videos import ComparedRollout, camera_names
from persistworld_cli.statistics.paired import mean

_CURVES = (
    "rho_by_step",
    "variance",
    "error",
    "points",
)  # in the file, too long for a terminal


def write_report(data: EvalData, output: Path, video_net: FeatureNet | None = None) -> dict[str, Any]:
    """Write every file of the report, with the Fréchet video distance if there is a network. Returns `summary`."""
    extra = {"action_following": following_result(data), "uncertainty": uncertainty_result(data)}
    result = build_result(data, extra | {"fvd": fvd_result(data, video_net)})
    write_csv(output / "rollouts.csv", rollout_rows(data))
    write_csv(output / "steps.csv", step_rows(data))
    images = [output / "curves.png"]
    horizon_curves(images[0], result)
    if len(data.labels) > 1:
        images.append(output / "changes.png")
        change_plot(images[1], result)
    if result["uncertainty"]["rows"]:
        images.append(output / "uncertainty.png")
        uncertainty_plot(images[-1], result)
    sheets, videos = draw_picks(data, output)
    write_text(output / "table.txt", plain(*eval_tables(result)))
    result["files"] = [str(file.relative_to(output)) for file in [*images, *sheets, *videos]]
    write_json(output / "eval.json", result)
    write_page(output / "report.html", result, [*images, *sheets], videos)
    add_evaluation(result)
    return summary(result, output, sheets, videos)


def summary(result: Mapping[str, Any], output: Path, sheets: Sequence[Path], videos: Sequence[Path]) -> dict[str, Any]:
    """What the command prints: the table, the comparison, and the paths of the files; names as in ``eval.json``."""
    keys = (
        "cameras",
        "metric",
        "base",
        "new",
        "change",
        "change_low",
        "change_high",
        "win_rate",
        "win_low",
        "win_high",
        "rollouts",
        "wilcoxon_p_episodes",
        "verdict",
    )
    paired = [{key: row[key] for key in keys} for row in result["paired"]]
    rows = [{key: value for key, value in row.items() if key not in _CURVES} for row in result["uncertainty"]["rows"]]
    files = {"report": "report.html", "text": "table.txt", "json": "eval.json", "curves": "curves.png"}
    return {
        "output": str(output),
        **{key: result["n"][key] for key in ("rollouts", "episodes", "steps")},
        "table": result["table"],
        **({"paired": paired, "reward": reward_words(result)} if paired else {}),
        **{key: result[key] for key in ("drift_per_s", "action_following", "fvd", "benchmark")},
        "uncertainty": {**result["uncertainty"], "rows": rows},
        "protocol_hash": result["protocol"]["hash"],
        **{name: str(output / file) for name, file in files.items()},
        "csv": [str(output / "rollouts.csv"), str(output / "steps.csv")],
        "sheets": [str(sheet) for sheet in sheets],
        "videos": [str(video) for video in videos],
    }


def write_comparison(against: Mapping[str, Any], table: Table, output: Path) -> dict[str, Any]:
    """Write ``compare.json`` and its table (`comparing.compare_files`); returns its part of the summary."""
    write_json(output / "compare.json", against)
    text = output / "table.txt"
    write_text(text, text.read_text(encoding="utf-8") + "\n" + plain(table))
    return {"compared": against["paired"], "compare_json": str(output / "compare.json")}


def rollout_rows(data: EvalData) -> list[dict[str, Any]]:
    """One row per model, rollout and camera group."""
    out = []
    for row in data.rollouts:
        for group, cams in data.groups.items():
            values = {info.label: data.means(row, name, cams) for name, info in data.metrics.items()}
            values["reward"] = data.rewards(row, cams)
            for index, item in enumerate(data.items):
                numbers = {label: jsonable(value[index]) for label, value in values.items()}
                out.append({"model": row, **asdict(item), "cameras": group, **numbers})
    return out


def step_rows(data: EvalData) -> list[dict[str, Any]]:
    """One row per model, rollout, interaction and camera."""
    new, rate = data.settings.model.num_frames - 1, data.settings.world.rate_hz
    out = []
    for row, rollouts in data.rollouts.items():
        for item, rollout in zip(data.items, rollouts, strict=True):
            for step in range(data.settings.eval.steps):
                part = {
                    info.label: mean(rollout.scores[name][step * new : (step + 1) * new].astype(np.float64), 0)
                    for name, info in data.metrics.items()
                }
                for camera, name in enumerate(data.settings.world.cameras):
                    numbers = {label: jsonable(value[camera]) for label, value in part.items()}
                    when = {"step": step + 1, "time_s": round((step + 1) * new / rate, 6), "camera": name}
                    out.append({"model": row, **asdict(item), **when, **numbers})
    return out


# -- images -----------------------------------------------------------------------------------------------------


def picks(data: EvalData) -> list[tuple[str, int]]:
    """(name, index) of the rollouts to show: best, median, worst gain in reward (reward itself without a baseline)."""
    values = data.rewards(data.labels[-1])
    if len(data.labels) > 1:
        values = values - data.rewards(data.labels[0])
    order = np.argsort(-values, kind="stable")
    count = min(data.settings.eval.sheets, len(order))
    if count <= 0:
        return []
    last = len(order) - 1
    places = [0] if count == 1 else [round(i * last / (count - 1)) for i in range(count)]
    names = {last // 2: "median", len(order) // 2: "median"} | {last: "worst"} | ({0: "best"} if last else {})
    return [(names.get(place, f"rank{place + 1}"), int(order[place])) for place in dict.fromkeys(places)]


def draw_picks(data: EvalData, output: Path) -> tuple[list[Path], list[Path]]:
    """Contact sheets and mp4s of `picks`."""
    settings = data.settings
    sheets, videos = [], []
    for name, index in picks(data):
        item = data.items[index]
        recording, drawn = data.draw(item)
        title = f"{name}: episode {item.episode}, frame {item.start}, seed {item.seed}: {recording.annotation.text}"
        stem = f"{name}_episode-{item.episode}_start-{item.start}_seed-{item.seed}"
        scores = {label: data.rollouts[label][index] for label in data.labels}
        shown = ComparedRollout(title, settings, recording, drawn, scores)
        sheets.append(output / "sheets" / f"{stem}.png")
        shown.write_sheet(sheets[-1])
        videos.append(output / "videos" / f"{stem}.mp4")
        shown.write_video(videos[-1])
    return sheets, videos


def percentile_picks(data: EvalData) -> list[tuple[str, int]]:
    """(name, index) of the rollouts to animate: at the median and the 90th percentile of the baseline's loss of reward.

    An episode's loss is the mean over its noise seeds; its first rollout is shown.
    """
    loss = -data.rewards(data.labels[0])
    first = {episode: index for index, episode in reversed(list(enumerate(data.episodes)))}
    own = {episode: float(np.mean(loss[np.array(data.episodes) == episode])) for episode in first}
    order = sorted(own, key=lambda episode: (own[episode], first[episode]))
    places = {"median": 0.5, "90th percentile": 0.9}
    found = {order[round(share * (len(order) - 1))]: name for name, share in reversed(places.items())}
    return [(name, first[episode]) for episode, name in reversed(found.items())]


def animate(data: EvalData, path: Path) -> None:
    """Write the animation of `percentile_picks`: a row for the first camera of each group, scores below each image.

    Raises:
        CannotWrite: the file cannot be written.
    """
    names = camera_names(data.settings)
    cameras = {cams[0]: names[cams[0]] for cams in data.groups.values()}
    rows = []
    for name, index in percentile_picks(data):
        item = data.items[index]
        recording, drawn = data.draw(item)
        length = int(recording.valid.sum())
        caption = f"{name} of {data.labels[0]}'s error, episode {item.episode}: {recording.annotation.text}"
        for camera, title in cameras.items():
            columns = {"recorded": recording.frames[:length], **drawn}
            images = {
                label: np.concatenate([recording.first[None, camera], frames[:, camera]])
                for label, frames in columns.items()
            }
            notes = {label: _scores(data, label, index, camera) for label in data.labels}
            rows.append(AnimatedRow(images, {"recorded": title, **notes}, caption))
            caption = ""
    write_animation(path, rows, data.settings.world.rate_hz)


def _scores(data: EvalData, label: str, index: int, camera: int) -> str:
    """``mean PSNR 20.1 dB ↑, LPIPS 0.082 ↓``, over a rollout's frames; the arrows say what is better."""
    scores = data.rollouts[label][index].scores
    psnr, lpips = (float(np.nanmean(scores[name][:, camera])) for name in ("psnr", "lpips"))
    return f"mean PSNR {psnr:.1f} dB ↑, {data.metrics['lpips'].label.upper()} {lpips:.3f} ↓"
