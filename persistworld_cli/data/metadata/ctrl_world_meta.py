"""Ctrl-World's own metadata: ``<folder>/{train,val}_sample.json`` and ``stat.json``, written and read as a stream.

A list has an entry ``{"episode_id": 17, "frame_ids": [start]}`` for every start frame, about ten million for DROID; as
Python objects they would take gigabytes. Legend: E episodes, K entries.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.data.metadata.health import count_starts
from persistworld_cli.data.metadata.index import ActionStat, EpisodeIndex, IndexFile, NoEpisodes, running
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import whole_file, write_json
from persistworld_cli.read_files import parse_json, reading

SUFFIX = "_sample.json"
_READ = 1 << 20  # characters
_BITS, _START = 32, (1 << 32) - 1  # of a start frame in an entry's number
_WRITTEN = 1 << 16  # entries


def export_ctrl_world(index: IndexFile, stat: ActionStat, folder: Path, *, num_frames: int = 5, seed: int = 0) -> Path:
    """Write ``<folder>/{train,val}_sample.json`` (shuffled) and stat.json."""
    for split in index.names("splits"):
        try:
            mine = index.split(split)
        except NoEpisodes:  # none of its episodes is usable
            continue
        row, start = _entries(mine, num_frames)
        order = np.random.default_rng(seed).permutation(len(row))
        # Ctrl-World writes numeric ids as numbers; '0011' must stay text
        names = [json.dumps(int(e) if e.isdecimal() and str(int(e)) == e else e) for e in mine.ids]
        with whole_file(folder / f"{split}{SUFFIX}") as partial, partial.open("w") as out:
            out.write("[")
            for begin in range(0, len(order), _WRITTEN):
                part = order[begin : begin + _WRITTEN]
                entries = zip(row[part].tolist(), start[part].tolist(), strict=True)
                lines = [f'{{"episode_id": {names[e]}, "frame_ids": [{s}]}}' for e, s in entries]
                out.write((", " if begin else "") + ", ".join(lines))
            out.write("]")
    write_json(folder / "stat.json", {"state_01": stat.p01, "state_99": stat.p99})
    return folder


def _entries(index: EpisodeIndex, num_frames: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(row, start frame) of every entry, in order."""
    if index.starts is not None and index.start_offsets is not None:
        counts = np.diff(index.start_offsets)
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts), np.asarray(index.starts)
    counts = count_starts(index.lengths, num_frames)
    row = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    first = np.arange(len(row), dtype=np.int64) - np.repeat(running(counts)[:-1], counts)
    return row, first.astype(np.int32)


class SampleLists:
    """Ctrl-World's sample lists in a folder (start frames of each episode), and its percentiles.

    Raises:
        PersistWorldError: a file is missing or unreadable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []
        if not paths:
            near = sorted(p.parent.name for p in folder.glob(f"*/train{SUFFIX}")) if folder.is_dir() else []
            raise PersistWorldError(
                f"no train{SUFFIX} or val{SUFFIX} here",
                where=str(folder),
                fix=f"give one of its folders: {', '.join(near)}" if near else "give the folder that holds them",
            )
        self.stat = ActionStat.load(folder / "stat.json")
        self._lists = {path.name.removesuffix(SUFFIX): _List(path) for path in paths}

    def names(self, split: str, episode: str) -> bool:
        """Whether a list names an episode."""
        return split in self._lists and episode in self._lists[split].code

    def columns(
        self, names: Sequence[tuple[str, str]], lengths: NDArray[np.int64], num_frames: int
    ) -> dict[str, NDArray[Any]]:
        """The index's arrays ``starts`` and ``starts_of`` for its rows ``names``; {} if they are the default ones.

        Start frames beyond an episode's end are left out (the episode on disk is another version of it).
        """
        parts = []
        for split, mine in self._lists.items():
            place = {episode: row for row, (of, episode) in enumerate(names) if of == split}
            row_of = np.array([place.get(episode, -1) for episode in mine.code], dtype=np.int64)
            row, start = row_of[mine.keys >> _BITS], mine.keys & _START
            there = (row >= 0) & (start < lengths[row])
            parts.append((row[there] << _BITS) | start[there])
        keys = np.concatenate(parts)
        del parts, row, start, there  # ten million of each
        keys.sort()  # in place, where np.unique would copy
        if (keys[1:] == keys[:-1]).any():
            keys = np.unique(keys)
        row, start = keys >> _BITS, (keys & _START).astype(np.int32)
        usual = np.where(lengths > 0, count_starts(lengths, num_frames), 0)
        same = np.array_equal(np.bincount(row, minlength=len(lengths)), usual)
        if same and (start < usual[row]).all():
            return {}
        return {"starts": start, "starts_of": row}

    def summary(self, names: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """For the health report: entries, and how many of the listed episodes are on disk."""
        there = set(names)
        listed = [(split, episode) for split, mine in self._lists.items() for episode in mine.code]
        absent = [f"{split}/{episode}" for split, episode in listed if (split, episode) not in there]
        entries = {split: len(mine.keys) for split, mine in self._lists.items()}
        return {
            "folder": str(self.folder),
            "entries": entries,
            "episodes": len(listed),
            "not_on_disk": len(absent),
            "first": absent[:20],
        }


class _List:
    """One list: the number of each episode in order of appearance, and (K,) the entries as episode << 32 | start."""

    def __init__(self, path: Path) -> None:
        self.code: dict[str, int] = {}
        keys = array("q")
        with reading("unreadable list of samples", path, 'it should read [{"episode_id": 17, "frame_ids": [3]}, ...]'):
            for entry in _stream(path):
                episode = self.code.setdefault(str(entry["episode_id"]), len(self.code))
                keys.extend(episode << _BITS | int(start) for start in entry["frame_ids"][:1] if 0 <= start <= _START)
        self.keys: NDArray[np.int64] = np.frombuffer(keys, np.int64) if keys else np.empty(0, np.int64)


def _stream(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a JSON list of flat objects, a million characters at a time."""
    rest, first = "", True
    with path.open(encoding="utf-8") as file:
        while True:
            read = file.read(_READ)
            text = rest + read
            if first:
                text, first = text.lstrip().removeprefix("["), False
            cut = text.rfind("}") + 1 if read else len(text)
            piece, rest = text[:cut].strip(), text[cut:]
            if not read:
                if not piece.endswith("]"):
                    raise ValueError("the list is truncated")
                piece = piece[:-1]
            piece = piece.strip().strip(",")
            if piece:
                yield from parse_json(f"[{piece}]")
            if not read:
                return
