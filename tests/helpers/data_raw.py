"""Small raw LeRobot datasets, versions 2.1 and 3.0, written for the tests of `data`."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from persistworld_cli.data.raw import video

CAMERAS = ("exterior_1_left", "exterior_2_left", "wrist_left")
HEIGHT, WIDTH = 32, 48
TASK = "move the block"


def encode(frames: Tensor) -> Tensor:
    """A linear encoder 8x smaller: uint8 (N, V, H, W, 3) -> (N, 4, V * H / 8, W / 8): mean colours and their mean."""
    n, v, h, w, _ = frames.shape
    small = torch.nn.functional.avg_pool2d(frames.permute(0, 1, 4, 2, 3).reshape(n * v, 3, h, w).float(), 8) / 255
    four = torch.cat([small, small.mean(1, keepdim=True)], 1).reshape(n, v, 4, h // 8, w // 8)
    return four.permute(0, 2, 1, 3, 4).reshape(n, 4, v * (h // 8), w // 8)


def image(episode: int, camera: int, frame: int) -> NDArray[np.uint8]:
    """An image that tells its frame number by its brightness: 40 + 4 * frame."""
    out = np.full((HEIGHT, WIDTH, 3), min(250, 40 + 4 * frame), np.uint8)
    out[: HEIGHT // 2, : WIDTH // 2, camera] += 5 + episode % 3
    return out


def columns(episode: int, length: int) -> dict[str, NDArray[np.float32]]:
    """State and action columns with DROID's names; velocity v moves the joints by 0.05 v a raw frame."""
    rng = np.random.default_rng(episode)
    velocity = np.cumsum(rng.normal(0, 0.2, (length, 7)), axis=0).clip(-1, 1)
    joints = np.concatenate([np.zeros((1, 7)), 0.05 * np.cumsum(velocity, axis=0)[:-1]])
    out = {
        "observation.state.cartesian_position": rng.normal(size=(length, 6)),
        "observation.state.joint_position": joints,
        "observation.state.gripper_position": rng.random(length),
        "action.cartesian_position": rng.normal(size=(length, 6)),
        "action.joint_position": joints,
        "action.gripper_position": rng.random(length),
        "action.joint_velocity": velocity,
    }
    return {name: values.astype(np.float32) for name, values in out.items()}


def _table(episode: int, length: int, fps: float, first: int = 0, stored: bool = False) -> pa.Table:
    data: dict[str, object] = {k: v.tolist() for k, v in columns(episode, length).items()}
    data |= {
        "is_episode_successful": [episode % 2 == 0] * length,
        "language_instruction": [TASK] * length,
        "timestamp": (np.arange(length) / fps).astype(np.float32),
        "frame_index": np.arange(length),
        "episode_index": np.full(length, episode),
        "index": np.arange(first, first + length),
    }
    for number, camera in enumerate(CAMERAS if stored else ()):
        cells = [{"bytes": _png(image(episode, number, f)), "path": f"frame-{f:06d}.png"} for f in range(length)]
        data[f"observation.images.{camera}"] = cells
    return pa.table(data)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _info(version: str, fps: float, stored: bool, **paths: object) -> dict[str, object]:
    names = ["height", "width", "channels"]
    kind = {"dtype": "image" if stored else "video", "shape": [HEIGHT, WIDTH, 3], "names": names}
    features: dict[str, object] = {f"observation.images.{c}": kind for c in CAMERAS}
    features |= {k: {"dtype": "float32", "shape": [*v.shape[1:]] or [1]} for k, v in columns(0, 1).items()}
    features |= {"language_instruction": {"dtype": "string"}}
    return {"codebase_version": version, "fps": fps, "chunks_size": 1000, "features": features, **paths}


def write_v21(
    root: Path, lengths: dict[int, int], fps: float = 15, splits: dict[str, str] | None = None, stored: bool = False
) -> Path:
    """A version 2.1 dataset of episodes {index: raw length}; ``stored``: images are in the tables, not in videos."""
    info = _info(
        "v2.1",
        fps,
        stored,
        splits=splits or {},
        data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    )
    rows = []
    for episode, length in lengths.items():
        path = table_path(root, episode)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_table(episode, length, fps, stored=stored), path)
        for number, camera in enumerate(() if stored else CAMERAS):
            video.write_mp4(
                video_path(root, episode, camera), [image(episode, number, f) for f in range(length)], fps, crf=1
            )
        rows.append(json.dumps({"episode_index": episode, "tasks": [TASK], "length": length}))
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/episodes.jsonl").write_text("\n".join(rows))
    return root


def write_v30(root: Path, lengths: Sequence[int], fps: float = 15, stored: bool = False) -> Path:
    """A version 3.0 dataset: all episodes in one table and one video per camera; ``stored``: as for `write_v21`."""
    info = _info(
        "v3.0",
        fps,
        stored,
        data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    )
    starts = np.concatenate([[0], np.cumsum(lengths)])
    rows = []
    for episode, length in enumerate(lengths):
        row = {"episode_index": episode, "tasks": [TASK], "length": length, "data/chunk_index": 0, "data/file_index": 0}
        for camera in () if stored else CAMERAS:
            head = f"videos/observation.images.{camera}/"
            row |= {f"{head}chunk_index": 0, f"{head}file_index": 0}
            row |= {f"{head}from_timestamp": starts[episode] / fps, f"{head}to_timestamp": starts[episode + 1] / fps}
        rows.append({**row, "stats/unused": [0.0]})
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    tables = [_table(e, n, fps, int(starts[e]), stored) for e, n in enumerate(lengths)]
    pq.write_table(pa.concat_tables(tables), root / "data/chunk-000/file-000.parquet")
    for number, camera in enumerate(() if stored else CAMERAS):
        frames = [image(e, number, f) for e, n in enumerate(lengths) for f in range(n)]
        video.write_mp4(root / f"videos/observation.images.{camera}/chunk-000/file-000.mp4", frames, fps, crf=1)
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def table_path(root: Path, episode: int) -> Path:
    return root / f"data/chunk-{episode // 1000:03d}/episode_{episode:06d}.parquet"


def video_path(root: Path, episode: int, camera: str) -> Path:
    folder = f"videos/chunk-{episode // 1000:03d}/observation.images.{camera}"
    return root / folder / f"episode_{episode:06d}.mp4"
