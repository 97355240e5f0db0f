"""What `build-meta --check` checks in one episode. Needs no torch: worker processes import it.

Legend: T frames at the model rate, D numbers of a state, C latent channels, h1, w latent size of one camera.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from persistworld_cli.data.metadata.annotations import (
    Unreadable,
    load_annotation,
    read_states,
    read_text,
)
from persistworld_cli.data.metadata.latent_header import read_layout
from persistworld_cli.data.metadata.scan import AnnotationStat, camera_files
from persistworld_cli.errors import PersistWorldError

_CONSTANT = 1e-6  # latents that vary less hold no image


@dataclass
class Seen:
    """Findings in an episode as (kind, detail), and the values that are compared between episodes."""

    troubles: list[tuple[str, str]] = field(default_factory=list)
    cameras: int = 0
    numbers: int = 0
    latent: tuple[int, ...] = ()  # (C, h1, w) of the first camera
    images: tuple[int, ...] = ()  # height, width of the first camera's video, where it was opened

    def add(self, kind: str, detail: str = "") -> None:
        """Add a finding; ``kind`` is one of `check_dataset.KINDS`."""
        self.troubles.append((kind, detail))


def inspect(root: Path, there: tuple[bool, bool], request: tuple[AnnotationStat, bool]) -> Seen:
    """Check one episode; ``there``: whether the dataset has any videos, and any latents."""
    item, sampled = request  # sampled: its videos are opened and its latents read whole
    seen = Seen()
    length = _annotation(seen, root, item)
    videos = camera_files(root / "videos" / item.split / item.episode)
    latents = camera_files(root / "latent_videos" / item.split / item.episode)
    seen.cameras = len(videos.keys() | latents.keys())
    cameras = range(max(videos.keys() | latents.keys(), default=0) + 1)
    for kind, files, any_there in (("video", videos, there[0]), ("latent", latents, there[1])):
        if any_there and (missing := [str(camera) for camera in cameras if camera not in files]):
            seen.add(f"{kind}-missing", "camera " + ", ".join(missing))
    for camera, path in sorted(latents.items()):
        _latent(seen, camera, path, length, sampled)
    for camera, path in sorted(videos.items()) if sampled else ():
        _video(seen, camera, path, length)
    return seen


def _annotation(seen: Seen, root: Path, item: AnnotationStat) -> int:
    """Check the annotation strictly; returns the number of its states, 0 if they are unusable."""
    path = root / "annotation" / item.split / f"{item.episode}.json"
    try:
        raw = load_annotation(path)
    except Unreadable as error:
        seen.add("unreadable", error.detail)
        return 0
    named = raw.get("episode_id")
    if named is not None and str(named) != item.episode:
        seen.add("other-id", f"its episode_id is {named}")
    if not read_text(raw).strip():
        seen.add("no-instruction")
    lists = {len(v) for k, v in raw.items() if k.startswith(("observation.state.", "action.")) and isinstance(v, list)}
    if len(lists) > 1:
        seen.add("raw-lists", f"{min(lists)} to {max(lists)} rows")
    try:
        states, _ = read_states(raw, path)
    except Unreadable as error:
        seen.add("states", error.detail or error.what.removeprefix("states "))
        return 0
    seen.numbers = states.shape[1]
    return len(states)


def _latent(seen: Seen, camera: int, path: Path, length: int, sampled: bool) -> None:
    """Check the header of a latent file, and all of its numbers if the episode is sampled."""
    try:
        layout = read_layout(path)
    except Unreadable as error:
        seen.add(error.kind, f"{path.name}: {error.detail}" if error.detail else path.name)
        return
    if seen.latent and layout.frame != seen.latent:
        seen.add("latent-cameras", f"camera 0 {seen.latent}, camera {camera} {layout.frame}")
    seen.latent = seen.latent or layout.frame
    if length and layout.length != length:
        kind = "latent-length" if layout.length < length else "latent-longer"
        seen.add(kind, f"{path.name}: {layout.length} latents, {length} states")
    if sampled:
        count = layout.length * math.prod(layout.frame)
        values = np.fromfile(path, layout.dtype, count, offset=layout.offset)
        if not np.isfinite(values).all():
            seen.add("latent-values", path.name)
        elif np.ptp(values.astype(np.float32)) < _CONSTANT:
            seen.add("latent-constant", path.name)


def _video(seen: Seen, camera: int, path: Path, length: int) -> None:
    """Check the length of a video, and its first and last image."""
    from persistworld_cli.data.raw import video

    try:
        frames = video.count_frames(path)
        images = video.read_frames(path, [0, max(0, frames - 1)])
    except PersistWorldError as error:
        seen.add("video-unreadable", f"{path.name}: {error.what}")
        return
    if length and frames != length:
        kind = "video-length" if frames < length else "video-longer"
        seen.add(kind, f"{path.name}: {frames} frames, {length} states")
    seen.images = seen.images if camera and seen.images else images.shape[1:3]
