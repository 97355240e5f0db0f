"""Rows of the episode index: read from the previous index, and collected for the next one.

An annotation is unchanged if its name, size and modification time, and the modification times of the episode's folders
are the same as before. Its row is then copied, and no file of the episode is opened. The result equals an index that is
built from scratch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.data.metadata.index import INDEX_FILE, IndexFile, StateWriter, as_bytes, running
from persistworld_cli.data.metadata.scan import AnnotationStat, Episode, Facts
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.read_files import reading

_LOG = logging.getLogger(__name__)
MADE = "latents checked"  # how the rows of an index were made
_SUCCESS = {True: 1, False: 0, None: -1}
_UNKNOWN = {code: success for success, code in _SUCCESS.items()}
_SIGNS = ("size", "mtime", "videos", "latents")


def signatures(file: IndexFile) -> list[AnnotationStat]:
    """The annotations as they were when the index was made."""
    splits, split_of = file.names("splits"), file.array("split_of").tolist()
    rows = zip(split_of, file.names("ids"), *(file.array(name).tolist() for name in _SIGNS), strict=True)
    return [AnnotationStat(splits[code], *rest) for code, *rest in rows]


class PreviousIndex:
    """The rows of the index in folder ``meta``; none if it is damaged, of another kind, or with ``fresh``."""

    def __init__(self, meta: Path, *, fresh: bool = False) -> None:
        self._rows: dict[AnnotationStat, int] = {}
        path = meta / INDEX_FILE
        if fresh or not path.is_file():
            return
        try:
            file = IndexFile(path)
            if file.info.get("made") != MADE:
                return
            with reading("the index is damaged", path):
                file.require_whole()
                file.check()
                self._read(file)
        except PersistWorldError as error:
            _LOG.warning("%s: %s; every annotation is read again", path, error.what)
            self._rows = {}

    def _read(self, file: IndexFile) -> None:
        self._rows = {item: row for row, item in enumerate(signatures(file))}
        self._texts, self._problems = file.names("texts"), file.names("problems")
        self._text_of, self._problem_of = file.array("text_of").tolist(), file.array("problem_of").tolist()
        self._success, self._facts = file.array("success").tolist(), file.array("facts")
        self._offsets, self._states = file.offsets.tolist(), file.array("states")
        self._fit = {row: number for number, row in enumerate(file.array("motion_of").tolist())}
        self._motions, self._motion_at = file.array("motion"), running(file.array("motion_length")).tolist()

    def row(self, item: AnnotationStat, wanted: bool) -> int | None:
        """The row of an unchanged annotation; None if it must be read (``wanted``: with its motion)."""
        row = self._rows.get(item)
        return None if row is None or (wanted and row not in self._fit) else row

    def episode(self, row: int, wanted: bool) -> Episode:
        """The episode that a row holds."""
        motion = None
        if wanted:
            begin, end = self._motion_at[self._fit[row] : self._fit[row] + 2]
            motion = np.array(self._motions[begin:end]) if end > begin else None
        return Episode(
            text=self._texts[self._text_of[row]],
            success=_UNKNOWN[self._success[row]],
            problem=self._problems[self._problem_of[row]],
            states=self._states[self._offsets[row] : self._offsets[row + 1]],
            facts=Facts(*self._facts[row].tolist()),
            motion=motion,
        )

    def __len__(self) -> int:
        return len(self._rows)


class Row(NamedTuple):
    """An annotation in the index."""

    item: AnnotationStat
    text: str
    problem: str
    length: int  # 0: not usable
    success: bool | None
    facts: Facts


class IndexBuilder:
    """The rows of the next index; their states go to a file."""

    def __init__(self, states: StateWriter) -> None:
        self.rows: list[Row] = []
        self.motions: dict[int, NDArray[np.float32] | None] = {}  # row -> raw joints and velocities, for the adapter
        self._states = states
        self._widths: dict[int, str] = {}  # width of the states -> the first episode with it
        self._joints = 0

    def add(self, item: AnnotationStat, episode: Episode, wanted: bool) -> None:
        """Add an annotation; ``wanted``: for the adapter's fit. Raises PersistWorldError: states of another width."""
        if wanted:
            motion = episode.motion
            self._joints = self._joints or (0 if motion is None else motion.shape[2])
            self.motions[len(self.rows)] = motion if motion is not None and motion.shape[2] == self._joints else None
        length = 0 if episode.problem else len(episode.states)
        self.rows.append(Row(item, episode.text, episode.problem, length, episode.success, episode.facts))
        if episode.problem:
            return
        self._widths.setdefault(episode.states.shape[1], item.name)
        if len(self._widths) > 1:
            widths = " and ".join(f"{width} ({name})" for width, name in self._widths.items())
            raise PersistWorldError(
                f"states have widths {widths}",
                where="annotation/",
                fix="a dataset has one width: keep the episodes of other robots in a separate dataset "
                "(persistworld build-meta --check DATASET lists them)",
            )
        self._states.append(episode.states)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Frames of each annotation, 0 if it cannot be used."""
        return np.array([row.length for row in self.rows], np.int64)

    @property
    def training(self) -> NDArray[np.bool_]:
        """Whether each annotation is of the training split."""
        return np.array([row.item.split == "train" for row in self.rows], dtype=bool)

    def columns(self) -> dict[str, NDArray[Any]]:
        """The index's arrays, beside the states."""
        items, texts, problems, _, success, facts = zip(*self.rows, strict=True)
        splits, split_of = _coded([item.split for item in items])
        instructions, text_of = _coded(texts)
        reasons, problem_of = _coded(["", *problems])  # the empty one first
        motions = [self.motions[row] for row in sorted(self.motions)]
        found = [motion for motion in motions if motion is not None]
        return {
            "ids": as_bytes([item.episode for item in items]),
            "splits": as_bytes(splits),
            "split_of": np.array(split_of, np.uint8),
            "texts": as_bytes(instructions),
            "text_of": np.array(text_of, np.int32),
            "problems": as_bytes(reasons),
            "problem_of": np.array(problem_of[1:], np.int32),
            "lengths": self.lengths,
            "success": np.array([_SUCCESS[value] for value in success], np.int8),
            "facts": np.array(facts, np.float64),
            **{sign: np.array([getattr(item, sign) for item in items], np.int64) for sign in _SIGNS},
            "motion": np.concatenate(found or [np.empty((0, 2, self._joints), np.float32)]),
            "motion_of": np.array(sorted(self.motions), np.int64),
            "motion_length": np.array([0 if motion is None else len(motion) for motion in motions], np.int64),
        }


def _coded(values: Sequence[str]) -> tuple[list[str], list[int]]:
    """The distinct values in order of first use, and for each value its index among them."""
    number = {value: code for code, value in enumerate(dict.fromkeys(values))}
    return list(number), [number[value] for value in values]
