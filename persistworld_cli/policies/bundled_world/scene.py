"""What a raw recording of the bundled world tells of its objects: the scene at a rollout's start, and true positions.

`meta/episodes.jsonl` names the objects (colour, shape, size), column `sim.object_pose` says where they were.
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
_FIX = "take the bundled world (persistworld extract-latents), with world.raw naming what it was extracted from"


@dataclass(frozen=True)
class RecordedStart:
    """Where a start lies in the raw recording: the episode's number there, and the row of its start frame."""

    raw: RawDataset
    index: int
    row: int
    objects: tuple[SceneObject, ...]


def find_recorded(settings: Settings, start: Start) -> RecordedStart:
    """The start in the raw recording that its dataset was extracted from, with the objects as they stood.

    Raises:
        PersistWorldError: `world.raw` does not name a recording of the bundled world, or not this dataset's.
    """
    root = resolve_path(settings.world.raw) if settings.world.raw else None
    if root is None or not (root / "meta" / "info.json").is_file():
        raise PersistWorldError(
            "where the objects are is not known: no raw recording of the bundled world is at hand",
            where=f"world.raw = '{settings.world.raw}'",
            fix=_FIX,
        )
    raw, index = RawDataset(root), _number(start.item.episode)
    described = _described(root).get(index)
    if described is None or OBJECT_POSE not in raw.features:
        raise PersistWorldError(
            f"the raw recording does not tell of the objects of episode '{start.item.episode}'",
            where=str(root),
            fix=_FIX,
        )
    row = round(start.item.start * raw.fps / settings.world.rate_hz)
    columns = raw.read(index, [OBJECT_POSE, _JOINTS])
    _require_same(start, columns[_JOINTS], row, root)
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
    """(T, N, 3): where the objects were at every row of the raw recording, m."""
    poses = recorded.raw.read(recorded.index, [OBJECT_POSE])[OBJECT_POSE]
    positions: Float = poses.reshape(len(poses), -1, 7)[:, :, :3]
    return positions


def _number(episode: str) -> int:
    """An episode's number in the raw recording; -1 for a name that is none."""
    return int(episode) if episode.isdecimal() else -1


def _require_same(start: Start, joints: Float, row: int, root: Path) -> None:
    """Refuse a raw recording whose arm stood elsewhere: it is not what the dataset was extracted from."""
    known = start.annotation.joints
    if row < len(joints) and known is not None and np.abs(joints[row] - known[start.item.start, :7]).max() < _SAME:
        return
    raise PersistWorldError(
        f"episode '{start.item.episode}' of the dataset is not episode {_number(start.item.episode)} of the recording",
        where=str(root),
        fix=_FIX,
    )


@lru_cache(maxsize=4)
def _described(root: Path) -> dict[int, list[dict[str, Any]]]:
    """Episode number -> its objects, of those that `meta/episodes.jsonl` tells of."""
    path = root / "meta" / "episodes.jsonl"
    if not path.is_file():
        return {}
    what = "unreadable list of episodes"
    rows = read_json_lines(path, what, _FIX)
    with reading(what, path, _FIX):
        return {int(row["episode_index"]): row["objects"] for row in rows if row.get("objects")}
