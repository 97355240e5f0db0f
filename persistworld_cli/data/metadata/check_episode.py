"""What `build-meta --check` looks at in one episode. Needs no torch: worker processes import it.

Legend: T frames at the model rate, D numbers of a state, C latent channels, h1, w latent size of one camera.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from persistworld_cli.data.metadata.annotations import (
    Unreadable,
    load_annotation,
    read_joints,
    read_states,
    read_text,
)
from persistworld_cli.data.metadata.latent_header import read_header
from persistworld_cli.data.metadata.scan import Listed, camera_files
from persistworld_cli.errors import PersistWorldError

_LATENT_TYPES = ("float16", "float32")
_CONSTANT = 1e-6  # latents that vary less hold no image


@dataclass(frozen=True)
class Expected:
    """What a preset takes: names of cameras, image size, rate, state width, latents (C, h1, w) of one camera."""

    preset: str
    cameras: tuple[str, ...]
    height: int
    width: int
    rate_hz: float
    numbers: int
    latent: tuple[int, int, int]


@dataclass
class Seen:
    """What was found in an episode: troubles as (kind, detail), and what is compared between episodes."""

    troubles: list[tuple[str, str]] = field(default_factory=list)
    cameras: int = 0
    numbers: int = 0
    latent: tuple[int, ...] = ()  # (C, h1, w) of the first camera
    images: tuple[int, int] = (0, 0)  # height, width of the first camera's video, where it was opened


def inspect(root: Path, there: tuple[bool, bool], request: tuple[Listed, bool]) -> Seen:
    """Everything about one episode.

    Args:
        root: the dataset.
        there: whether the dataset has any videos, and any latents.
        request: which, and whether it is one of those whose videos are opened and whose latents are read whole.
    """
    item, sampled = request
    seen = Seen()
    length = _annotation(seen, root, item)
    videos = camera_files(root / "videos" / item.split / item.episode)
    latents = camera_files(root / "latent_videos" / item.split / item.episode)
    seen.cameras = len(set(videos) | set(latents))
    if there[0]:
        _cameras(seen, "video", set(videos), set(latents) if there[1] else set())
    if there[1]:
        _cameras(seen, "latent", set(latents), set(videos) if there[0] else set())
    for camera, path in sorted(latents.items()):
        _latent(seen, camera, path, length, sampled)
    for camera, path in sorted(videos.items()) if sampled else ():
        _video(seen, camera, path, length)
    return seen


def _annotation(seen: Seen, root: Path, item: Listed) -> int:
    """The annotation, strictly; returns the number of its states, 0 if they are of no use."""
    path = root / "annotation" / item.split / f"{item.episode}.json"
    try:
        raw = load_annotation(path)
    except Unreadable as error:
        seen.troubles.append(("unreadable", (error.where or "").partition(" ")[2].strip("()")))
        return 0
    named = raw.get("episode_id")
    if named is not None and str(named) != item.episode:
        seen.troubles.append(("other-id", f"its episode_id is {named}"))
    if not read_text(raw).strip():
        seen.troubles.append(("no-instruction", ""))
    _raw_lists(seen, raw)
    try:
        states = read_states(raw, path)
        read_joints(raw, path, len(states))
    except Unreadable as error:
        seen.troubles.append(("states", _why(error.what, raw)))
        return 0
    seen.numbers = states.shape[1]
    return len(states)


def _why(what: str, raw: Mapping[str, Any]) -> str:
    """The reason with the numbers that belong to it."""
    if what.startswith("video_length"):
        return f"video_length is {raw.get('video_length')!r}, there are {len(raw['states'])} states"
    if what.startswith("there are not as many joints"):
        return f"there are {len(raw['joints'])} joints and {len(raw['states'])} states"
    return what.removeprefix("states ")


def _raw_lists(seen: Seen, raw: Mapping[str, Any]) -> None:
    """Lists at the raw rate should be as long as each other."""
    lengths = {
        len(v) for k, v in raw.items() if k.startswith(("observation.state.", "action.")) and isinstance(v, list)
    }
    if len(lengths) > 1:
        seen.troubles.append(("raw-lists", f"{min(lengths)} to {max(lengths)} rows"))


def _cameras(seen: Seen, kind: str, have: set[int], other: set[int]) -> None:
    """Files of a kind must be 0, 1, 2, ... and those of the other kind's cameras."""
    wanted = set(range(max(have | other, default=0) + 1))
    missing = sorted(wanted - have)
    if missing:
        seen.troubles.append((f"{kind}-missing", "camera " + ", ".join(map(str, missing))))


def _latent(seen: Seen, camera: int, path: Path, length: int, sampled: bool) -> None:
    """Header of a latent file; all of its numbers if it is sampled."""
    try:
        header = read_header(path)
    except (OSError, ValueError) as error:
        seen.troubles.append(("latent-unreadable", f"{path.name}: {error}"))
        return
    if header is None:
        seen.troubles.append(("latent-old", path.name))
        return
    if len(header.shape) != 4 or min(header.shape) < 1:
        seen.troubles.append(("latent-shape", f"{path.name}: {header.shape}"))
        return
    if header.dtype not in _LATENT_TYPES:
        seen.troubles.append(("latent-type", f"{path.name}: {header.dtype}"))
        return
    if seen.latent and header.shape[1:] != seen.latent:
        seen.troubles.append(("latent-cameras", f"camera 0 {seen.latent}, camera {camera} {header.shape[1:]}"))
    seen.latent = seen.latent or header.shape[1:]
    if length and header.shape[0] != length:
        kind = "latent-length" if header.shape[0] < length else "latent-longer"
        seen.troubles.append((kind, f"{path.name}: {header.shape[0]} latents, {length} states"))
    if sampled:
        values = np.fromfile(path, header.dtype, math.prod(header.shape), offset=header.offset)
        if not np.isfinite(values).all():
            seen.troubles.append(("latent-values", path.name))
        elif np.ptp(values.astype(np.float32)) < _CONSTANT:
            seen.troubles.append(("latent-constant", path.name))


def _video(seen: Seen, camera: int, path: Path, length: int) -> None:
    """Length of a video, and its first and last image."""
    from persistworld_cli.data.raw import video

    try:
        frames = video.count_frames(path)
        images = video.read_frames(path, [0, max(0, frames - 1)])
    except PersistWorldError as error:
        seen.troubles.append(("video-unreadable", f"{path.name}: {error.what}"))
        return
    if length and frames != length:
        kind = "video-length" if frames < length else "video-longer"
        seen.troubles.append((kind, f"{path.name}: {frames} frames, {length} states"))
    seen.images = seen.images if camera and seen.images != (0, 0) else (images.shape[1], images.shape[2])
