"""Move finished episodes from the staging folder into the dataset, atomically; record the dataset's settings.

The annotation is renamed last: an episode with an annotation is finished. Files are synced to the disk before they are
renamed, so that episodes are whole after a power loss too.

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
_DEFAULTS = {"dtype": "fp32"}  # of settings that older datasets did not record
_MIXABLE = ("raw", "encoder", "encoder_sha256", "dtype")  # readers can mix episodes that differ in these


@dataclass(frozen=True)
class Encoder:
    """The encoder of the latents: its checkpoint, fp32 | bf16 | fp16, and the hash of its files ("": unknown)."""

    name: str = ""
    dtype: str = "fp32"
    sha256: str = ""


@dataclass(frozen=True)
class Changing:
    """How to treat a dataset that was started with other settings."""

    wanted: bool = False  # continue with the new ones, if episodes of both kinds can be mixed
    command: tuple[str, ...] = ()  # as typed, for the error message
    dataset: str = ""  # its name in the command


@dataclass(frozen=True)
class Output:
    """A processed dataset that is being written."""

    root: Path
    recipe: Recipe

    def stage(self, index: int) -> Path:
        """The staging folder of an episode that was just locked; leftovers of a killed run are removed."""
        self.unstage(index)
        return self.root / _STAGING / f"{index}-{os.getpid()}"

    def unstage(self, index: int) -> None:
        """Remove the staging folders of an episode."""
        for left in (self.root / _STAGING).glob(f"{index}-*"):
            shutil.rmtree(left, ignore_errors=True)

    def clean(self, locks: EpisodeLocks) -> None:
        """Remove staging folders of killed runs; those of locked episodes stay."""
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
        """Record the settings that all episodes share, or refuse to add episodes made with others.

        Raises:
            UsageError: the folder's episodes were made with other settings.
            PersistWorldError: the settings of its episodes are unknown.
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
            _log.info(f"resuming: {finished} episodes are finished")
            before = extraction_notes(self.root)
            if changed := _compare(path, before, shared, changing, alone=alone):
                past = [*before.get("changes", []), {"from_episodes": finished, **changed}]
                write_json(path, shared | {"changes": past})
        locks.share_settings()


def _compare(
    path: Path, before: dict[str, Any], shared: dict[str, Any], changing: Changing, *, alone: bool
) -> dict[str, list[Any]]:
    """The changed settings, key -> [old, new]; raises unless the change is requested.

    A key that the record (of an older version) lacks is logged, not refused.
    """
    before = _DEFAULTS | before
    if unknown := [key for key in shared if key not in before]:
        _log.info(f"not recorded for the existing episodes: {', '.join(f'{key} {shared[key]}' for key in unknown)}")
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
        raise UsageError(f"this dataset was started with other settings:{lines}", where=str(path), fix=ways)
    if changed:
        _log.info(f"changed on request:{lines}")
    return changed
