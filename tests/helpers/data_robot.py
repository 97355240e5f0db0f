"""A robot that is not DROID's, recorded by LeRobot with names of its own: one camera, 10 numbers, 30 Hz."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from data_raw import image, table_path
from numpy.typing import NDArray

from persistworld_cli.data.raw import video

NUMBERS, FPS = 10, 30.0
_PATHS = {
    "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
}


def states(episode: int, length: int) -> NDArray[np.float32]:
    """(length, 10): a smooth walk."""
    steps = np.random.default_rng(episode).normal(0, 0.1, (length, NUMBERS))
    return np.cumsum(steps, axis=0).astype(np.float32)


def write_robot(root: Path, lengths: dict[int, int], camera: str = "observation.images.front") -> Path:
    """A version 2.1 dataset of episodes {index: raw length}; ``camera``: the feature of its one camera."""
    rows = []
    for episode, length in lengths.items():
        table = {
            "observation.state": states(episode, length).tolist(),
            "action": states(episode, length).tolist(),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, episode),
        }
        path = table_path(root, episode)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), path)
        film = root / _PATHS["video_path"].format(episode_chunk=0, episode_index=episode, video_key=camera)
        video.write_mp4(film, [image(episode, 0, frame // 3) for frame in range(length)], FPS, crf=1)
        rows.append(json.dumps({"episode_index": episode, "tasks": ["sort the parts"], "length": length}))
    info = {
        "codebase_version": "v2.1",
        "fps": FPS,
        "chunks_size": 1000,
        "features": {camera: {"dtype": "video"}} | {n: {"dtype": "float32"} for n in ("observation.state", "action")},
        **_PATHS,
    }
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/episodes.jsonl").write_text("\n".join(rows))
    return root
