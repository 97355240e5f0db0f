"""A processed dataset on disk (Ctrl-World's layout) and its metadata.

    <root>/annotation/{split}/<id>.json
    <root>/videos/{split}/<id>/{0,1,2}.mp4
    <root>/latent_videos/{split}/<id>/{0,1,2}.npy     float16 (T, C, h1, w): the native form
                                          {0,1,2}.pt      float32 (T, C, h1, w): Ctrl-World's, read in place
    <root>/meta/{index.safetensors, stat.json, joint_velocity_adapter.json}  from `persistworld build-meta`

Legend: T frames at the model rate, C latent channels, V cameras, h1 latent height of one camera, h = V * h1 (cameras
stacked along height in their order), w latent width, N requested frames, H, W image pixels.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.settings import Settings, WorldSettings
from persistworld_cli.data.clips.latent_files import LatentReader
from persistworld_cli.data.metadata import scan
from persistworld_cli.data.metadata.annotations import Annotation, read_annotation
from persistworld_cli.data.metadata.index import INDEX_FILE, ActionStat, EpisodeIndex, IndexFile
from persistworld_cli.data.raw import video
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.files import natural_key
from persistworld_cli.stages import stage

_LOG = logging.getLogger(__name__)


class EpisodeStore:
    """A processed dataset.

    Args:
        root: its folder.
        meta: folder of its metadata; ``<root>/meta`` by default (give another for a read-only dataset).
        stat: file of the percentiles that actions are scaled by; ``<meta>/stat.json`` by default. Weights expect those
            of the data that they were trained on.

    Raises:
        PersistWorldError: the folder holds no processed dataset.
    """

    def __init__(self, root: Path | str, meta: Path | str | None = None, stat: Path | None = None) -> None:
        self.root = Path(root)
        self.meta = Path(meta) if meta else self.root / "meta"
        self._stat = stat or self.meta / "stat.json"
        self._scale: ActionStat | None = None
        scan.require_processed(self.root)
        self._reader = LatentReader(self.root / "latent_videos", self.latent_files)

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

    @stage("reading data")
    def annotation(self, split: str, episode: str) -> Annotation:
        """Read an episode's annotation. Raises PersistWorldError: no such episode, or as `read_annotation`."""
        path = self.root / "annotation" / split / f"{episode}.json"
        if not path.is_file():
            raise PersistWorldError(
                f"no episode '{episode}' in split '{split}'",
                where=str(path.parent),
                fix=self.instead_of(split, [episode]),
            )
        return read_annotation(path)

    def instead_of(self, split: str, absent: list[str]) -> str:
        """What to take instead of episodes that a split lacks: the split that has them all, or some that it has."""
        for other in self.splits:
            if all((self.root / "annotation" / other / f"{episode}.json").is_file() for episode in absent):
                return f"take --split {other}"
        there = self.episodes(split)
        return "take one of: " + (", ".join(there[:12]) + (" ..." if len(there) > 12 else "") or "none there")

    def num_cameras(self, split: str, episode: str) -> int:
        """Number of cameras V; raises as `scan.num_cameras`."""
        return scan.num_cameras(self.root, split, episode)

    def latent_files(self, split: str, episode: str) -> list[Path]:
        """The latent files of an episode in camera order; raises as `scan.latent_files`."""
        return scan.latent_files(self.root, split, episode)

    @stage("reading data")
    def latents(
        self, split: str, episode: str, frame_ids: Sequence[int] | NDArray[np.int64], out: Tensor | None = None
    ) -> Tensor:
        """Latents of some frames: float32 (N, C, h, w), cameras stacked; else as `LatentReader.read`."""
        return self._reader.read(split, episode, [int(i) for i in frame_ids], out)

    def latent_shape(self, split: str, episode: str) -> tuple[int, int, int]:
        """Shape (C, h, w) of an episode's latents of one frame, cameras stacked."""
        frames = [layout.frame for layout in self._reader.layouts(split, episode)]
        return frames[0][0], sum(height for _, height, _ in frames), frames[0][2]

    def require_latents(self, split: str, annotation: Annotation) -> None:
        """Refuse an episode whose latents are fewer than its states, missing or unreadable; as `scan.check_files`."""
        if (self.root / "latent_videos").is_dir():
            scan.check_files(self.root, split, annotation.episode_id, annotation.num_frames)

    @stage("reading data")
    def frames(self, split: str, episode: str, frame_ids: Sequence[int]) -> NDArray[np.uint8]:
        """Images decoded from the mp4s: uint8 (N, V, H, W, 3)."""
        folder = self.root / "videos" / split / episode
        cameras = range(self.num_cameras(split, episode))
        return np.stack([video.read_frames(folder / f"{c}.mp4", frame_ids) for c in cameras], axis=1)

    def stat(self) -> ActionStat:
        """Percentiles that actions are scaled by; Ctrl-World's own where the dataset has only those."""
        if self._scale is not None:
            return self._scale
        path = self._stat
        theirs = sorted((self.root / "meta_info").glob("*/stat.json"))
        if path != self.meta / "stat.json" or path.is_file() or len(theirs) != 1:
            return ActionStat.load(path)
        _LOG.info("no %s: taking Ctrl-World's percentiles from %s", path, theirs[0])
        return ActionStat.load(theirs[0])

    def scaled_by(self, stat: ActionStat) -> EpisodeStore:
        """The same dataset with the percentiles of some weights."""
        other = copy.copy(self)
        other._scale = stat
        return other

    def index(self, split: str) -> EpisodeIndex:
        """The index of a split, from build-meta. Raises PersistWorldError: no index, or no episodes."""
        path = self.meta / INDEX_FILE
        lists = sorted((self.root / "meta_info").glob("*/train_sample.json"))
        if not path.is_file() and lists:
            raise PersistWorldError(
                "dataset has Ctrl-World's lists but no index",
                where=str(path),
                fix=f"persistworld build-meta {self.root} --import {lists[0].parent}",
            )
        return IndexFile(path).split(split)


def open_store(settings: Settings) -> EpisodeStore:
    """The dataset of the settings, with their percentiles; for percentiles of weights, see `weights_stores`.

    Raises:
        UsageError: the settings name no dataset.
        PersistWorldError: the dataset is missing, or of other cameras or another rate.
    """
    if not settings.world.dataset:
        raise UsageError("no dataset named", where="world.dataset", fix="give --dataset, or a preset that names one")
    stat = resolve_path(settings.model.stat) if settings.model.stat else None
    return store_of(settings.world, settings.world.dataset, stat)


def store_of(world: WorldSettings, dataset: str, stat: Path | None = None) -> EpisodeStore:
    """A dataset of these cameras at this rate, by its path or "bundled:NAME". Raises PersistWorldError for others."""
    store = EpisodeStore(resolve_path(dataset), stat=stat)
    for key, (noted, own) in scan.other_world(scan.extraction_notes(store.root), world).items():
        raise PersistWorldError(
            f"the dataset was extracted with world.{key} = {noted}, the settings have {own}",
            where=str(store.root),
            fix=f"set world.{key} = {json.dumps(noted)} (or --preset with it), or extract another dataset with {own}",
        )
    return store
