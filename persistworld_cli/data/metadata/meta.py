"""Metadata of a processed dataset: index, percentiles of the states, action adapter, health report.

Written to ``<dataset>/meta``: index.safetensors, stat.json, adapter.json, health.json. Worker processes parse the
annotations; those that an earlier index knows unchanged are not opened again. Nothing is replaced before all is made.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.data.metadata.adapter_fit import Reach, chosen, fit_adapter
from persistworld_cli.data.metadata.ctrl_world_meta import SampleLists
from persistworld_cli.data.metadata.health import count_starts, findings, start_percentiles, state_table, unusable
from persistworld_cli.data.metadata.index import INDEX_FILE, ActionStat, StateWriter, write_index
from persistworld_cli.data.metadata.known import Known, Table
from persistworld_cli.data.metadata.scan import Episode, Listed, extraction_notes, list_annotations, read_episode
from persistworld_cli.data.processes import in_order
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import write_json

_LOG = logging.getLogger(__name__)


@dataclass
class MetaReport:
    """What `build_meta` wrote and found."""

    meta: Path
    episodes: dict[str, int]
    frames: dict[str, int]
    samples: dict[str, int]
    read: int  # annotations opened; the rest was known
    stat: ActionStat
    adapter: dict[str, Any] | None
    health: dict[str, Any]


def build_meta(
    dataset: Path | str,
    *,
    meta: Path | str | None = None,
    num_frames: int = 5,
    rate_hz: float | None = None,
    lists: SampleLists | None = None,
    reach: Reach | None = None,
    check_latents: bool = True,
    fresh: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MetaReport:
    """Read the annotations that are new or changed, and write the metadata.

    Args:
        dataset: processed dataset.
        meta: where to write; ``<dataset>/meta`` by default.
        num_frames: frames a clip predicts (start frames leave num_frames - 1 after them).
        rate_hz: frames a second, for the speeds of the health report; as extract-latents noted (else 5) by default.
        lists: Ctrl-World's own lists and percentiles, to be taken in place of those of all episodes.
        reach: forward kinematics, to tell the adapter's error of the hand.
        check_latents: also look into every latent file and compare its length.
        fresh: read everything again.
        workers: processes that parse; one a core by default.
        progress: called with (episodes settled, episodes in all).

    Raises:
        PersistWorldError: no processed dataset, no training episode, or states of differing width.
    """
    root = Path(dataset)
    target = Path(meta) if meta else root / "meta"
    if not (root / "annotation").is_dir():
        raise PersistWorldError(
            "no processed dataset here (folder annotation/ is missing)",
            where=str(root),
            fix="run persistworld extract-latents, or give the folder that holds annotation/ and videos/",
        )
    rate = rate_hz or float(extraction_notes(root).get("rate_hz", 5.0))
    listed = list_annotations(root)
    if lists is not None:
        listed = [item for item in listed if lists.names(item.split, item.episode)]
    made = f"latents {'checked' if check_latents else 'unchecked'}"
    known = Known(target, "" if fresh else made)
    _sweep(target)
    states = StateWriter(target / f".states.{os.getpid()}")
    try:
        table = Table(states)
        read = _fill(table, listed, known, functools.partial(read_episode, root, check_latents), workers, progress)
        del known  # what it maps of the old index counts as memory of this process
        made_now = _Made(root, target, table, states, num_frames, rate, lists, reach, check_latents)
        report = _write(made_now, made)
    finally:
        states.close()
    report.read = read
    return report


@dataclass(frozen=True)
class _Made:
    """What the metadata is written from."""

    root: Path
    meta: Path
    table: Table
    states: StateWriter
    num_frames: int
    rate_hz: float
    lists: SampleLists | None
    reach: Reach | None
    check_latents: bool


def _fill(
    table: Table,
    listed: Sequence[Listed],
    known: Known,
    read: Callable[[tuple[Listed, bool]], Episode],
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Put every annotation into the table, in order; returns how many were opened."""
    fitted = chosen(listed)
    rows = [known.row(item, number in fitted) for number, item in enumerate(listed)]
    todo = [(item, number in fitted) for number, item in enumerate(listed) if rows[number] is None]
    if len(known) and len(todo) < len(listed):
        _LOG.info("%d of %d annotations are unchanged and not read again", len(listed) - len(todo), len(listed))
    with closing(_generator(in_order(read, todo, workers))) as fresh:
        for number, (item, row) in enumerate(zip(listed, rows, strict=True)):
            episode = next(fresh) if row is None else known.episode(row, number in fitted)
            table.add(item, episode, number in fitted)
            if progress:
                progress(number + 1, len(listed))
    return len(todo)


def _generator(items: Iterator[Episode]) -> Any:
    """The iterator as what it is: one that can be closed."""
    return items


def _sweep(meta: Path) -> None:
    """Remove what builds that were killed left behind."""
    for path in meta.glob(".states.*") if meta.is_dir() else ():
        number = path.name.split(".")[2]
        if not (number.isdecimal() and Path(f"/proc/{number}").exists()):
            path.unlink(missing_ok=True)


def _write(made: _Made, how: str) -> MetaReport:
    """Work out what the table says and write the four files."""
    table, lengths, training = made.table, np.array(made.table.lengths, np.int64), made.table.training()
    _check_training(made, lengths, training)
    rows = made.states.rows()
    starts, given = _imported(made, lengths)
    stat = given or start_percentiles(rows, lengths, training, made.num_frames)
    if len(stat.p01) != rows.shape[1]:
        raise PersistWorldError(
            f"the imported percentiles are of {len(stat.p01)} numbers, the states have {rows.shape[1]}",
            where=str(made.lists.folder if made.lists else ""),
            fix="import the statistics of this dataset's robot, or none",
        )
    motions = [m for row, m in sorted(table.motions.items()) if m is not None]
    arm = {m.shape[2] for m in motions}
    adapter = fit_adapter(motions, made.reach if arm == {7} else None)
    counts = _counts(table, lengths, made.num_frames, starts)
    health = _health(made, lengths, stat)
    report = MetaReport(made.meta, *counts, read=0, stat=stat, adapter=adapter, health=health)
    columns = table.columns() | starts
    info = {"made": how, "num_frames": str(made.num_frames), "imported": str(made.lists.folder) if made.lists else ""}
    write_index(made.meta / INDEX_FILE, columns, rows, info)
    source = {"from": str(made.lists.folder)} if made.lists else {}
    write_json(made.meta / "stat.json", {"state_01": stat.p01, "state_99": stat.p99, **source})
    if adapter is not None:
        write_json(made.meta / "adapter.json", adapter)
    else:
        (made.meta / "adapter.json").unlink(missing_ok=True)  # one of an earlier state of the dataset would mislead
    write_json(made.meta / "health.json", health)
    (made.meta / "index.npz").unlink(missing_ok=True)  # what versions before this one wrote
    return report


def _imported(made: _Made, lengths: NDArray[np.int64]) -> tuple[dict[str, NDArray[Any]], ActionStat | None]:
    """Start frames and percentiles of Ctrl-World's lists, where they are to be taken."""
    if made.lists is None:
        return {}, None
    names = [(item.split, item.episode) for item in made.table.items]
    return made.lists.columns(names, lengths, made.num_frames), made.lists.stat


def _check_training(made: _Made, lengths: NDArray[np.int64], training: NDArray[np.bool_]) -> None:
    """There must be something to train on."""
    if (lengths[training] > 0).any():
        return
    found = dict(Counter(item.split for item in made.table.items)) or "no annotation"
    problems = dict(Counter(p for p in made.table.problems if p)) or "none"
    raise PersistWorldError(
        f"no training episode (annotations: {found}; problems: {problems})",
        where=str(made.root / "annotation" / "train"),
        fix="extract more episodes, or choose another val_rule so that some are for training",
    )


def _counts(
    table: Table, lengths: NDArray[np.int64], num_frames: int, starts: dict[str, NDArray[Any]]
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Usable episodes, frames and samples (start frames) of every split."""
    split_of = np.array([item.split for item in table.items])
    each = count_starts(lengths, num_frames)
    if starts:
        each = np.bincount(starts["starts_of"], minlength=len(lengths))
    episodes, frames, samples = {}, {}, {}
    for split in dict.fromkeys(split_of.tolist()):
        mine = (split_of == split) & (lengths > 0)
        if mine.any():
            episodes[split] = int(mine.sum())
            frames[split], samples[split] = int(lengths[mine].sum()), int(each[mine].sum())
    return episodes, frames, samples


def _health(made: _Made, lengths: NDArray[np.int64], stat: ActionStat) -> dict[str, Any]:
    """The health report (health.json)."""
    table, usable = made.table, np.flatnonzero(lengths > 0)
    names = [item.name for item in table.items]
    texts = [table.texts[table.text_of[row]] for row in usable.tolist()]
    facts = np.array(table.facts, dtype=np.float64)[usable]
    mine = lengths[usable]
    told = Counter(f"{table.items[row].split}: {_SUCCESS[table.success[row]]}" for row in usable.tolist())
    latents = "checked" if made.check_latents else "unchecked"
    return {
        "unusable": unusable(names, table.problems),
        "findings": findings([names[row] for row in usable.tolist()], mine, texts, facts, made.rate_hz),
        "states": state_table(made.states.rows(), lengths, table.training(), stat),
        "latents": latents if (made.root / "latent_videos").is_dir() else "none",
        "length": {"min": int(mine.min()), "median": float(np.median(mine)), "max": int(mine.max())},
        "instructions": len({text for text in texts if text.strip()}),
        "success": dict(told),
        "episodes_in_adapter_fit": sum(m is not None for m in table.motions.values()),
        **({} if made.lists is None else {"imported": made.lists.summary([(i.split, i.episode) for i in table.items])}),
    }


_SUCCESS = {1: "succeeded", 0: "failed", -1: "unknown"}
