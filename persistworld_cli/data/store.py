"""A processed dataset on disk (Ctrl-World's layout) and its metadata.

    <root>/annotation/{split}/<id>.json
    <root>/videos/{split}/<id>/{0,1,2}.mp4
    <root>/latent_videos/{split}/<id>/{0,1,2}.npy     float16 (T, C, h1, w), memory-mapped: the native form
                                          {0,1,2}.pt      float32 (T, C, h1, w), Ctrl-World's form
    <root>/meta/{index.npz, stat.json, adapter.json}  from `persistworld build-meta`

Legend: T frames at the model rate, D state numbers, C latent channels, V cameras, h1 latent height of one camera,
h = V * h1 (cameras stacked along height in their order), w latent width, N frames asked for, H, W picture pixels.
"""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from persistworld_cli.data import video
from persistworld_cli.errors import PersistWorldError

_OPEN_EPISODES = 64  # episodes whose latent files stay memory-mapped
_REBUILD = "run persistworld build-meta again"
_REDO = "delete the episode's annotation and run persistworld extract-latents again"


@dataclass(frozen=True)
class Annotation:
    """One episode: what was asked, and the states (T, D) and joints (T, 8) or None at the model rate, float64."""

    episode_id: str
    text: str
    states: NDArray[np.float64]
    joints: NDArray[np.float64] | None
    success: bool | None
    num_frames: int
    raw: dict[str, Any]


@dataclass(frozen=True)
class ActionStat:
    """1st and 99th percentile (D,) of the training states, by which poses are scaled to [-1, 1]."""

    p01: NDArray[np.float64]
    p99: NDArray[np.float64]

    def normalise(self, pose: ArrayLike) -> NDArray[np.float32]:
        """``clip(2 (a - p01) / (p99 - p01 + 1e-8) - 1, -1, 1)`` of (..., D), computed in float64 (method.md 1)."""
        value = np.asarray(pose, dtype=np.float64)
        scaled = 2 * (value - self.p01) / (self.p99 - self.p01 + 1e-8) - 1
        return np.clip(scaled, -1, 1).astype(np.float32)

    @classmethod
    def load(cls, path: Path) -> ActionStat:
        """Read a stat.json with ``state_01`` and ``state_99``.

        Raises:
            PersistWorldError: missing or unreadable file.
        """
        if not path.is_file():
            raise PersistWorldError(
                "percentiles of the states are missing", where=str(path), fix="run persistworld build-meta on it"
            )
        try:
            data = json.loads(path.read_text())
            p01, p99 = (np.asarray(data[key], dtype=np.float64) for key in ("state_01", "state_99"))
        except (ValueError, KeyError, TypeError) as error:
            raise PersistWorldError(f"unreadable percentiles: {error!r}", where=str(path), fix=_REBUILD) from error
        if p01.shape != p99.shape or p01.ndim != 1:
            raise PersistWorldError("state_01 and state_99 differ in shape", where=str(path), fix=_REBUILD)
        return cls(p01, p99)


@dataclass(frozen=True)
class EpisodeIndex:
    """What clip drawing needs of every episode of one split, in memory. Episode e owns rows offsets[e]:offsets[e+1]."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    lengths: NDArray[np.int64]
    offsets: NDArray[np.int64]
    states: NDArray[np.floating[Any]]


class EpisodeStore:
    """A processed dataset.

    Args:
        root: its folder.
        meta: folder of its metadata; ``<root>/meta`` by default (give another for a read-only dataset).

    Raises:
        PersistWorldError: the folder holds no processed dataset.
    """

    def __init__(self, root: Path | str, meta: Path | str | None = None) -> None:
        self.root = Path(root)
        self.meta = Path(meta) if meta else self.root / "meta"
        if not (self.root / "annotation").is_dir():
            raise PersistWorldError(
                "no processed dataset here (folder annotation/ is missing)",
                where=str(self.root),
                fix="run persistworld extract-latents, or give the folder that holds annotation/ and videos/",
            )
        self._open: OrderedDict[Path, Any] = OrderedDict()

    @property
    def splits(self) -> list[str]:
        """Names of the splits that have a folder."""
        return sorted(p.name for p in (self.root / "annotation").iterdir() if p.is_dir())

    def episodes(self, split: str) -> list[str]:
        """Ids of a split in natural order ('2' before '10'); empty if the split has none."""
        folder = self.root / "annotation" / split
        if not folder.is_dir():
            return []
        return sorted((p.stem for p in folder.iterdir() if p.suffix == ".json" and p.name[0] != "."), key=natural_key)

    def annotation(self, split: str, episode: str) -> Annotation:
        """Read an episode's annotation; only ``texts`` and ``states`` must be there.

        Raises:
            PersistWorldError: no such episode, or unreadable.
        """
        path = self.root / "annotation" / split / f"{episode}.json"
        if not path.is_file():
            raise PersistWorldError(
                f"no episode '{episode}' in split '{split}'",
                where=str(path.parent),
                fix=f"take one of: {', '.join(self.episodes(split)[:12]) or 'none there'}",
            )
        try:
            raw = json.loads(path.read_text())
            states = np.asarray(raw["states"], dtype=np.float64)
            joints = np.asarray(raw["joints"], dtype=np.float64) if raw.get("joints") else None
            texts = raw.get("texts") or [""]
            length = int(raw.get("video_length", len(states)))
        except (ValueError, KeyError, TypeError) as error:
            raise PersistWorldError(f"unreadable annotation: {error!r}", where=str(path), fix=_REDO) from error
        if states.ndim != 2 or not len(states):
            raise PersistWorldError(f"states have shape {states.shape}", where=str(path), fix=_REDO)
        success = raw.get("success")
        return Annotation(
            episode_id=episode,
            text=str(texts[0]),
            states=states,
            joints=joints,
            success=None if success is None else bool(success),
            num_frames=min(length, len(states)),
            raw=raw,
        )

    def num_cameras(self, split: str, episode: str) -> int:
        """Number of cameras V, from the episode's video folder (latent folder if there are no videos)."""
        for folder in (self._video_dir(split, episode), self._latent_dir(split, episode)):
            stems = {p.stem for p in folder.glob("[0-9]*.*")} if folder.is_dir() else set()
            if stems:
                missing = {str(i) for i in range(len(stems))} - stems
                if missing:
                    raise PersistWorldError(f"camera {min(missing)} is missing", where=str(folder), fix=_REDO)
                return len(stems)
        raise PersistWorldError("episode has no videos", where=str(self._video_dir(split, episode)), fix=_REDO)

    def latent_files(self, split: str, episode: str) -> list[Path]:
        """The latent files of an episode in camera order (.npy preferred to .pt).

        Raises:
            PersistWorldError: there are none, or one camera is missing.
        """
        folder = self._latent_dir(split, episode)
        out: list[Path] = []
        for camera in range(self.num_cameras(split, episode)):
            found = [p for p in (folder / f"{camera}.npy", folder / f"{camera}.pt") if p.is_file()]
            if not found:
                raise PersistWorldError(
                    f"latents of camera {camera} of episode '{episode}' are missing",
                    where=str(folder),
                    fix="run persistworld extract-latents on the raw recordings",
                )
            out.append(found[0])
        return out

    def latents(self, split: str, episode: str, frame_ids: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Latents of the frames asked for: float32 (N, C, h, w), cameras stacked; only those frames are read.

        Raises:
            PersistWorldError: missing or unreadable files, a frame beyond the episode.
        """
        wanted = np.asarray(frame_ids, dtype=np.int64)
        parts = []
        for array in self._latent_arrays(split, episode):
            if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(array):
                raise PersistWorldError(
                    f"frames {wanted.min()}..{wanted.max()} asked of an episode with {len(array)} latents",
                    where=str(self._latent_dir(split, episode)),
                    fix="run persistworld build-meta again: index and latents disagree",
                )
            rows = array[torch.from_numpy(wanted)] if isinstance(array, Tensor) else torch.from_numpy(array[wanted])
            parts.append(rows.to(torch.float32))
        return torch.cat(parts, dim=2)

    def num_latents(self, split: str, episode: str) -> list[int]:
        """Number of latent frames T of each camera."""
        return [len(array) for array in self._latent_arrays(split, episode)]

    def frames(self, split: str, episode: str, frame_ids: Sequence[int]) -> NDArray[np.uint8]:
        """Pictures decoded from the mp4s: uint8 (N, V, H, W, 3)."""
        folder = self._video_dir(split, episode)
        cameras = range(self.num_cameras(split, episode))
        return np.stack([video.read_frames(folder / f"{c}.mp4", frame_ids) for c in cameras], axis=1)

    def stat(self) -> ActionStat:
        """Percentiles of the training states, from build-meta."""
        return ActionStat.load(self.meta / "stat.json")

    def index(self, split: str) -> EpisodeIndex:
        """The index of a split, from build-meta.

        Raises:
            PersistWorldError: metadata missing, or the split has no episodes.
        """
        path = self.meta / "index.npz"
        if not path.is_file():
            raise PersistWorldError("dataset has no index", where=str(path), fix="run persistworld build-meta on it")
        with np.load(path, allow_pickle=False) as data:
            ids, texts, splits = (json.loads(bytes(data[key])) for key in ("ids", "texts", "splits"))
            offsets, lengths, states = data["offsets"], data["lengths"], data["states"]
        rows = [i for i, name in enumerate(splits) if name == split]
        if not rows:
            raise PersistWorldError(
                f"split '{split}' has no episodes",
                where=str(path),
                fix=f"take one of: {', '.join(sorted(set(splits)))}",
            )
        return EpisodeIndex(
            ids=tuple(ids[i] for i in rows),
            texts=tuple(texts[i] for i in rows),
            lengths=lengths[rows],
            offsets=np.concatenate([[0], np.cumsum(lengths[rows])]),
            states=np.concatenate([states[offsets[i] : offsets[i] + lengths[i]] for i in rows]),
        )

    def _video_dir(self, split: str, episode: str) -> Path:
        return self.root / "videos" / split / episode

    def _latent_dir(self, split: str, episode: str) -> Path:
        return self.root / "latent_videos" / split / episode

    def _latent_arrays(self, split: str, episode: str) -> list[Any]:
        """Memory-mapped latents (T, C, h1, w) of each camera; recently used episodes stay open."""
        key = self._latent_dir(split, episode)
        if key in self._open:
            self._open.move_to_end(key)
            return list(self._open[key])
        arrays = [_map_latents(path) for path in self.latent_files(split, episode)]
        self._open[key] = arrays
        while len(self._open) > _OPEN_EPISODES:
            self._open.popitem(last=False)
        return arrays


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key under which digits count as numbers: '9' < '10', '0008' < '0011'; any two names compare."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts], name


def write_json(path: Path, data: Any) -> None:
    """Write JSON beside and rename: a reader finds the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(data))
    partial.replace(path)


def _map_latents(path: Path) -> Any:
    """Open a latent file without reading it: a numpy memory map (.npy) or a memory-mapped tensor (.pt)."""
    try:
        if path.suffix == ".npy":
            array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            try:
                array = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # written in torch's old format, which cannot be memory-mapped
                array = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise PersistWorldError(f"unreadable latents: {error}", where=str(path), fix=_REDO) from error
    if getattr(array, "ndim", 0) != 4:
        raise PersistWorldError("latents are not of shape (T, C, h, w)", where=str(path), fix=_REDO)
    return array
