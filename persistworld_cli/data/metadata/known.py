"""What an earlier build-meta read, and the table that the next index is written from.

An annotation is known if its name, size and time and the times of the episode's folders are what they were; its row is
then taken over and nothing of the episode is opened. A table filled from known rows equals one filled by reading.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.data.metadata.index import INDEX_FILE, IndexFile, StateWriter, as_bytes, running
from persistworld_cli.data.metadata.scan import Episode, Facts, Listed
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.read_files import reading

_LOG = logging.getLogger(__name__)
_SUCCESS = {True: 1, False: 0, None: -1}
_UNKNOWN = {code: success for success, code in _SUCCESS.items()}
_SIGNS = ("size", "mtime", "videos", "latents")


def signatures(file: IndexFile) -> list[Listed]:
    """The annotations as they were when the index was made."""
    splits, split_of = file.names("splits"), file.array("split_of").tolist()
    rows = zip(split_of, file.names("ids"), *(file.array(name).tolist() for name in _SIGNS), strict=True)
    return [Listed(splits[code], *rest) for code, *rest in rows]


class Known:
    """The rows of an earlier index; none where there is none, or it was made otherwise."""

    def __init__(self, meta: Path, made: str) -> None:
        """``meta``: its folder; ``made``: what the index must have been made with (`Table.columns`)."""
        self._rows: dict[Listed, int] = {}
        path = meta / INDEX_FILE
        if not made or not path.is_file():
            return
        try:
            self._file = IndexFile(path)
            if self._file.info.get("made") != made:
                return
            with reading("the index is damaged", path):
                self._file.require_whole()
                self._file.check()
                self._read()
        except PersistWorldError as error:
            _LOG.warning("%s: %s; every annotation is read again", path, error.what)
            self._rows = {}

    def _read(self) -> None:
        file = self._file
        self._rows = {item: row for row, item in enumerate(signatures(file))}
        self._texts, self._problems = file.names("texts"), file.names("problems")
        self._text_of, self._problem_of = file.array("text_of").tolist(), file.array("problem_of").tolist()
        self._success, self._facts = file.array("success").tolist(), file.array("facts")
        self._offsets, self._states = file.offsets.tolist(), file.array("states")
        self._fit = {row: number for number, row in enumerate(file.array("motion_of").tolist())}
        self._motions, self._motion_at = file.array("motion"), running(file.array("motion_length")).tolist()

    def row(self, item: Listed, wanted: bool) -> int | None:
        """The row of an unchanged annotation; None if it must be read (``wanted``: with its motion)."""
        row = self._rows.get(item)
        return None if row is None or (wanted and row not in self._fit) else row

    def episode(self, row: int, wanted: bool) -> Episode:
        """What was read of it."""
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


class Table:
    """The rows of the next index while they come in; states go to a file.

    Raises (`add`):
        PersistWorldError: an episode's states are wider or narrower than those before.
    """

    def __init__(self, states: StateWriter) -> None:
        self.items: list[Listed] = []
        self.text_of: list[int] = []
        self.problem_of: list[int] = []
        self.lengths: list[int] = []
        self.success: list[int] = []
        self.facts: list[Facts] = []
        self.motions: dict[int, NDArray[np.float32] | None] = {}
        self._texts: dict[str, int] = {}
        self._problems: dict[str, int] = {"": 0}
        self._states = states
        self._widths: dict[int, str] = {}
        self._joints = 0

    def add(self, item: Listed, episode: Episode, wanted: bool) -> None:
        """The next annotation; ``wanted``: it is one of those the adapter is fitted on."""
        if wanted:
            self.motions[len(self.items)] = self._of_one_arm(episode.motion)
        self.items.append(item)
        self.text_of.append(self._texts.setdefault(episode.text, len(self._texts)))
        self.problem_of.append(self._problems.setdefault(episode.problem, len(self._problems)))
        self.lengths.append(0 if episode.problem else len(episode.states))
        self.success.append(_SUCCESS[episode.success])
        self.facts.append(episode.facts)
        if not episode.problem:
            self._check_width(item, episode.states.shape[1])
            self._states.append(episode.states)

    def _of_one_arm(self, motion: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
        """The motion if it has as many joints as those before."""
        if motion is not None:
            self._joints = self._joints or motion.shape[2]
        return motion if motion is not None and motion.shape[2] == self._joints else None

    def _check_width(self, item: Listed, width: int) -> None:
        self._widths.setdefault(width, item.name)
        if len(self._widths) > 1:
            told = " and ".join(f"{width} ({name})" for width, name in self._widths.items())
            raise PersistWorldError(
                f"states have widths {told}",
                where="annotation/",
                fix="a dataset has one width: keep the episodes of other robots in a dataset of their own "
                "(persistworld build-meta --check DATASET lists them)",
            )

    @property
    def texts(self) -> list[str]:
        """Different instructions, in order of first use."""
        return list(self._texts)

    @property
    def problems(self) -> list[str]:
        """Why each annotation cannot be used, '' if it can."""
        reasons = list(self._problems)
        return [reasons[code] for code in self.problem_of]

    def training(self) -> NDArray[np.bool_]:
        """Whether each annotation is of the training split."""
        return np.array([item.split == "train" for item in self.items], dtype=bool)

    def columns(self) -> dict[str, NDArray[Any]]:
        """The index's arrays, beside the states."""
        splits = list(dict.fromkeys(item.split for item in self.items))
        code = {split: number for number, split in enumerate(splits)}
        motions = {row: m for row, m in self.motions.items() if m is not None}
        rows = sorted(self.motions)
        parts = [motions[row] for row in rows if row in motions] or [np.empty((0, 2, self._joints), np.float32)]
        return {
            "ids": as_bytes([item.episode for item in self.items]),
            "splits": as_bytes(splits),
            "split_of": np.array([code[item.split] for item in self.items], np.uint8),
            "texts": as_bytes(self.texts),
            "text_of": np.array(self.text_of, np.int32),
            "problems": as_bytes(list(self._problems)),
            "problem_of": np.array(self.problem_of, np.int32),
            "lengths": np.array(self.lengths, np.int64),
            "success": np.array(self.success, np.int8),
            "facts": np.array(self.facts, np.float64).reshape(-1, len(Facts._fields)),
            **{sign: np.array([getattr(item, sign) for item in self.items], np.int64) for sign in _SIGNS},
            "motion": np.concatenate(parts),
            "motion_of": np.array(rows, np.int64),
            "motion_length": np.array([len(motions[row]) if row in motions else 0 for row in rows], np.int64),
        }
