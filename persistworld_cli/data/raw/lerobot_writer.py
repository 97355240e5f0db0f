"""Writer of LeRobot v3.0 datasets, for generated rollouts. One file per episode and camera, which the format allows.

Shape legend: T frames, D numbers, H, W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from persistworld_cli.config.settings import Settings, WorldSettings
from persistworld_cli.data.raw.video import write_mp4
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import write_json

_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEOS = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_CHUNK = 1000  # files of a folder
_ALWAYS = {"timestamp": "float32"} | dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
_PANDAS_INDEX = "__index_level_0__"


@dataclass(frozen=True, kw_only=True)
class NewEpisode:
    """An episode to write."""

    task: str  # the instruction
    columns: Mapping[str, NDArray[np.floating[Any]]]  # name -> (T, D), written as float32
    images: Mapping[str, NDArray[np.uint8]]  # camera -> (T, H, W, 3), written as ``observation.images.<camera>``

    def __len__(self) -> int:
        return len(next(iter(self.images.values())))


def pose_columns(settings: Settings, poses: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """State and action (T, D) of a generated episode: the pose commanded at a frame, and at the next one or the last.

    DROID's two state fields are written as well, or the only field of `world.state_fields`, so that `extract-latents`
    reads the dataset with the same preset.
    """
    fields, droid = settings.world.state_fields, WorldSettings().state_fields
    cuts = [6] if fields == droid else []  # behind x y z, roll pitch yaw
    columns = {"observation.state": poses, "action": np.concatenate([poses[1:], poses[-1:]])}
    if len(fields) == len(cuts) + 1:
        for field, rows in zip(fields, np.split(poses, cuts, axis=1), strict=True):
            columns[field] = rows
            if field.startswith("observation.state"):
                columns[field.replace("observation.state", "action")] = np.concatenate([rows[1:], rows[-1:]])
    return columns


def write_lerobot(root: Path, episodes: Sequence[NewEpisode], fps: float, robot: str) -> None:
    """Write episodes with the same columns and cameras into a new or empty folder; ``robot`` is the ``robot_type``.

    Raises:
        PersistWorldError: the folder is not empty, or there is no episode.
    """
    if not episodes or (root.exists() and any(root.iterdir())):
        what = "the folder is not empty" if episodes else "there is no episode to write"
        raise PersistWorldError(what, where=str(root), fix="name a new folder" if episodes else None)
    tasks = list(dict.fromkeys(episode.task for episode in episodes))
    rows, stats, first = [], [], 0
    for index, episode in enumerate(episodes):
        table = _table(episode, index, first, tasks.index(episode.task), fps)
        path = root / _DATA.format(**_place(index))
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_arrow(table), path)
        for key, frames in _videos(episode).items():
            write_mp4(root / _VIDEOS.format(video_key=key, **_place(index)), frames, fps)
        stats.append(_stats(table, episode))
        rows.append(_row(episode, index, first, fps, stats[-1]))
        first += len(episode)
    _write_meta(root, episodes, tasks, rows, fps, robot)
    whole = {name: _pooled([one[name] for one in stats]) for name in stats[0]}
    write_json(root / "meta" / "stats.json", whole)


def _place(index: int) -> dict[str, int]:
    """Numbers of an episode's files."""
    return {"chunk_index": index // _CHUNK, "file_index": index % _CHUNK}


def _videos(episode: NewEpisode) -> dict[str, NDArray[np.uint8]]:
    return {f"observation.images.{camera}": frames for camera, frames in episode.images.items()}


def _table(episode: NewEpisode, index: int, first: int, task: int, fps: float) -> dict[str, NDArray[Any]]:
    """Columns of an episode: (T, D) float32, and those that LeRobot requires in every table, (T,)."""
    count = np.arange(len(episode))
    own = {name: np.asarray(values, dtype=np.float32) for name, values in episode.columns.items()}
    always = {
        "timestamp": count / fps,
        "frame_index": count,
        "episode_index": np.full(len(count), index),
        "index": first + count,
        "task_index": np.full(len(count), task),
    }
    return own | {name: values.astype(_ALWAYS[name]) for name, values in always.items()}


def _arrow(table: Mapping[str, NDArray[Any]]) -> pa.Table:
    """As an arrow table: lists of fixed length, or plain numbers where a row has only one."""
    arrays = {}
    for name, values in table.items():
        flat, width = pa.array(values.reshape(-1)), values.shape[1] if values.ndim > 1 else 1
        arrays[name] = flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
    return pa.table(arrays)


def _stats(table: Mapping[str, NDArray[Any]], episode: NewEpisode) -> dict[str, dict[str, Any]]:
    """Minimum, maximum, mean and deviation of every feature; of images per colour, in [0, 1], shaped (3, 1, 1)."""
    out = {name: _moments(values.reshape(len(values), -1).astype(np.float64)) for name, values in table.items()}
    for key, frames in _videos(episode).items():
        colours = _moments(frames.reshape(-1, 3) / 255.0)
        out[key] = {name: [[[value]] for value in values] for name, values in colours.items()}
        out[key]["count"] = [len(episode)]
    return out


def _moments(values: NDArray[np.float64]) -> dict[str, list[Any]]:
    """Over the rows of (N, D)."""
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    return {name: value.tolist() for name, value in found.items()} | {"count": [len(values)]}


def _pooled(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several episodes' statistics of a feature as one."""
    count = np.array([part["count"][0] for part in parts], dtype=np.float64)
    low, high, mean, std = (np.array([part[name] for part in parts]) for name in ("min", "max", "mean", "std"))
    whole = np.average(mean, axis=0, weights=count)
    spread = np.sqrt(np.average(std**2 + (mean - whole) ** 2, axis=0, weights=count))
    found = {"min": low.min(0), "max": high.max(0), "mean": whole, "std": spread}
    return {name: value.tolist() for name, value in found.items()} | {"count": [int(count.sum())]}


def _row(episode: NewEpisode, index: int, first: int, fps: float, stats: Mapping[str, Any]) -> dict[str, Any]:
    """An episode's row in ``meta/episodes``: where it lies, and its statistics."""
    place = _place(index)
    row: dict[str, Any] = {"episode_index": index, "tasks": [episode.task], "length": len(episode)}
    row |= {f"data/{name}": number for name, number in place.items()}
    row |= {"dataset_from_index": first, "dataset_to_index": first + len(episode)}
    for key in _videos(episode):
        row |= {f"videos/{key}/{name}": number for name, number in place.items()}
        row |= {f"videos/{key}/from_timestamp": 0.0, f"videos/{key}/to_timestamp": len(episode) / fps}
    for feature, one in stats.items():
        row |= {f"stats/{feature}/{name}": value for name, value in one.items()}
    return row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}


def _write_meta(
    root: Path, episodes: Sequence[NewEpisode], tasks: list[str], rows: list[dict[str, Any]], fps: float, robot: str
) -> None:
    """``meta/``: info.json, the episodes and the tasks."""
    listed = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    listed.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), listed)
    pq.write_table(_tasks(tasks), root / "meta" / "tasks.parquet")
    info = {
        "codebase_version": "v3.0",
        "robot_type": robot,
        "total_episodes": len(episodes),
        "total_frames": sum(map(len, episodes)),
        "total_tasks": len(tasks),
        "chunks_size": _CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": int(fps) if float(fps).is_integer() else fps,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": _DATA,
        "video_path": _VIDEOS,
        "features": _features(episodes[0], fps),
    }
    write_json(root / "meta" / "info.json", info)


def _tasks(tasks: list[str]) -> pa.Table:
    """Tasks as LeRobot reads them: the index of a pandas table (written without pandas)."""
    table = pa.table({"task_index": np.arange(len(tasks), dtype=np.int64), _PANDAS_INDEX: tasks})
    kinds = (("task_index", "task_index", "int64", "int64"), (None, _PANDAS_INDEX, "unicode", "object"))
    keys = ("name", "field_name", "pandas_type", "numpy_type")
    columns = [dict(zip(keys, kind, strict=True)) | {"metadata": None} for kind in kinds]
    described = {"index_columns": [_PANDAS_INDEX], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    return table.replace_schema_metadata({b"pandas": json.dumps(described).encode()})


def _features(episode: NewEpisode, fps: float) -> dict[str, Any]:
    """info.json's description of columns and cameras."""
    features: dict[str, Any] = {}
    for key, frames in _videos(episode).items():
        h, w = (side + side % 2 for side in frames.shape[1:3])  # as the video's writer pads them
        stream = {"height": h, "width": w, "codec": "h264", "pix_fmt": "yuv420p", "is_depth_map": False, "channels": 3}
        features[key] = {
            "dtype": "video",
            "shape": [h, w, 3],
            "names": ["height", "width", "channels"],
            "info": {f"video.{name}": value for name, value in stream.items()} | {"video.fps": fps, "has_audio": False},
        }
    for name, values in episode.columns.items():
        features[name] = {"dtype": "float32", "shape": [int(np.shape(values)[1])], "names": None}
    return features | {name: {"dtype": kind, "shape": [1], "names": None} for name, kind in _ALWAYS.items()}
