"""From raw LeRobot recordings to a processed dataset: pictures at the model's rate and size, latents, annotations.

An episode is written whole or not at all: everything goes to a staging folder, is renamed into place, and the annotation
comes last, so an annotation means a finished episode and a stopped run continues where it was.

Legend: T frames at the model rate, V cameras, H, W picture pixels, C latent channels, h1 latent height of one camera,
h = V * h1, w latent width.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
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
from persistworld_cli.errors import PersistWorldError

Encode = Callable[[Tensor], Tensor]  # uint8 (N, V, H, W, 3) -> (N, C, h, w), cameras stacked
LAYOUTS = ("native", "ctrl-world")
_SHARED = "extract.json"  # what all episodes of a dataset have in common


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
    """Raw frame numbers that make the model's frames: every k-th for a whole ratio (15 -> 5 Hz: 0, 3, 6, ...), else the nearest.

    Frame i stands at raw time ``i * raw_fps / rate_hz``; those that fall beyond the last raw frame are left out.
    """
    ratio = raw_fps / rate_hz
    count = int(np.floor((length - 1) / ratio + 1e-9)) + 1 if length > 0 else 0
    ids = np.floor(np.arange(count) * ratio + 0.5 + 1e-9).astype(np.int64)
    return np.minimum(ids, length - 1)


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
            f"episode {index} lies in no split of info.json ({splits})", where="world.val_rule", fix="use another val_rule"
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
    rule = split_rule or world.val_rule
    _claim(out, world, layout, encoder_id, rule)
    wanted = sorted(dataset.declared if episodes is None else episodes)
    present = set(dataset.episodes)
    if episodes is None:
        absent, wanted = len(set(wanted) - present), [e for e in wanted if e in present]
    else:
        absent = len(episodes & set(dataset.declared) - present)
    # sharded before finished ones are dropped: every process sees the same shares whenever it starts
    mine = wanted[rank::world_size]
    report = ExtractReport(absent=absent)
    todo = []
    for index in mine:
        if _finished(out, str(index)):
            report.skipped.append(str(index))
        else:
            todo.append(index)
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
    """Join the reports of ``world_size`` processes into ``<out>/extract_report.json`` (after all of them are through)."""
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


def write_json(path: Path, data: Any) -> None:
    """Write JSON beside and rename: a reader finds the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(data))
    partial.replace(path)


def _prepare(world: WorldSettings, dataset: RawDataset, out: Path, index: int, rule: str) -> _Prepared:
    """Read, check and decode one episode, and stage its videos."""
    split = split_of(index, rule, dataset.splits)
    annotation, ids = _annotation(world, dataset, index, split)
    stage = out / ".staging" / f"{index}-{os.getpid()}"
    shutil.rmtree(stage, ignore_errors=True)
    views = []
    for number, camera in enumerate(world.cameras):
        path, first, length = dataset.video(index, camera)
        declared = video.count_frames(path)
        shared = dataset.version.startswith("v3")
        if declared < first + length or (not shared and declared != length):
            raise PersistWorldError(
                f"camera '{camera}' has {declared - first} frames, the table {length} rows", where=str(path), fix="fetch again"
            )
        frames = video.resize(video.read_frames(path, [first + int(i) for i in ids]), world.height, world.width)
        video.write_mp4(stage / "videos" / f"{number}.mp4", frames, world.rate_hz)
        views.append(frames)
    return _Prepared(str(index), split, np.stack(views, axis=1), annotation, stage)


def _annotation(
    world: WorldSettings, dataset: RawDataset, index: int, split: str
) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """The annotation with Ctrl-World's keys, and the raw frames it keeps."""
    listed = [
        name
        for name, spec in dataset.features.items()
        if name.startswith(("observation.state.", "action.")) and str(spec.get("dtype", "")).startswith("float")
    ]
    names = list(dict.fromkeys([*listed, *world.state_fields, *world.joint_fields]))
    columns = dataset.columns(index)
    required = {*world.state_fields, *world.joint_fields}
    data = dataset.read(index, [n for n in names if n in columns or n in required])
    length = len(next(iter(data.values())))
    expected = dataset.episode(index).length
    if length != expected:
        raise PersistWorldError(f"table has {length} rows, the metadata says {expected}", where=f"episode {index}", fix="fetch")
    for name, values in data.items():
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            raise PersistWorldError(f"column '{name}' holds values that are no numbers", where=f"episode {index}", fix="drop it")
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
    item: _Prepared | Exception,
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
    write_json(path, shared)


def _prefetch(
    prepare: Callable[[int], _Prepared], indices: list[int]
) -> Iterator[tuple[int, _Prepared | Exception]]:
    """Prepare episodes one ahead in a thread (decoding releases the interpreter lock) while the caller encodes."""
    ready: queue.Queue[tuple[int, _Prepared | Exception]] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def work() -> None:
        for index in indices:
            item: _Prepared | Exception
            try:
                item = prepare(index)
            except Exception as error:  # handed to the caller, which raises or reports it
                item = error
            while not stop.is_set():
                try:
                    ready.put((index, item), timeout=0.2)
                    break
                except queue.Full:
                    continue
            if stop.is_set():
                return

    thread = threading.Thread(target=work, name="extract-prefetch", daemon=True)
    thread.start()
    try:
        for _ in indices:
            yield ready.get()
    finally:
        stop.set()
        thread.join()
