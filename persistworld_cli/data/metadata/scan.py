"""What build-meta takes from an episode, and which episodes it has to read again.

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

from persistworld_cli.data.metadata.annotations import (
    KEYS,
    Unreadable,
    load_annotation,
    read_joints,
    read_states,
    read_success,
    read_text,
)
from persistworld_cli.data.metadata.latent_header import read_header
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import natural_key
from persistworld_cli.read_files import DAMAGED_NOTES, positive_number, read_json, reading

VELOCITY = "action.joint_velocity"
JOINTS = "observation.state.joint_position"
POSE = 7  # x y z, roll pitch yaw, gripper: the only state whose numbers have a meaning here


class Listed(NamedTuple):
    """An annotation on disk, and what tells whether it or the episode's folders changed (0: no such folder)."""

    split: str
    episode: str
    size: int
    mtime: int  # ns, as the two below
    videos: int
    latents: int

    @property
    def name(self) -> str:
        """As people are told of it."""
        return f"{self.split}/{self.episode}"


class Facts(NamedTuple):
    """What the health report asks of an episode; the last five are nan where states are no poses of 7 numbers."""

    reach: float  # the widest range of any coordinate (a pose: of x, y, z; m)
    jump: float  # longest way in one frame, m
    turn: float  # largest rotation in one frame, rad
    wraps: float  # how often roll jumps between +pi and -pi
    grip_low: float
    grip_high: float


@dataclass(frozen=True)
class Episode:
    """What is kept of an annotation. ``problem`` is why it cannot be trained on, '' if it can."""

    text: str
    success: bool | None
    problem: str
    states: NDArray[np.float64]  # (T, D); (0, 0) with a problem
    facts: Facts
    motion: NDArray[np.float32] | None  # (R, 2, J) joint positions (rad) and velocities, where they were asked for


def list_annotations(root: Path) -> list[Listed]:
    """Every annotation of a dataset: splits in order of name, episodes in natural order."""
    out: list[Listed] = []
    for split in sorted(e.name for e in os.scandir(root / "annotation") if e.is_dir()):
        videos, latents = _changed(root / "videos" / split), _changed(root / "latent_videos" / split)
        for entry in os.scandir(root / "annotation" / split):
            if entry.name.endswith(".json") and not entry.name.startswith("."):
                episode, stat = entry.name.removesuffix(".json"), entry.stat()
                folders = videos.get(episode, 0), latents.get(episode, 0)
                out.append(Listed(split, episode, stat.st_size, stat.st_mtime_ns, *folders))
    return sorted(out, key=lambda item: (item.split, natural_key(item.episode)))


def _changed(folder: Path) -> dict[str, int]:
    """Episode -> when its folder last got, lost or renamed a file."""
    return {e.name: e.stat().st_mtime_ns for e in os.scandir(folder) if e.is_dir()} if folder.is_dir() else {}


def extraction_notes(root: Path) -> dict[str, Any]:
    """What extract-latents noted of the dataset (extract.json); empty for datasets of other origin.

    Raises:
        PersistWorldError: it is damaged.
    """
    path = root / "extract.json"
    if not path.is_file():
        return {}
    with reading("unreadable notes of the extraction", path, DAMAGED_NOTES):
        noted = read_json(path, "unreadable notes of the extraction", DAMAGED_NOTES)
        if "rate_hz" in noted:
            positive_number(noted["rate_hz"], "rate_hz")
        return noted


def read_episode(root: Path, check_latents: bool, request: tuple[Listed, bool]) -> Episode:
    """Read and check one episode; ``request``: which, and whether its motion is wanted for the adapter's fit."""
    item, wanted = request
    path = root / "annotation" / item.split / f"{item.episode}.json"
    text, success = "", None
    try:
        raw = load_annotation(path, (*KEYS, VELOCITY, JOINTS) if wanted else KEYS)
        text, success = read_text(raw), read_success(raw)
        states = read_states(raw, path)
        read_joints(raw, path, len(states))
        check_files(root, item.split, item.episode, len(states), check_latents)
    except PersistWorldError as error:
        return Episode(text, success, error.what, np.empty((0, 0)), _NO_FACTS, None)
    return Episode(text, success, "", states, facts(states), _motion(raw) if wanted else None)


def check_files(root: Path, split: str, episode: str, length: int, latents: bool) -> None:
    """Raise for an episode whose files training could not use.

    Args:
        root: the dataset.
        split, episode: which.
        length: frames that its states have.
        latents: also look into the latent files (where the dataset has any).
    """
    folder = root / "latent_videos" / split / episode
    cameras = camera_files(root / "videos" / split / episode) or camera_files(folder)
    if not cameras:
        raise Unreadable("no videos and no latents", where=str(folder))
    lost = next((number for number, camera in enumerate(sorted(cameras)) if camera != number), None)
    if lost is not None:
        raise Unreadable(f"camera {lost} is missing", where=str(folder))
    if not latents or not (root / "latent_videos").is_dir():
        return
    files = camera_files(folder)
    for camera in sorted(cameras):
        if camera not in files:
            raise Unreadable(f"latents of camera {camera} are missing", where=str(folder))
        try:
            header = read_header(files[camera])
        except Exception as error:  # a damaged header raises many kinds
            raise Unreadable("unreadable latents", where=f"{files[camera]} ({error})") from error
        if header is None:
            raise Unreadable("latents are in torch's format from before version 1.6", where=str(files[camera]))
        if len(header.shape) != 4:
            raise Unreadable("latents are not of shape (T, C, h, w)", where=str(files[camera]))
        if header.shape[0] < length:
            raise Unreadable("latents are shorter than the states", where=str(files[camera]))


def camera_files(folder: Path) -> dict[int, Path]:
    """Camera -> its file in an episode's folder; a ``.npy`` is preferred to a ``.pt``."""
    if not folder.is_dir():
        return {}
    found = sorted((p for p in folder.iterdir() if p.stem.isdecimal()), key=lambda p: p.suffix == ".npy")
    return {int(p.stem): p for p in found}


def facts(states: NDArray[np.float64]) -> Facts:
    """What the health report asks of (T, D) states."""
    if states.shape[1] != POSE:
        return Facts(float(np.ptp(states, axis=0).max()), *[np.nan] * 5)
    place, grip = states[:, :3], states[:, 6]
    steps = np.linalg.norm(np.diff(place, axis=0), axis=1)
    return Facts(
        reach=float(np.ptp(place, axis=0).max()),
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
    turns = np.stack(
        [
            cx * cy * cz + sx * sy * sz,
            sx * cy * cz - cx * sy * sz,
            cx * sy * cz + sx * cy * sz,
            cx * cy * sz - sx * sy * cz,
        ]
    )
    return 2 * np.arccos(np.clip(np.abs((turns[:, 1:] * turns[:, :-1]).sum(axis=0)), 0.0, 1.0))


def _motion(raw: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """Joint positions and velocities (R, 2, J), where the annotation has them."""
    try:
        q, v = (np.asarray(raw[key], dtype=np.float32) for key in (JOINTS, VELOCITY))
    except (KeyError, ValueError, TypeError):
        return None
    usable = q.shape == v.shape and q.ndim == 2 and len(q) > 1 and np.isfinite(q).all() and np.isfinite(v).all()
    return np.stack([q, v], axis=1) if usable else None
