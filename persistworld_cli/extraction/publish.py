"""Finished episodes: from the staging folder into place, whole or not at all; and what a dataset was made with.

The annotation is renamed last: where there is one, the episode is finished. Files are synced to the disk before they
are renamed, so that a machine that loses power leaves whole episodes too.

Legend: T frames, V cameras, C latent channels, h1 latent height of one camera, w latent width.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from persistworld_cli.checkpoints.saving import save_torch
from persistworld_cli.command_line import unused_folder, with_changes, with_dataset
from persistworld_cli.data.metadata.scan import NOTES, extraction_notes
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.extraction.locks import EpisodeLocks
from persistworld_cli.extraction.preparing import ANNOTATION, GO_ON, SUFFIX, Recipe
from persistworld_cli.files import sync, write_json, writing

_STAGING = ".staging"
_log = logging.getLogger(__name__)
_DEFAULTS = {"dtype": "fp32"}  # of settings that older datasets do not name
_MIXABLE = ("raw", "encoder", "encoder_sha256", "dtype")  # whoever reads the dataset reads such episodes side by side


@dataclass(frozen=True)
class Encoder:
    """What makes the latents: a checkpoint's name, fp32 | bf16 | fp16, and the hash of its files ("": not known)."""

    name: str = ""
    dtype: str = "fp32"
    sha256: str = ""


@dataclass(frozen=True)
class Changing:
    """What happens to a dataset that was begun with other settings."""

    wanted: bool = False  # continue with the new ones, where episodes of both kinds can be read side by side
    command: tuple[str, ...] = ()  # as it was typed, for the refusal
    dataset: str = ""  # as it is named there


@dataclass(frozen=True)
class Output:
    """A processed dataset that is being written."""

    root: Path
    recipe: Recipe

    def stage(self, index: int) -> Path:
        """The staging folder of an episode that was just claimed; what a killed run left of it is removed."""
        self.unstage(index)
        return self.root / _STAGING / f"{index}-{os.getpid()}"

    def unstage(self, index: int) -> None:
        """Remove what is staged of an episode."""
        for left in (self.root / _STAGING).glob(f"{index}-*"):
            shutil.rmtree(left, ignore_errors=True)

    def clean(self, locks: EpisodeLocks) -> None:
        """Remove what killed runs left staged of episodes that nobody works on."""
        for left in (self.root / _STAGING).glob("*-*"):
            index = left.name.partition("-")[0]
            if index.isdigit() and locks.acquire(int(index)):
                shutil.rmtree(left, ignore_errors=True)
                locks.release(int(index))

    def finished(self) -> set[str]:
        """Ids of all finished episodes, of any split."""
        return {p.stem for p in (self.root / "annotation").glob("*/*.json") if not p.name.startswith(".")}

    def has(self, index: int) -> bool:
        """Whether an episode is finished."""
        return next((self.root / "annotation").glob(f"*/{index}.json"), None) is not None

    def publish(self, index: int, split: str, stage: Path, latents: Tensor) -> None:
        """Put a staged episode in place, with its latents (T, C, V * h1, w), float32. Raises CannotWrite."""
        with writing(self.root, GO_ON):
            self._write(stage, latents)
            for name in ("videos", "latent_videos"):
                target = self.root / name / split / str(index)
                shutil.rmtree(target, ignore_errors=True)  # left by a run stopped between its renames
                target.parent.mkdir(parents=True, exist_ok=True)
                (stage / name).replace(target)
            target = self.root / "annotation" / split / f"{index}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            (stage / ANNOTATION).replace(target)
            shutil.rmtree(stage)

    def _write(self, stage: Path, latents: Tensor) -> None:
        """Latents beside the videos in the staging folder, and all of it onto the disk."""
        folder = stage / "latent_videos"
        folder.mkdir()
        for camera, view in enumerate(latents.chunk(len(self.recipe.world.cameras), dim=2)):
            path = folder / f"{camera}{SUFFIX[self.recipe.layout]}"
            if self.recipe.layout == "native":
                np.save(path, view.to(torch.float16).numpy())
            else:
                save_torch(path, view.clone(memory_format=torch.contiguous_format))
        for path in stage.rglob("*"):
            sync(path)

    def settle(self, locks: EpisodeLocks, encoder: Encoder, changing: Changing) -> None:
        """Note what all episodes share, or refuse to add episodes made otherwise.

        Raises:
            UsageError: the folder's episodes were made with other settings.
            PersistWorldError: nobody knows with which.
        """
        world = self.recipe.world
        shared = {
            "cameras": list(world.cameras),
            "height": world.height,
            "width": world.width,
            "rate_hz": world.rate_hz,
            "layout": self.recipe.layout,
            "val_rule": world.val_rule,
            "encoder": encoder.name,
            "dtype": encoder.dtype,
            "raw": str(self.recipe.raw.absolute()),
            "state_fields": list(world.state_fields),
            "joint_fields": list(world.joint_fields),
            "encoder_sha256": encoder.sha256,
        }
        alone = locks.own_settings()
        if not alone:
            locks.share_settings()
        path, finished = self.root / NOTES, len(self.finished())
        if alone and not finished:
            write_json(path, shared)
        elif not path.is_file():
            raise PersistWorldError(
                f"the folder holds episodes of unknown origin (no {NOTES})",
                where=str(self.root),
                fix="give another output folder",
            )
        else:
            _log.info(f"resuming: {finished} episodes are there")
            before = extraction_notes(self.root)
            if changed := _compare(path, before, shared, changing, alone=alone):
                past = [*before.get("changes", []), {"from_episodes": finished, **changed}]
                write_json(path, shared | {"changes": past})
        locks.share_settings()


def _compare(
    path: Path, before: dict[str, Any], shared: dict[str, Any], changing: Changing, *, alone: bool
) -> dict[str, list[Any]]:
    """The settings that change, key -> [old, new]; refused unless it was asked for.

    A key that the record does not have (an older version's) is logged, not refused.
    """
    before = _DEFAULTS | before
    if unknown := [key for key in shared if key not in before]:
        _log.info(f"not known of the episodes that are there: {', '.join(f'{key} {shared[key]}' for key in unknown)}")
    known = {key: value for key, value in shared.items() if key in before}
    if known.get("encoder_sha256") and known["encoder_sha256"] == before["encoder_sha256"]:
        known.pop("encoder")  # the same weights in another place
    changed = {key: [before[key], value] for key, value in known.items() if before[key] != value}
    lines = "".join(f"\n    {key}: {old} -> {new}" for key, (old, new) in changed.items())
    mixable = alone and all(key in _MIXABLE for key in changed)
    if changed and not (changing.wanted and mixable):
        fresh = with_dataset(changing.command, changing.dataset, unused_folder(path.parent))
        ways = f"write another dataset:\n    {fresh}"
        if mixable:
            ways += f"\n  or continue with the new ones from here:\n    {with_changes(changing.command)}"
        raise UsageError(f"this dataset was begun with other settings:{lines}", where=str(path), fix=ways)
    if changed:
        _log.info(f"changed on request:{lines}")
    return changed
