"""From raw LeRobot recordings to a processed dataset: pictures at the model's rate and size, latents, annotations.

An episode is written whole or not at all: everything goes to a staging folder and is renamed into place, the annotation
last. So an annotation means a finished episode, and a stopped run continues where it was.

Legend: T frames at the model rate, V cameras, H, W picture pixels, C latent channels, h1 latent height of one camera,
h = V * h1, w latent width.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persistworld_cli.config.settings import WorldSettings
from persistworld_cli.data import video
from persistworld_cli.data.lerobot import RawDataset
from persistworld_cli.data.store import write_json
from persistworld_cli.errors import PersistWorldError, nearest

Encode = Callable[[Tensor], Tensor]  # uint8 (N, V, H, W, 3) -> (N, C, h, w), cameras stacked
LAYOUTS = ("native", "ctrl-world")
_SHARED = "extract.json"  # what all episodes of a dataset have in common
_LISTED = ("observation.state.", "action.", "sim.")  # columns copied at the raw rate; sim.: the bundled world's
_FETCH = "fetch the episode again, or leave it out"


@dataclass
class ExtractReport:
    """What became of the episodes: ids done now, ids already there, and failures as {episode, reason}."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    absent: int = 0  # named by the raw metadata but not on disk: normal for a part of a dataset


@dataclass(frozen=True)
class Progress:
    """Sent after every episode: how many of this process's episodes are settled, of how many, and the last one."""

    settled: int
    total: int
    episode: str
    outcome: str  # done | failed


@dataclass
class _Prepared:
    """An episode whose pictures are decoded and whose videos are staged."""

    episode_id: str
    split: str
    frames: NDArray[np.uint8]  # (T, V, H, W, 3)
    annotation: dict[str, Any]
    stage: Path


def resample_ids(length: int, raw_fps: float, rate_hz: float) -> NDArray[np.int64]:
    """Raw frame numbers of the model's frames: every k-th for a whole ratio (15 -> 5 Hz: 0, 3, ...), else the nearest.

    Frame i stands at raw frame ``i * raw_fps / rate_hz``; there are as many as have a nearest raw frame.
    """
    ratio = raw_fps / rate_hz
    ids = np.floor(np.arange(int(length / ratio) + 2) * ratio + 0.5 + 1e-9).astype(np.int64)
    return ids[ids < length]


def split_of(index: int, rule: str, splits: dict[str, tuple[int, int]]) -> str:
    """Split of an episode: 'id-ends-99' (DROID), 'info-splits' (ranges of info.json), 'every-N' (each N-th is val).

    Raises:
        PersistWorldError: unknown rule, or (info-splits) the episode lies in no range.
    """
    if rule == "id-ends-99":
        return "val" if str(index).endswith("99") else "train"
    if rule == "info-splits":
        for name, (first, last) in splits.items():
            if first <= index < last:
                return "val" if name in ("val", "validation", "valid") else name
        raise PersistWorldError(
            f"episode {index} is in no split of info.json ({splits})",
            where="world.val_rule",
            fix="use another val_rule",
        )
    every = rule.removeprefix("every-")
    if rule.startswith("every-") and every.isdigit() and int(every) > 1:
        return "val" if index % int(every) == int(every) - 1 else "train"
    raise PersistWorldError(
        f"unknown split rule '{rule}'", where="world.val_rule", fix="use id-ends-99, info-splits or every-N (N > 1)"
    )


def extract_latents(
    world: WorldSettings,
    raw: Path,
    out: Path,
    encode: Encode,
    *,
    episodes: set[int] | None = None,
    layout: str = "native",
    split_rule: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    batch_frames: int = 32,
    progress: Callable[[Progress], None] | None = None,
    strict: bool = False,
    encoder_id: str = "",
) -> ExtractReport:
    """Extract this process's share of the episodes of ``raw`` into ``out``; finished ones are skipped.

    Args:
        world: cameras, picture size, rate and state columns.
        encode: pictures uint8 (N, V, H, W, 3) to scaled latents (N, C, h, w), cameras stacked along height.
        episodes: only these indices; all on disk by default.
        layout: 'native' (.npy float16) or 'ctrl-world' (.pt float32).
        split_rule: see `split_of`; ``world.val_rule`` by default.
        batch_frames: frames (of all cameras) encoded at once.
        strict: raise at the first bad episode instead of naming it in the report.
        encoder_id: what made the latents (a checkpoint's name); a dataset never mixes two.

    Raises:
        PersistWorldError: bad raw dataset, unknown layout or rule, ``out`` was begun with other settings; strict: any.
    """
    if layout not in LAYOUTS:
        raise PersistWorldError(f"unknown latent layout '{layout}'", where="--layout", fix=f"use one of {LAYOUTS}")
    dataset = RawDataset(raw)
    _check_world(world, dataset)
    rule = split_rule or world.val_rule
    split_of(0, "every-2" if rule == "info-splits" else rule, {})  # an unknown rule is no fault of the episodes
    _claim(out, world, layout, encoder_id, rule)
    mine, absent = _share(dataset, episodes, rank, world_size)
    skipped = [index for index in mine if _finished(out, str(index))]
    todo = sorted(set(mine) - set(skipped))
    report = ExtractReport(skipped=[str(index) for index in skipped], absent=absent)
    try:
        for index, item in _prefetch(lambda i: _prepare(world, dataset, out, i, rule), todo):
            _settle(index, item, out, encode, layout, batch_frames, report, strict)
            if progress:
                outcome = "failed" if report.failed and report.failed[-1]["episode"] == str(index) else "done"
                progress(Progress(len(report.done) + len(report.failed), len(todo), str(index), outcome))
    finally:
        name = "extract_report.json" if world_size == 1 else f"extract_report.{rank}.json"
        write_json(out / name, asdict(report))
    return report


def merge_reports(out: Path, world_size: int) -> ExtractReport:
    """Join the reports of ``world_size`` finished processes into ``<out>/extract_report.json``."""
    merged = ExtractReport()
    for rank in range(world_size):
        path = out / f"extract_report.{rank}.json"
        part = json.loads(path.read_text())
        merged.done += part["done"]
        merged.skipped += part["skipped"]
        merged.failed += part["failed"]
        merged.absent = part["absent"]
        path.unlink()
    write_json(out / "extract_report.json", asdict(merged))
    return merged


def _share(dataset: RawDataset, episodes: set[int] | None, rank: int, world_size: int) -> tuple[list[int], int]:
    """This process's episodes, and how many are not on disk (those asked for by number stay, and will be reported).

    Shared out before finished ones are dropped: every process sees the same shares whenever it starts.
    """
    present = set(dataset.episodes)
    wanted = sorted(present if episodes is None else episodes)
    absent = len(set(dataset.declared if episodes is None else episodes) - present)
    return wanted[rank::world_size], absent


def _check_world(world: WorldSettings, dataset: RawDataset) -> None:
    """Refuse cameras or columns that the whole dataset lacks: that is the preset's fault, not each episode's."""
    for name, known, what in (
        *((c, dataset.cameras, "camera") for c in world.cameras),
        *((c, tuple(dataset.features), "column") for c in (*world.state_fields, *world.joint_fields)),
    ):
        if name not in known:
            raise PersistWorldError(
                f"the dataset has no {what} '{name}'",
                where=str(dataset.path / "meta/info.json"),
                fix=nearest(name, known),
            )


def _prepare(world: WorldSettings, dataset: RawDataset, out: Path, index: int, rule: str) -> _Prepared:
    """Read, check and decode one episode, and stage its videos."""
    split = split_of(index, rule, dataset.splits)
    annotation, ids = _annotation(world, dataset, index, split)
    stage = out / ".staging" / f"{index}-{os.getpid()}"
    for left in (out / ".staging").glob(f"{index}-*"):  # of a run that was killed: no other process has this episode
        shutil.rmtree(left, ignore_errors=True)

    def view(number: int) -> NDArray[np.uint8]:
        frames = _view(world, dataset, index, world.cameras[number], ids)
        video.write_mp4(stage / "videos" / f"{number}.mp4", frames, world.rate_hz)
        return frames

    with ThreadPoolExecutor(len(world.cameras)) as pool:  # decoding and encoding release the interpreter lock
        views = list(pool.map(view, range(len(world.cameras))))
    return _Prepared(str(index), split, np.stack(views, axis=1), annotation, stage)


def _view(
    world: WorldSettings, dataset: RawDataset, index: int, camera: str, ids: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """One camera's pictures at raw frames ``ids``: (T, H, W, 3)."""
    path, first, length = dataset.video(index, camera)
    declared = video.count_frames(path)
    alone = not dataset.version.startswith("v3")  # a version 3 file holds other episodes too
    if declared < first + length or (alone and declared != length):
        raise PersistWorldError(
            f"camera '{camera}' has {max(0, declared - first)} frames, the table {length} rows",
            where=str(path),
            fix=_FETCH,
        )
    return video.resize(video.read_frames(path, [first + int(i) for i in ids]), world.height, world.width)


def _annotation(
    world: WorldSettings, dataset: RawDataset, index: int, split: str
) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """The annotation with Ctrl-World's keys, and the raw frames it keeps."""
    listed = [
        name
        for name, spec in dataset.features.items()
        if name.startswith(_LISTED) and str(spec.get("dtype", "")).startswith("float")
    ]
    names = list(dict.fromkeys([*listed, *world.state_fields, *world.joint_fields]))
    columns = dataset.columns(index)
    required = {*world.state_fields, *world.joint_fields}
    data = dataset.read(index, [n for n in names if n in columns or n in required])
    length = len(next(iter(data.values())))
    expected, where = dataset.episode(index).length, str(dataset.episode(index).table)
    if length != expected:
        raise PersistWorldError(f"{length} rows, the metadata says {expected}", where=where, fix=_FETCH)
    for name, values in data.items():
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            raise PersistWorldError(f"column '{name}' holds values that are no numbers", where=where, fix=_FETCH)
    ids = resample_ids(length, dataset.fps, world.rate_hz)
    states = np.concatenate([data[n].reshape(length, -1) for n in world.state_fields], axis=1)[ids]
    joints = np.concatenate([data[n].reshape(length, -1) for n in world.joint_fields], axis=1)[ids]
    success = None
    if "is_episode_successful" in columns:
        success = int(bool(dataset.read(index, ["is_episode_successful"])["is_episode_successful"].reshape(-1)[-1]))
    cameras = range(len(world.cameras))
    return {
        "texts": [dataset.instruction(index)],
        "episode_id": index,
        "success": success,
        "video_length": len(ids),
        "state_length": len(ids),
        "raw_length": length,
        "raw_fps": dataset.fps,
        "rate_hz": world.rate_hz,
        "videos": [{"video_path": f"videos/{split}/{index}/{c}.mp4"} for c in cameras],
        "latent_videos": [{"latent_video_path": f"latent_videos/{split}/{index}/{c}"} for c in cameras],
        "states": states.tolist(),
        "joints": joints.tolist(),
        **{name: values.tolist() for name, values in data.items()},
    }, ids


def _settle(
    index: int,
    item: _Prepared | BaseException,
    out: Path,
    encode: Encode,
    layout: str,
    batch_frames: int,
    report: ExtractReport,
    strict: bool,
) -> None:
    """Encode and publish a prepared episode, or note why it cannot be."""
    if isinstance(item, _Prepared):
        _publish(item, out, encode, layout, batch_frames)
        report.done.append(item.episode_id)
        return
    shutil.rmtree(out / ".staging" / f"{index}-{os.getpid()}", ignore_errors=True)
    # only what a bad recording explains is skipped: a programming error or a full disk must stop the run
    if strict or not isinstance(item, PersistWorldError):
        raise item
    where = f" ({item.where})" if item.where else ""
    report.failed.append({"episode": str(index), "reason": f"{item.what}{where}"})


def _publish(item: _Prepared, out: Path, encode: Encode, layout: str, batch_frames: int) -> None:
    """Encode, then rename videos and latents into place, the annotation last."""
    per_camera = _encode(item.frames, encode, batch_frames)
    suffix = ".npy" if layout == "native" else ".pt"
    latent_stage = item.stage / "latents"
    latent_stage.mkdir(parents=True)
    for camera, latents in enumerate(per_camera):
        path = latent_stage / f"{camera}{suffix}"
        if layout == "native":
            np.save(path, latents.to(torch.float16).numpy())
        else:
            torch.save(latents.to(torch.float32).contiguous(), path)
        item.annotation["latent_videos"][camera]["latent_video_path"] += suffix
    for source, folder in ((item.stage / "videos", "videos"), (latent_stage, "latent_videos")):
        target = out / folder / item.split / item.episode_id
        shutil.rmtree(target, ignore_errors=True)  # left by a run stopped between its renames
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    shutil.rmtree(item.stage)
    write_json(out / "annotation" / item.split / f"{item.episode_id}.json", item.annotation)


def _encode(frames: NDArray[np.uint8], encode: Encode, batch_frames: int) -> list[Tensor]:
    """Latents of each camera (T, C, h1, w) on the CPU."""
    parts = []
    cameras = frames.shape[1]
    with torch.inference_mode():
        for begin in range(0, len(frames), batch_frames):
            latents = encode(torch.from_numpy(frames[begin : begin + batch_frames]))
            if latents.ndim != 4 or latents.shape[2] % cameras:
                raise ValueError(f"encoder returned {tuple(latents.shape)} for {cameras} cameras")
            parts.append(latents.detach().to("cpu", torch.float32))
    whole = torch.cat(parts)
    if not torch.isfinite(whole).all():
        raise PersistWorldError("encoder returned values that are no numbers", where="encoder", fix="check its weights")
    return [view.clone() for view in whole.chunk(cameras, dim=2)]


def _finished(out: Path, episode_id: str) -> bool:
    """Whether an annotation of the episode stands in any split."""
    return any((out / "annotation").glob(f"*/{episode_id}.json"))


def _claim(out: Path, world: WorldSettings, layout: str, encoder_id: str, rule: str) -> None:
    """Note in ``out`` what all its episodes share, or refuse to add episodes made otherwise."""
    shared = {
        "cameras": list(world.cameras),
        "height": world.height,
        "width": world.width,
        "rate_hz": world.rate_hz,
        "layout": layout,
        "val_rule": rule,
        "encoder": encoder_id,
    }
    path = out / _SHARED
    if path.is_file():
        before = json.loads(path.read_text())
        changed = [f"{k}: {before.get(k)!r} -> {v!r}" for k, v in shared.items() if before.get(k) != v]
        if changed:
            raise PersistWorldError(
                f"this dataset was begun with other settings ({'; '.join(changed)})",
                where=str(path),
                fix="give another output folder, or the settings it was begun with",
            )
        return
    if next((out / "annotation").glob("*/*.json"), None):
        raise PersistWorldError(
            "the folder holds episodes of unknown origin (no extract.json)",
            where=str(out),
            fix="give another output folder",
        )
    write_json(path, shared)


def _prefetch(
    prepare: Callable[[int], _Prepared], indices: list[int]
) -> Iterator[tuple[int, _Prepared | BaseException]]:
    """Prepare up to two episodes ahead in a thread while the caller encodes; a failure stands in for its episode."""
    with ThreadPoolExecutor(1, thread_name_prefix="extract") as pool:
        waiting = deque((index, pool.submit(prepare, index)) for index in indices[:2])
        upcoming = iter(indices[2:])
        try:
            while waiting:
                index, future = waiting.popleft()
                item = future.exception() or future.result()
                following = next(upcoming, None)
                if following is not None:
                    waiting.append((following, pool.submit(prepare, following)))
                yield index, item
        finally:
            for _, future in waiting:
                future.cancel()
