"""What build-meta reads from an episode, and how it detects changes.

Legend: T frames at the model rate, R raw frames, D numbers of a state, J joints. Needs no torch: workers import it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.settings import WorldSettings
from persistworld_cli.data.metadata.annotations import (
    KEYS,
    Unreadable,
    load_annotation,
    read_states,
    read_success,
    read_text,
)
from persistworld_cli.data.metadata.latent_header import read_layout
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import natural_key
from persistworld_cli.read_files import DAMAGED_NOTES, positive_number, read_json, reading

VELOCITY = "action.joint_velocity"
JOINTS = "observation.state.joint_position"
NOTES = "extract.json"  # what all episodes of a dataset have in common
POSE = 7  # x y z, roll pitch yaw, gripper: the only state whose numbers have a meaning here


class AnnotationStat(NamedTuple):
    """An annotation on disk, with the size and times that reveal a change of it or of the episode's folders."""

    split: str
    episode: str
    size: int
    mtime: int  # ns, as the next two; these are 0 without such a folder
    videos: int
    latents: int

    @property
    def name(self) -> str:
        """Name in messages."""
        return f"{self.split}/{self.episode}"


class Facts(NamedTuple):
    """Statistics of an episode for the health report; the last five are NaN unless states are poses of 7 numbers."""

    extent: float  # the widest range of any coordinate (a pose: of x, y, z; m)
    jump: float  # longest distance in one frame, m
    turn: float  # largest rotation in one frame, rad
    wraps: float  # how often roll jumps between +pi and -pi
    grip_low: float
    grip_high: float


@dataclass(frozen=True)
class Episode:
    """What build-meta keeps of an annotation. ``problem``: why training cannot use it, '' if it can."""

    text: str
    success: bool | None
    problem: str
    states: NDArray[np.float64]  # (T, D); (0, 0) with a problem
    facts: Facts
    motion: NDArray[np.float32] | None  # (R, 2, J) joint positions (rad) and velocities, if requested


def require_processed(root: Path) -> None:
    """Raise PersistWorldError if a folder is not a processed dataset."""
    if not (root / "annotation").is_dir():
        raise PersistWorldError(
            "no processed dataset here (folder annotation/ is missing)",
            where=str(root),
            fix="run persistworld extract-latents, or give the folder that holds annotation/ and videos/",
        )


def list_annotations(root: Path) -> list[AnnotationStat]:
    """Every annotation of a dataset: splits in order of name, episodes in natural order."""
    out: list[AnnotationStat] = []
    for split in sorted(e.name for e in os.scandir(root / "annotation") if e.is_dir()):
        videos, latents = _changed(root / "videos" / split), _changed(root / "latent_videos" / split)
        for entry in os.scandir(root / "annotation" / split):
            if entry.name.endswith(".json") and not entry.name.startswith("."):
                episode, stat = entry.name.removesuffix(".json"), entry.stat()
                folders = videos.get(episode, 0), latents.get(episode, 0)
                out.append(AnnotationStat(split, episode, stat.st_size, stat.st_mtime_ns, *folders))
    return sorted(out, key=lambda item: (item.split, natural_key(item.episode)))


def _changed(folder: Path) -> dict[str, int]:
    """Episode -> when its folder last got, lost or renamed a file."""
    return {e.name: e.stat().st_mtime_ns for e in os.scandir(folder) if e.is_dir()} if folder.is_dir() else {}


def extraction_notes(root: Path) -> dict[str, Any]:
    """Notes of extract-latents on the dataset (extract.json); {} if another tool made it. Raises if damaged."""
    path = root / NOTES
    if not path.is_file():
        return {}
    with reading("unreadable notes of the extraction", path, DAMAGED_NOTES):
        noted = read_json(path, "unreadable notes of the extraction", DAMAGED_NOTES)
        if "rate_hz" in noted:
            positive_number(noted["rate_hz"], "rate_hz")
        return noted


def other_world(noted: dict[str, Any], world: WorldSettings) -> dict[str, tuple[Any, Any]]:
    """Cameras and rate where a dataset's notes differ from the settings: name -> (noted, own)."""
    own = {"cameras": list(world.cameras), "rate_hz": world.rate_hz}
    return {key: (noted[key], value) for key, value in own.items() if noted.get(key, value) != value}


def read_episode(root: Path, request: tuple[AnnotationStat, bool]) -> Episode:
    """Read and check one episode; ``request``: which, and whether its motion is wanted for the adapter's fit."""
    item, wanted = request
    path = root / "annotation" / item.split / f"{item.episode}.json"
    text, success = "", None
    try:
        raw = load_annotation(path, (*KEYS, VELOCITY, JOINTS) if wanted else KEYS)
        text, success = read_text(raw), read_success(raw)
        states, _ = read_states(raw, path)
        check_files(root, item.split, item.episode, len(states))
    except PersistWorldError as error:
        return Episode(text, success, error.what, np.empty((0, 0)), _NO_FACTS, None)
    return Episode(text, success, "", states, facts(states), _motion(raw) if wanted else None)


def check_files(root: Path, split: str, episode: str, length: int) -> None:
    """Raise Unreadable where files of an episode are missing, damaged, or hold fewer latents than ``length`` states."""
    num_cameras(root, split, episode)
    for path in latent_files(root, split, episode) if (root / "latent_videos").is_dir() else ():
        layout = read_layout(path)
        if layout.length < length:
            raise Unreadable("latents are shorter than the states", path, f"{layout.length} for {length}")


def num_cameras(root: Path, split: str, episode: str) -> int:
    """Number of cameras V, from the videos, else from the latents. Raises Unreadable: none, or one is missing."""
    folder = root / "videos" / split / episode
    cameras = camera_files(folder) or camera_files(root / "latent_videos" / split / episode)
    if not cameras:
        raise Unreadable("episode has no videos and no latents", folder)
    lost = next((number for number, camera in enumerate(sorted(cameras)) if camera != number), None)
    if lost is not None:
        raise Unreadable(f"camera {lost} is missing", folder)
    return len(cameras)


def latent_files(root: Path, split: str, episode: str) -> list[Path]:
    """An episode's latent files in camera order (.npy preferred to .pt). Raises Unreadable: one is missing."""
    folder = root / "latent_videos" / split / episode
    files = camera_files(folder)
    for camera in range(num_cameras(root, split, episode)):
        if camera not in files:
            fix = "run persistworld extract-latents on the raw recordings"
            raise Unreadable(f"latents of camera {camera} are missing", folder, fix=fix)
    return [files[camera] for camera in sorted(files)]


def camera_files(folder: Path) -> dict[int, Path]:
    """Camera -> its file in an episode's folder; a ``.npy`` is preferred to a ``.pt``."""
    if not folder.is_dir():
        return {}
    found = sorted((p for p in folder.iterdir() if p.stem.isdecimal()), key=lambda p: p.suffix == ".npy")
    return {int(p.stem): p for p in found}


def facts(states: NDArray[np.float64]) -> Facts:
    """Statistics of (T, D) states for the health report."""
    if states.shape[1] != POSE:
        return Facts(float(np.ptp(states, axis=0).max()), *[np.nan] * 5)
    place, grip = states[:, :3], states[:, 6]
    steps = np.linalg.norm(np.diff(place, axis=0), axis=1)
    return Facts(
        extent=float(np.ptp(place, axis=0).max()),
        jump=float(steps.max(initial=0.0)),
        turn=float(_rotations(states[:, 3:6]).max(initial=0.0)),
        wraps=float((np.abs(np.diff(states[:, 3])) > np.pi).sum()),
        grip_low=float(grip.min()),
        grip_high=float(grip.max()),
    )


_NO_FACTS = Facts(*[np.nan] * 6)


def _rotations(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Angles (T - 1,) rad between consecutive orientations (T, 3): roll, pitch, yaw (extrinsic xyz), by quaternions."""
    (sx, sy, sz), (cx, cy, cz) = np.sin(angles.T / 2), np.cos(angles.T / 2)
    real, i = cx * cy * cz + sx * sy * sz, sx * cy * cz - cx * sy * sz
    j, k = cx * sy * cz + sx * cy * sz, cx * cy * sz - sx * sy * cz
    turns = np.stack([real, i, j, k])
    return 2 * np.arccos(np.clip(np.abs((turns[:, 1:] * turns[:, :-1]).sum(axis=0)), 0.0, 1.0))


def _motion(raw: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """Joint positions and velocities (R, 2, J), where the annotation has them."""
    try:
        q, v = (np.asarray(raw[key], dtype=np.float32) for key in (JOINTS, VELOCITY))
    except (KeyError, ValueError, TypeError):
        return None
    usable = q.shape == v.shape and q.ndim == 2 and len(q) > 1 and np.isfinite(q).all() and np.isfinite(v).all()
    return np.stack([q, v], axis=1) if usable else None
