"""LeRobot v2.1 on disk, as DROID is published: one parquet and three mp4 files per episode, and `meta/`.

An episode is written into a folder of its own beside the data and moved in place, its parquet last: it counts as
recorded if its parquet exists. The parquet's schema metadata also carries the episode's line of `episodes.jsonl`, so
that `meta/` is always derived from what is on disk.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from persistworld_cli.policies.bundled_world.rules import IMAGE_HEIGHT, IMAGE_WIDTH, all_instructions

from .design import VARIED
from .episode import Episode
from .scene import CAMERAS

CHUNK = 1000
DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
METADATA_KEY = b"persistworld_example"
CRF = "31"

# Column -> (info.json's dtype, shape), in DROID's order; a shape of (1,) is a scalar column.
COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "observation.state.joint_position": ("float32", (7,)),
    "observation.state.gripper_position": ("float32", (1,)),
    "observation.state.cartesian_position": ("float32", (6,)),
    "observation.state": ("float32", (8,)),
    "action.joint_position": ("float32", (7,)),
    "action.gripper_position": ("float32", (1,)),
    "action.cartesian_position": ("float32", (6,)),
    "action.joint_velocity": ("float32", (7,)),
    "action": ("float32", (8,)),
    "is_episode_successful": ("bool", (1,)),
    "language_instruction": ("string", (1,)),
    "timestamp": ("float32", (1,)),
    "frame_index": ("int64", (1,)),
    "episode_index": ("int64", (1,)),
    "index": ("int64", (1,)),
    "task_index": ("int64", (1,)),
    "sim.object_pose": ("float32", (21,)),
}
_ARROW = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_(), "string": pa.large_string()}


def episode_path(root: Path, episode_id: int) -> Path:
    return root / DATA_PATH.format(episode_chunk=episode_id // CHUNK, episode_index=episode_id)


def video_path(root: Path, episode_id: int, camera: str) -> Path:
    key = f"observation.images.{camera}"
    return root / VIDEO_PATH.format(episode_chunk=episode_id // CHUNK, video_key=key, episode_index=episode_id)


def write_episode(root: Path, episode: Episode, seed: int) -> None:
    """Writes the videos and the parquet of one episode; a kill leaves either all of it or nothing that counts."""
    partial = root / f".partial-{episode.episode_id:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    moves = []
    for camera, frames in episode.frames.items():
        encode_video(partial / f"{camera}.mp4", frames, episode.fps)
        moves.append((partial / f"{camera}.mp4", video_path(root, episode.episode_id, camera)))
    pq.write_table(_table(episode, seed), partial / "episode.parquet", compression="zstd", compression_level=15)
    moves.append((partial / "episode.parquet", episode_path(root, episode.episode_id)))
    for source, target in moves:
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    partial.rmdir()


def encode_video(path: Path, frames: np.ndarray, fps: int) -> None:
    """(T, height, width, 3) uint8 -> H.264, yuv420p."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": CRF, "preset": "medium", "g": "250", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _table(episode: Episode, seed: int) -> pa.Table:
    length = episode.length
    frame = np.arange(length)
    values = dict(episode.columns)
    values["is_episode_successful"] = np.full(length, episode.success)
    values["language_instruction"] = [episode.instruction] * length
    values["timestamp"] = (frame / episode.fps).astype(np.float32)
    values["frame_index"] = frame
    values["episode_index"] = np.full(length, episode.episode_id)
    # All episodes of a recording are equally long, so the global row number needs no knowledge of the others.
    values["index"] = episode.episode_id * length + frame
    values["task_index"] = np.full(length, all_instructions().index(episode.instruction))
    arrays, fields = [], []
    for name, (dtype, shape) in COLUMNS.items():
        kind = _ARROW[dtype] if shape == (1,) else pa.list_(_ARROW[dtype])
        data = values[name] if shape == (1,) else list(values[name])
        arrays.append(pa.array(data, type=kind))
        fields.append(pa.field(name, kind))
    entry = {
        "design": episode.design,
        "seed": seed,
        "fps": episode.fps,
        "success": episode.success,
        "line": _line(episode),
    }
    return pa.table(arrays, schema=pa.schema(fields, metadata={METADATA_KEY: json.dumps(entry)}))


def _line(episode: Episode) -> dict:
    """The episode's line of `episodes.jsonl`; sizes are full extents in metres, in the object's own axes."""
    objects = [
        {
            "name": item.name,
            "colour": item.colour,
            "shape": item.shape,
            "rgb": [round(v, 4) for v in item.rgb],
            "size": [round(2 * float(v), 4) for v in item.half],
        }
        for item in episode.objects
    ]
    return {
        "episode_index": episode.episode_id,
        "tasks": [episode.instruction],
        "length": episode.length,
        "objects": objects,
    }


def recorded(root: Path) -> dict[int, dict]:
    """Episode id -> its entry (design, seed, fps, success, line), of every complete episode on disk.

    Recordings without a design's name are of `VARIED`.
    """
    entries = {}
    for path in sorted(root.glob("data/chunk-*/episode_*.parquet")):
        metadata = pq.read_schema(path).metadata or {}
        if METADATA_KEY in metadata:
            entry = {"design": VARIED.name, **json.loads(metadata[METADATA_KEY])}
            entries[int(path.stem.split("_")[1])] = entry
    return entries


def write_meta(root: Path, fps: int, validation: int) -> None:
    """Writes `meta/` from the episodes on disk. The last `validation` ones are the validation split.

    Splits are ranges "first:end" of episode ids, end excluded.
    """
    lines = [entry["line"] for _, entry in sorted(recorded(root).items())]
    ids = [line["episode_index"] for line in lines]
    tasks = [{"task_index": index, "task": text} for index, text in enumerate(all_instructions())]
    meta = root / "meta"
    meta.mkdir(parents=True, exist_ok=True)
    _write_text(meta / "episodes.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    _write_text(meta / "tasks.jsonl", "".join(json.dumps(task) + "\n" for task in tasks))
    _write_text(meta / "info.json", json.dumps(_info(lines, _splits(ids, validation), fps), indent=2) + "\n")


def _splits(ids: list[int], validation: int) -> dict[str, str]:
    if not ids:
        return {}
    first, end = ids[0], ids[-1] + 1
    if not 0 < validation < len(ids):
        return {"train": f"{first}:{end}"}
    return {"train": f"{first}:{ids[-validation]}", "val": f"{ids[-validation]}:{end}"}


def _info(lines: list[dict], splits: dict[str, str], fps: int) -> dict:
    video = {
        "dtype": "video",
        "shape": [IMAGE_HEIGHT, IMAGE_WIDTH, 3],
        "names": ["height", "width", "channels"],
        "info": {
            "video.fps": float(fps),
            "video.codec": "h264",
            "video.pix_fmt": "yuv420p",
            "has_audio": False,
        },
    }
    features = {f"observation.images.{camera}": video for camera in CAMERAS}
    features |= {
        name: {"dtype": dtype, "shape": list(shape), "names": None} for name, (dtype, shape) in COLUMNS.items()
    }
    return {
        "codebase_version": "v2.1",
        "robot_type": "Franka",
        "total_episodes": len(lines),
        "total_frames": sum(line["length"] for line in lines),
        "total_tasks": len(all_instructions()),
        "total_videos": len(lines) * len(CAMERAS),
        "total_chunks": len({line["episode_index"] // CHUNK for line in lines}),
        "chunks_size": CHUNK,
        "fps": fps,
        "splits": splits,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": features,
    }


def _write_text(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
