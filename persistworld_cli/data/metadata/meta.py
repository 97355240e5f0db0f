"""Metadata of a processed dataset: index, percentiles of the states, joint-velocity adapter, health report.

Written to ``<dataset>/meta``: index.safetensors, stat.json, joint_velocity_adapter.json, health.json. Worker
processes parse the annotations; those unchanged since the previous index are not opened again. No file is replaced
before all results are ready.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.keys import FRANKA_POSE, state_names
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.metadata.adapter_fit import ADAPTER_FILES, HandPosition, chosen, fit_adapter
from persistworld_cli.data.metadata.ctrl_world_meta import SampleLists
from persistworld_cli.data.metadata.health import count_starts, findings, start_percentiles, state_table, unusable
from persistworld_cli.data.metadata.index import INDEX_FILE, ActionStat, StateWriter, write_index
from persistworld_cli.data.metadata.index_rows import MADE, IndexBuilder, PreviousIndex
from persistworld_cli.data.metadata.scan import (
    AnnotationStat,
    Episode,
    extraction_notes,
    list_annotations,
    read_episode,
    require_processed,
)
from persistworld_cli.data.processes import in_order
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import write_json

_LOG = logging.getLogger(__name__)
_SUCCESS = {True: "succeeded", False: "failed", None: "unknown"}


@dataclass
class MetaReport:
    """What `build_meta` wrote and found."""

    meta: Path
    episodes: dict[str, int]  # usable ones per split; frames and samples likewise
    frames: dict[str, int]
    samples: dict[str, int]
    read: int  # annotations opened; the others are unchanged
    stat: ActionStat
    adapter: dict[str, Any] | None
    health: dict[str, Any]


def build_meta(
    dataset: Path | str,
    *,
    meta: Path | str | None = None,
    num_frames: int = 5,
    lists: SampleLists | None = None,
    settings: Settings | None = None,
    hand_position: HandPosition | None = None,
    fresh: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MetaReport:
    """Read the annotations that are new or changed, and write the metadata.

    Args:
        dataset: processed dataset.
        meta: where to write; ``<dataset>/meta`` by default.
        num_frames: frames that a clip predicts (start frames leave num_frames - 1 after them).
        lists: Ctrl-World's own sample lists and percentiles, used instead of those computed from all episodes.
        settings: name the numbers of a state; Franka's pose by default.
        hand_position: forward kinematics, for the adapter's error of the hand.
        fresh: read everything again.
        workers: processes that parse; one per core by default.
        progress: called with (episodes read, episodes in all).

    Raises:
        PersistWorldError: no processed dataset, no training episode, or states of differing width.
    """
    root = Path(dataset)
    target = Path(meta) if meta else root / "meta"
    require_processed(root)
    notes, settings = extraction_notes(root), settings or Settings()
    rate_hz = float(notes.get("rate_hz", 5.0))
    if fields := notes.get("state_fields"):  # those of this dataset, whatever preset was named
        settings = replace(settings, world=replace(settings.world, state_fields=tuple(fields)))
    listed = [item for item in list_annotations(root) if lists is None or lists.names(item.split, item.episode)]
    previous = PreviousIndex(target, fresh=fresh)
    _sweep(target)
    states = StateWriter(target / f".states.{os.getpid()}")
    try:
        builder = IndexBuilder(states)
        read = _fill(builder, listed, previous, functools.partial(read_episode, root), workers, progress)
        del previous  # its memory maps of the old index count as memory of this process
        _check_training(root, builder)
        starts, given = {}, None
        if lists is not None:
            names = [(row.item.split, row.item.episode) for row in builder.rows]
            starts, given = lists.columns(names, builder.lengths, num_frames), lists.stat
        rows, training = states.rows(), builder.training
        stat = given or start_percentiles(rows, builder.lengths, training, num_frames)
        if len(stat.p01) != rows.shape[1]:
            raise PersistWorldError(
                f"the imported percentiles have {len(stat.p01)} numbers, the states have {rows.shape[1]}",
                where=str(lists.folder if lists else ""),
                fix="import the statistics of this dataset's robot, or leave out --import",
            )
        numbers = state_names(rows.shape[1], settings)
        motions = [motion for _, motion in sorted(builder.motions.items()) if motion is not None]
        franka = {motion.shape[2] for motion in motions} == {7}
        adapter = fit_adapter(motions, hand_position if franka else None)
        health = {
            **_health(builder, rate_hz, num_frames, pose=numbers == state_names(len(FRANKA_POSE))),
            "states": state_table(rows, builder.lengths, training, stat, numbers),
            "latents": "checked" if (root / "latent_videos").is_dir() else "none",
            **({} if lists is None else {"imported": lists.summary(names)}),
        }
        report = MetaReport(target, *_counts(builder, num_frames, starts), read, stat, adapter, health)
        imported = str(lists.folder) if lists else ""
        info = {"made": MADE, "num_frames": str(num_frames), "imported": imported}
        write_index(target / INDEX_FILE, builder.columns() | starts, rows, states.dtype, info)
    finally:
        states.close()
    write_json(
        target / "stat.json", {"state_01": stat.p01, "state_99": stat.p99, **({"from": imported} if imported else {})}
    )
    for name in (*ADAPTER_FILES, "index.npz"):  # an older adapter would mislead; index.npz is of older versions
        (target / name).unlink(missing_ok=True)
    if adapter is not None:
        write_json(target / ADAPTER_FILES[0], adapter)
    write_json(target / "health.json", health)
    return report


def _fill(
    builder: IndexBuilder,
    listed: Sequence[AnnotationStat],
    previous: PreviousIndex,
    read: Callable[[tuple[AnnotationStat, bool]], Episode],
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Add every annotation to the builder, in order; returns how many were opened."""
    fitted = chosen(listed)
    rows = [previous.row(item, number in fitted) for number, item in enumerate(listed)]
    todo = [(item, number in fitted) for number, item in enumerate(listed) if rows[number] is None]
    if len(previous) and len(todo) < len(listed):
        _LOG.info("%d of %d annotations are unchanged and not read again", len(listed) - len(todo), len(listed))
    with closing(in_order(read, todo, workers)) as opened:
        for number, (item, row) in enumerate(zip(listed, rows, strict=True)):
            episode = next(opened) if row is None else previous.episode(row, number in fitted)
            builder.add(item, episode, number in fitted)
            if progress:
                progress(number + 1, len(listed))
    return len(todo)


def _sweep(meta: Path) -> None:
    """Remove temporary files of killed builds."""
    for path in meta.glob(".states.*") if meta.is_dir() else ():
        number = path.name.split(".")[2]
        if not (number.isdecimal() and Path(f"/proc/{number}").exists()):
            path.unlink(missing_ok=True)


def _check_training(root: Path, builder: IndexBuilder) -> None:
    """Raise if no training episode is usable."""
    if (builder.lengths[builder.training] > 0).any():
        return
    found = dict(Counter(row.item.split for row in builder.rows)) or "no annotation"
    problems = dict(Counter(row.problem for row in builder.rows if row.problem)) or "none"
    raise PersistWorldError(
        f"no training episode (annotations: {found}; problems: {problems})",
        where=str(root / "annotation" / "train"),
        fix="extract more episodes, or choose another val_rule so that some are for training",
    )


def _counts(
    builder: IndexBuilder, num_frames: int, starts: dict[str, NDArray[Any]]
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Usable episodes, frames and samples (start frames) of every split."""
    split_of, lengths = np.array([row.item.split for row in builder.rows]), builder.lengths
    each = np.bincount(starts["starts_of"], minlength=len(lengths)) if starts else count_starts(lengths, num_frames)
    episodes, frames, samples = {}, {}, {}
    for split in dict.fromkeys(split_of.tolist()):
        mine = (split_of == split) & (lengths > 0)
        if mine.any():
            episodes[split] = int(mine.sum())
            frames[split], samples[split] = int(lengths[mine].sum()), int(each[mine].sum())
    return episodes, frames, samples


def _health(builder: IndexBuilder, rate_hz: float, num_frames: int, *, pose: bool) -> dict[str, Any]:
    """The part of health.json that describes the annotations; `pose`: states are poses of a Franka."""
    usable = [row for row in builder.rows if row.length]
    names, texts, lengths = [row.item.name for row in usable], [row.text for row in usable], [r.length for r in usable]
    facts = np.array([row.facts for row in usable])
    if not pose:
        facts[~np.isnan(facts[:, 1])] = np.nan  # seven other numbers, measured as a pose
    return {
        "unusable": unusable([row.item.name for row in builder.rows], [row.problem for row in builder.rows]),
        "findings": findings(names, np.array(lengths), texts, facts, rate_hz, num_frames),
        "length": {"min": min(lengths), "median": float(np.median(lengths)), "max": max(lengths)},
        "instructions": len({text for text in texts if text.strip()}),
        "success": dict(Counter(f"{row.item.split}: {_SUCCESS[row.success]}" for row in usable)),
        "episodes_in_adapter_fit": sum(motion is not None for motion in builder.motions.values()),
    }
