"""Prepare one raw episode for the encoder: annotation, small videos, images in chunks. No torch.

Legend: T frames at the model rate, n of them in a chunk, V cameras, H, W image pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.settings import WorldSettings
from persistworld_cli.data.raw import video
from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.data.raw.resize import resize
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import writing

SUFFIX = {"native": ".npy", "ctrl-world": ".pt"}  # latent layout -> suffix of its files
CHUNK = 16  # frames (of all cameras) that are decoded, resized and handed on at once
ANNOTATION = "annotation.json"  # in the staging folder, beside videos/
_LISTED = ("observation.state.", "action.", "sim.")  # columns copied at the raw rate; sim.: the bundled world's
GO_ON = "free some disk and run the same command again: it continues where it was"
_FETCH = "fetch the episode again, or leave it out"
_SLOWEST = 0.99  # of the model's rate: below it, frames would be repeated


@dataclass(frozen=True)
class Recipe:
    """Settings that all episodes share."""

    raw: Path
    world: WorldSettings
    layout: str  # of the latents, a key of `SUFFIX`


@dataclass(frozen=True)
class EpisodeHeader:
    """The first event: the table is read and the annotation staged."""

    split: str
    frames: int  # T
    has_instruction: bool
    raw_fps: float  # by its timestamps


def split_of(index: int, rule: str, splits: dict[str, tuple[int, int]]) -> str:
    """Split by 'id-ends-99' (DROID), 'info-splits' (info.json's ranges) or 'every-N' (each N-th is val); may raise."""
    if rule == "id-ends-99":
        return "val" if str(index).endswith("99") else "train"
    if rule == "info-splits":
        for name, (first, last) in splits.items():
            if first <= index < last:
                return "val" if name in ("val", "validation", "valid") else name
        raise PersistWorldError(
            f"episode {index} is in no split of info.json ({splits})",
            where="--split-rule",
            fix="use another rule (world.val_rule)",
        )
    every = rule.removeprefix("every-")
    if rule.startswith("every-") and every.isdigit() and int(every) > 1:
        return "val" if index % int(every) == int(every) - 1 else "train"
    raise PersistWorldError(
        f"unknown split rule '{rule}'",
        where="--split-rule",
        fix="use id-ends-99, info-splits or every-N (N > 1), as flag or in world.val_rule",
    )


def prepare(
    recipe: Recipe, dataset: RawDataset, index: int, stage: Path
) -> Iterator[EpisodeHeader | NDArray[np.uint8]]:
    """Read, check and decode one episode: its header, then its images, uint8 (n, V, H, W, 3), n = `CHUNK` or less.

    Annotation and videos are in ``stage`` afterwards. Memory does not depend on the episode's length.

    Raises:
        CannotWrite: the staging folder cannot be written.
        PersistWorldError: something is wrong with the episode.
    """
    world = recipe.world
    split = split_of(index, world.val_rule, dataset.splits)
    clock = dataset.clock(index)
    if clock.fps < _SLOWEST * world.rate_hz:
        raise PersistWorldError(
            f"recorded at {clock.fps:g} fps, under the model's {world.rate_hz:g} Hz",
            where=str(dataset.episode(index).table),
            fix="set world.rate_hz to at most the recorded rate",
        )
    ids = clock.rows(world.rate_hz)
    annotation = _annotation(recipe, dataset, index, split, ids, clock.fps)
    views = [dataset.images(index, camera, ids.tolist(), threads=1) for camera in world.cameras]
    with writing(stage, GO_ON):
        stage.mkdir(parents=True)
        (stage / ANNOTATION).write_text(json.dumps(annotation))  # `Output.publish` moves the staged files
    yield EpisodeHeader(split, len(ids), bool(annotation["texts"][0].strip()), clock.fps)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(video.mp4_writer(stage / "videos" / f"{c}.mp4", world.rate_hz, reproducible=True))
            for c in range(len(views))
        ]
        for begin in range(0, len(ids), CHUNK):
            count = min(CHUNK, len(ids) - begin)
            chunk = np.empty((count, len(views), world.height, world.width, 3), np.uint8)
            for number, (view, add) in enumerate(zip(views, writers, strict=True)):
                images = np.stack(list(islice(view, count)))
                chunk[:, number] = resize(images, world.height, world.width)
                for image in chunk[:, number]:
                    add(image)
            yield chunk
        for view in views:
            next(view, None)  # lets the reader count the remaining frames


def _annotation(
    recipe: Recipe, dataset: RawDataset, index: int, split: str, ids: NDArray[np.int64], raw_fps: float
) -> dict[str, Any]:
    """The annotation with Ctrl-World's keys; ``ids``: the rows that become frames."""
    world = recipe.world
    data, success = _columns(world, dataset, index)
    length = len(next(iter(data.values())))
    states = np.concatenate([data[n].reshape(length, -1) for n in world.state_fields], axis=1)[ids]
    joints = [data[n].reshape(length, -1) for n in world.joint_fields]
    cameras, suffix = range(len(world.cameras)), SUFFIX[recipe.layout]
    return {
        "texts": [dataset.instruction(index)],
        "episode_id": index,
        "success": success,
        "video_length": len(ids),
        "state_length": len(ids),
        "raw_length": length,
        "raw_fps": raw_fps,
        "rate_hz": world.rate_hz,
        "videos": [{"video_path": f"videos/{split}/{index}/{c}.mp4"} for c in cameras],
        "latent_videos": [{"latent_video_path": f"latent_videos/{split}/{index}/{c}{suffix}"} for c in cameras],
        "states": states.tolist(),
        # some robots record none
        **({"joints": np.concatenate(joints, axis=1)[ids].tolist()} if joints else {}),
        **{name: values.tolist() for name, values in data.items()},
    }


def _columns(
    world: WorldSettings, dataset: RawDataset, index: int
) -> tuple[dict[str, NDArray[np.float64]], int | None]:
    """The columns that an annotation copies, checked, and whether the episode succeeded (None: not recorded)."""
    listed = [
        name
        for name, spec in dataset.features.items()
        if name.startswith(_LISTED) and str(spec.get("dtype", "")).startswith("float")
    ]
    required = {*world.state_fields, *world.joint_fields}
    there = dataset.columns(index)
    names = dict.fromkeys([*listed, *world.state_fields, *world.joint_fields])
    data = dataset.read(index, [name for name in names if name in there or name in required])
    length, expected = len(next(iter(data.values()))), dataset.episode(index).length
    where = str(dataset.episode(index).table)
    if length != expected:
        raise PersistWorldError(f"{length} rows, the metadata says {expected}", where=where, fix=_FETCH)
    for name, values in data.items():
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            raise PersistWorldError(
                f"column '{name}' holds values that are not finite numbers", where=where, fix=_FETCH
            )
    success = None
    if "is_episode_successful" in there:
        success = int(bool(dataset.read(index, ["is_episode_successful"])["is_episode_successful"].reshape(-1)[-1]))
    return data, success
