"""The objects in a raw recording of the bundled world: the scene at a rollout's start, and the true positions.

`meta/episodes.jsonl` describes the objects (colour, shape, size), column `sim.object_pose` has their poses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.policies.judge import Float, SceneObject
from persistworld_cli.read_files import read_json_lines, reading
from persistworld_cli.rollout.recording import Start

OBJECT_POSE = "sim.object_pose"
_JOINTS = "observation.state.joint_position"
_SAME = 1e-3  # rad: float32 joints, rounded on their way into the processed dataset
_FIX = "use the bundled world (persistworld extract-latents), and set world.raw to the recordings it was extracted from"


@dataclass(frozen=True)
class RecordedStart:
    """A start in the raw recording: the episode's number, the row of the start frame, the objects there."""

    raw: RawDataset
    index: int
    row: int
    objects: tuple[SceneObject, ...]


def find_recorded(settings: Settings, start: Start) -> RecordedStart:
    """A start in the raw recording that its dataset was extracted from.

    Raises:
        PersistWorldError: `world.raw` is not a recording of the bundled world, or not that of this dataset.
    """
    root = resolve_path(settings.world.raw) if settings.world.raw else None
    if root is None or not (root / "meta" / "info.json").is_file():
        what = "the objects' positions are unknown: there is no raw recording of the bundled world"
        raise PersistWorldError(what, where=f"world.raw = '{settings.world.raw}'", fix=_FIX)
    episode, known = start.item.episode, start.annotation.joints
    raw, index = RawDataset(root), int(episode) if episode.isdecimal() else -1
    described = _described(root).get(index)
    if described is None or OBJECT_POSE not in raw.features:
        what = f"the raw recording does not describe the objects of episode '{episode}'"
        raise PersistWorldError(what, where=str(root), fix=_FIX)
    columns = raw.read(index, [OBJECT_POSE, _JOINTS])
    rows, first = raw.clock(index).rows(settings.world.rate_hz), start.item.start
    joints = columns[_JOINTS][rows]
    if first >= len(rows) or known is None or np.abs(joints[first] - known[first, :7]).max() >= _SAME:
        what = f"episode '{episode}' of the dataset is not episode {index} of the recording"  # the arm is elsewhere
        raise PersistWorldError(what, where=str(root), fix=_FIX)
    row = int(rows[first])
    poses = columns[OBJECT_POSE][row].reshape(-1, 7)
    objects = tuple(
        SceneObject(
            name=str(entry["name"]),
            colour=str(entry["colour"]),
            shape=str(entry["shape"]),
            rgb=tuple(entry["rgb"]),
            size=tuple(entry["size"]),
            position=pose[:3],
            quaternion=pose[3:],
        )
        for entry, pose in zip(described, poses, strict=True)
    )
    return RecordedStart(raw, index, row, objects)


def true_positions(recorded: RecordedStart) -> Float:
    """(T, N, 3): the objects' positions at every row of the raw recording, m."""
    poses = recorded.raw.read(recorded.index, [OBJECT_POSE])[OBJECT_POSE]
    positions: Float = poses.reshape(len(poses), -1, 7)[:, :, :3]
    return positions


@lru_cache(maxsize=4)
def _described(root: Path) -> dict[int, list[dict[str, Any]]]:
    """Episode number -> its objects, as `meta/episodes.jsonl` describes them."""
    path = root / "meta" / "episodes.jsonl"
    if not path.is_file():
        return {}
    what = "unreadable list of episodes"
    rows = read_json_lines(path, what, _FIX)
    with reading(what, path, _FIX):
        return {int(row["episode_index"]): row["objects"] for row in rows if row.get("objects")}
