"""Finished episodes: from the staging folder into place, whole or not at all; and what a dataset was made with.

The annotation is renamed last, so that one that stands means a finished episode. Files are on the disk before they are
renamed: not only a killed process but a machine that loses power leaves whole episodes.

Legend: T frames, V cameras, C latent channels, h1 latent height of one camera, w latent width.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from persistworld_cli.config.settings import WorldSettings
from persistworld_cli.data.clips.store import write_json
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.extraction.locks import Claims
from persistworld_cli.extraction.preparing import ANNOTATION
from persistworld_cli.read_files import DAMAGED_NOTES, read_json

SUFFIX = {"native": ".npy", "ctrl-world": ".pt"}  # latent layout -> suffix of its files
_SHARED = "extract.json"  # what all episodes of a dataset have in common
_STAGING = ".staging"
_DEFAULTS = {"dtype": "fp32"}  # of settings that older datasets do not name


@dataclass(frozen=True)
class Output:
    """A processed dataset that is being written.

    Args:
        root: its folder.
        layout: of the latents, a key of `SUFFIX`.
    """

    root: Path
    layout: str

    def stage(self, index: int) -> Path:
        """The staging folder of an episode that was just claimed; what a killed run left of it is removed."""
        self.unstage(index)
        return self.root / _STAGING / f"{index}-{os.getpid()}"

    def unstage(self, index: int) -> None:
        """Remove what is staged of an episode."""
        for left in (self.root / _STAGING).glob(f"{index}-*"):
            shutil.rmtree(left, ignore_errors=True)

    def clean(self, claims: Claims) -> None:
        """Remove what killed runs left staged of episodes that nobody works on."""
        for left in (self.root / _STAGING).glob("*-*"):
            index = left.name.partition("-")[0]
            if index.isdigit() and claims.take(int(index)):
                shutil.rmtree(left, ignore_errors=True)
                claims.drop(int(index))

    def finished(self) -> set[str]:
        """Ids of all finished episodes, of any split."""
        return {p.stem for p in (self.root / "annotation").glob("*/*.json") if not p.name.startswith(".")}

    def has(self, index: int) -> bool:
        """Whether an episode is finished."""
        return next((self.root / "annotation").glob(f"*/{index}.json"), None) is not None

    def publish(self, index: int, split: str, stage: Path, latents: Tensor, cameras: int) -> None:
        """Put a staged episode in place, with its latents (T, C, V * h1, w), float32.

        Raises:
            PersistWorldError: the disk is full or closed to us.
        """
        try:
            self._write(stage, latents, cameras)
            for name in ("videos", "latent_videos"):
                target = self.root / name / split / str(index)
                shutil.rmtree(target, ignore_errors=True)  # left by a run stopped between its renames
                target.parent.mkdir(parents=True, exist_ok=True)
                (stage / name).replace(target)
            target = self.root / "annotation" / split / f"{index}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            (stage / ANNOTATION).replace(target)
            shutil.rmtree(stage)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise PersistWorldError(
                f"episode {index} cannot be written: {error}",
                where=str(self.root),
                fix="free some disk and run the same command again: it goes on where it was",
            ) from error

    def _write(self, stage: Path, latents: Tensor, cameras: int) -> None:
        """Latents beside the videos in the staging folder, and all of it onto the disk."""
        folder = stage / "latent_videos"
        folder.mkdir()
        for camera, view in enumerate(latents.chunk(cameras, dim=2)):
            path = folder / f"{camera}{SUFFIX[self.layout]}"
            if self.layout == "native":
                np.save(path, view.to(torch.float16).numpy())
            else:
                torch.save(view.clone(memory_format=torch.contiguous_format), path)
        for path in (*folder.iterdir(), *(stage / "videos").iterdir(), stage / ANNOTATION):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def settle(self, claims: Claims, world: WorldSettings, rule: str, encoder: str, dtype: str) -> None:
        """Note what all episodes share, or refuse to add episodes made otherwise.

        Raises:
            PersistWorldError: the folder's episodes were made with other settings, or nobody knows with which.
        """
        shared = {
            "cameras": list(world.cameras),
            "height": world.height,
            "width": world.width,
            "rate_hz": world.rate_hz,
            "layout": self.layout,
            "val_rule": rule,
            "encoder": encoder,
            "dtype": dtype,
        }
        alone = claims.own_settings()
        if not alone:
            claims.share_settings()
        path = self.root / _SHARED
        if alone and not self.finished():
            write_json(path, shared)
        elif not path.is_file():
            raise PersistWorldError(
                f"the folder holds episodes of unknown origin (no {_SHARED})",
                where=str(self.root),
                fix="give another output folder",
            )
        else:
            _compare(path, shared)
        claims.share_settings()


def _compare(path: Path, shared: dict[str, Any]) -> None:
    """Refuse to go on with other settings than the ones on record."""
    before = _DEFAULTS | read_json(path, "unreadable notes of the extraction", DAMAGED_NOTES)
    changed = [f"{k}: {before.get(k)!r} -> {v!r}" for k, v in shared.items() if before.get(k) != v]
    if changed:
        raise PersistWorldError(
            f"this dataset was begun with other settings ({'; '.join(changed)})",
            where=str(path),
            fix="give another output folder, or the settings it was begun with",
        )
