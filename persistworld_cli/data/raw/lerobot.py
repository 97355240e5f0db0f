"""Reader of raw LeRobot datasets, versions 2.0, 2.1 (one file per episode) and 3.0 (many episodes per file).

Every path comes from the templates in ``meta/info.json``. A dataset may be partial: an episode without any video on
disk is not listed (the tables of all episodes are small, and usually present).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from persistworld_cli.errors import PersistWorldError, nearest
from persistworld_cli.read_files import (
    as_object,
    fill_template,
    positive_number,
    read_json,
    read_json_lines,
    reading,
    whole_number,
)

# LeRobot's v3.0 converter writes this where a v2.1 dataset had an empty task.
_NO_TASK = "no instruction"
_IMAGES = "observation.images."
_FETCH = "fetch the file (again), or leave the episode out"
_REPAIR = "repair or fetch the file"
_PLACE = ("chunk_index", "file_index")  # of a version 3 file
_MOST = 2**40  # frames, episodes, numbers of files: more is damage


@dataclass(frozen=True)
class RawEpisode:
    """Location of an episode: table file; for each camera the video file and the number of its first frame there."""

    index: int
    length: int
    tasks: tuple[str, ...]
    table: Path
    videos: dict[str, tuple[Path, int]]


class RawDataset:
    """A raw LeRobot dataset on disk.

    Attributes:
        path: its root folder (with ``meta/info.json``).
        info: what info.json holds.
        fps: recording rate in Hz.
        features: columns and cameras as info.json declares them.
        cameras: their names without the ``observation.images.`` in front.

    Raises:
        PersistWorldError: no such dataset, an unknown version, or unreadable metadata.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        info_file = self.path / "meta" / "info.json"
        if not info_file.is_file():
            raise PersistWorldError(
                "no LeRobot dataset here (meta/info.json is missing)",
                where=str(self.path),
                fix="give the folder that holds meta/, data/ and videos/",
            )
        self.info: dict[str, Any] = read_json(info_file, "unreadable JSON", _REPAIR)
        self.version = str(self.info.get("codebase_version", ""))
        if not self.version.startswith(("v2", "v3")):
            raise PersistWorldError(
                f"LeRobot version '{self.version}' is not supported",
                where=str(info_file),
                fix="convert it to v2.1 or v3.0",
            )
        missing = [key for key in ("fps", "data_path", "features") if key not in self.info]
        if missing:
            raise PersistWorldError(f"{', '.join(missing)} missing", where=str(info_file), fix="repair the file")
        with reading("unreadable dataset description", info_file, _REPAIR):
            self.fps = positive_number(self.info["fps"], "fps")
            self.features: dict[str, dict[str, Any]] = as_object(self.info["features"])
            if odd := [name for name, feature in self.features.items() if not isinstance(feature, dict)]:
                raise ValueError(f"feature '{odd[0]}' is not an object")
            self.cameras = tuple(k.removeprefix(_IMAGES) for k, v in self.features.items() if v.get("dtype") == "video")
            self._check_info()
        self._known: dict[int, RawEpisode] = {}
        self._file: tuple[Path, pq.ParquetFile, list[set[int] | None]] | None = None
        self._table: tuple[Path, tuple[int, ...], pa.Table] | None = None

    def _check_info(self) -> None:
        """Raise if the rest of info.json holds values of the wrong type."""
        whole_number(self.info.get("chunks_size", 1000), "chunks_size", 1, _MOST)
        as_object(self.info.get("splits") or {})
        fields = _PLACE if self.version.startswith("v3") else ("episode_chunk", "episode_index")
        names: dict[str, int | str] = dict.fromkeys(fields, 0)
        fill_template(self.info["data_path"], names)
        if self.cameras:
            fill_template(self.info.get("video_path"), {"video_key": "", **names})

    @property
    def splits(self) -> dict[str, tuple[int, int]]:
        """Split name -> half-open range of episode indices, from info.json (``"train": "0:60"``)."""
        out: dict[str, tuple[int, int]] = {}
        for name, text in dict(self.info.get("splits") or {}).items():
            first, _, last = str(text).partition(":")
            try:
                out[name] = (int(first or 0), int(last) if last else 2**62)
            except ValueError as error:
                raise PersistWorldError(
                    f"split '{name}' reads '{text}'", where=str(self.path / "meta/info.json"), fix="write it as '0:60'"
                ) from error
        return out

    @property
    def episodes(self) -> list[int]:
        """Indices of the episodes on disk (at least one camera; of a dataset without cameras, the table), ascending."""
        return sorted(self._present)

    @property
    def declared(self) -> list[int]:
        """Indices of all episodes that the metadata names, ascending."""
        return sorted(self._all)

    def adopt(self, episode: RawEpisode) -> None:
        """Add an episode that another process found in the list of episodes."""
        self._known[episode.index] = episode

    def episode(self, index: int) -> RawEpisode:
        """Location of episode ``index``. Raises PersistWorldError: not in the metadata, or not on disk."""
        if index in self._known:
            return self._known[index]
        if index in self._present:
            return self._present[index]
        if index in self._all:
            raise PersistWorldError(f"episode {index} is not on disk", where=str(self._all[index].table), fix=_FETCH)
        raise PersistWorldError(
            f"no episode {index} in this dataset",
            where=str(self.path / "meta"),
            fix="take one that meta/episodes names",
        )

    def read(self, index: int, fields: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Columns of an episode in frame order: (T, D) for list columns, (T,) for scalars; floats as float64.

        Raises:
            PersistWorldError: a column is missing, the table is unreadable or has no rows of this episode.
        """
        episode = self.episode(index)
        table = self._rows(episode)
        unknown = [name for name in fields if name not in table.column_names]
        if unknown:
            raise PersistWorldError(
                f"column '{unknown[0]}' is missing",
                where=str(episode.table),
                fix=nearest(unknown[0], table.column_names),
            )
        with reading("unreadable table", episode.table, _FETCH):
            return {name: _column(table, name, episode.table) for name in fields}

    def columns(self, index: int) -> list[str]:
        """Names of the columns in the table of an episode."""
        return list(self._rows(self.episode(index)).column_names)

    def video(self, index: int, camera: str) -> tuple[Path, int, int]:
        """(file, number of its first frame there, number of frames) of an episode's camera.

        Raises:
            PersistWorldError: the dataset has no such camera, or the file is not on disk.
        """
        episode = self.episode(index)
        key = camera.removeprefix(_IMAGES)
        if key not in episode.videos:
            raise PersistWorldError(
                f"no camera '{camera}' in episode {index}", where=str(self.path), fix=nearest(key, episode.videos)
            )
        path, first = episode.videos[key]
        if not path.is_file():
            raise PersistWorldError(f"video of camera '{camera}' is missing", where=str(path), fix=_FETCH)
        return path, first, episode.length

    def instruction(self, index: int) -> str:
        """The instruction, '' if none is recorded.

        From column ``language_instruction``, else the episode's first task, else the task that ``task_index`` names.
        """
        episode = self.episode(index)
        text = self._first(episode, "language_instruction") or next(iter(episode.tasks), None)
        if text is None:
            task = self._first(episode, "task_index")
            with reading("unreadable table", episode.table, _FETCH):
                text = "" if task is None else self._tasks.get(whole_number(task, "task_index"), "")
        return "" if text == _NO_TASK else str(text)

    @cached_property
    def _all(self) -> dict[int, RawEpisode]:
        """Every episode that the metadata names."""
        return self._episodes_v3() if self.version.startswith("v3") else self._episodes_v2()

    @cached_property
    def _present(self) -> dict[int, RawEpisode]:
        """The episodes with a video on disk, or a table where there are no cameras; each folder is listed once."""
        folders: dict[Path, set[str]] = {}

        def there(path: Path) -> bool:
            if path.parent not in folders:
                folders[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
            return path.name in folders[path.parent]

        return {
            index: episode
            for index, episode in self._all.items()
            if any(there(path) for path, _ in episode.videos.values()) or (not episode.videos and there(episode.table))
        }

    @cached_property
    def _tasks(self) -> dict[int, str]:
        """Task number -> instruction, from ``meta/tasks.jsonl`` (v2) or ``meta/tasks.parquet`` (v3); {} without."""
        lines, table = self.path / "meta" / "tasks.jsonl", self.path / "meta" / "tasks.parquet"
        if not lines.is_file() and not table.is_file():
            return {}
        what, path = "unreadable list of tasks", lines if lines.is_file() else table
        with reading(what, path, _FETCH):
            if path == lines:
                rows = read_json_lines(lines, what, _FETCH)
            else:  # pandas wrote the tasks as its index, under a name of its own
                listed = pq.read_table(table)
                _require_once(listed.column_names)
                rows = [{"task": row.get("__index_level_0__"), **row} for row in listed.to_pylist()]
            return {whole_number(row["task_index"], "task_index"): str(row["task"] or "") for row in rows}

    def _episodes_v2(self) -> dict[int, RawEpisode]:
        """Version 2: ``meta/episodes.jsonl`` and one file per episode."""
        path = self.path / "meta" / "episodes.jsonl"
        if not path.is_file():
            raise PersistWorldError("list of episodes is missing", where=str(path), fix=_FETCH)
        chunk = int(self.info.get("chunks_size", 1000))
        out: dict[int, RawEpisode] = {}
        for number, row in enumerate(read_json_lines(path, "unreadable list of episodes", _FETCH), 1):
            with reading(f"entry {number} is unreadable", path, _FETCH):
                index = whole_number(row["episode_index"], "episode_index", 0, _MOST)
                names = {"episode_chunk": index // chunk, "episode_index": index}
                out[index] = self._episode(row, names, {c: (self._video_file(c, names), 0) for c in self.cameras})
        return out

    def _episodes_v3(self) -> dict[int, RawEpisode]:
        """Version 3: ``meta/episodes/chunk-*/file-*.parquet`` gives the file of each episode, and its place there."""
        files = sorted((self.path / "meta" / "episodes").glob("*/*.parquet"))
        if not files:
            raise PersistWorldError("list of episodes is missing", where=str(self.path / "meta/episodes"), fix=_FETCH)
        out: dict[int, RawEpisode] = {}
        for path in files:
            with reading("unreadable list of episodes", path, _FETCH):
                # the statistics columns are most of the file: leave them
                names = [n for n in pq.read_schema(path).names if not n.startswith("stats/")]
                _require_once(names)
                for row in pq.read_table(path, columns=names).to_pylist():
                    episode = self._row_v3(row)
                    out[episode.index] = episode
        return out

    def _row_v3(self, row: dict[str, Any]) -> RawEpisode:
        """An episode from its row in the version 3 list."""
        videos: dict[str, tuple[Path, int]] = {}
        for camera in self.cameras:
            head = f"videos/{self._video_key(camera)}/"
            if row.get(head + "chunk_index") is None:
                continue
            names = {name: whole_number(row[head + name], head + name, 0, _MOST) for name in _PLACE}
            first = round(float(row[head + "from_timestamp"]) * self.fps)
            videos[camera] = (self._video_file(camera, names), whole_number(first, "from_timestamp * fps", 0, _MOST))
        names = {name: whole_number(row[f"data/{name}"], f"data/{name}", 0, _MOST) for name in _PLACE}
        return self._episode(row, names, videos)

    def _episode(self, row: dict[str, Any], names: dict[str, int], videos: dict[str, tuple[Path, int]]) -> RawEpisode:
        """An episode from its row in the list; ``names``: the fields in its table's path template."""
        return RawEpisode(
            index=whole_number(row["episode_index"], "episode_index", 0, _MOST),
            length=whole_number(row["length"], "length", 0, _MOST),
            tasks=_texts(row.get("tasks")),
            table=self.path / fill_template(self.info["data_path"], names),
            videos=videos,
        )

    def _video_file(self, camera: str, names: dict[str, int]) -> Path:
        """Path of a camera's video from info.json's template."""
        return self.path / fill_template(self.info["video_path"], {"video_key": self._video_key(camera), **names})

    def _video_key(self, camera: str) -> str:
        """The feature of a camera; some datasets name it without the usual ``observation.images.``."""
        return camera if camera in self.info["features"] else _IMAGES + camera

    def _first(self, episode: RawEpisode, column: str) -> Any:
        """The first row's value of a column; None where the table has no such column."""
        table = self._rows(episode)
        return table.column(column)[0].as_py() if column in table.column_names else None

    def _rows(self, episode: RawEpisode) -> pa.Table:
        """The rows of one episode, by frame. The last row groups stay in memory: a v3 file serves many episodes."""
        if not episode.table.is_file():
            raise PersistWorldError("table is missing", where=str(episode.table), fix=_FETCH)
        with reading("unreadable table", episode.table, _FETCH):
            table = self._groups(episode)
            if "episode_index" in table.column_names:
                table = table.filter(pc.equal(table.column("episode_index"), episode.index))
            if table.num_rows == 0:
                raise PersistWorldError(f"no rows of episode {episode.index}", where=str(episode.table), fix=_FETCH)
            if "frame_index" in table.column_names:
                table = table.sort_by("frame_index")
                frames = table.column("frame_index").to_numpy()
                if not np.array_equal(frames - frames[0], np.arange(len(frames))):
                    raise PersistWorldError("frame_index leaves frames out", where=str(episode.table), fix=_FETCH)
        return table

    def _groups(self, episode: RawEpisode) -> pa.Table:
        """The row groups of the episode's file that may hold it: a v3 file may be too large for memory."""
        if self._file is None or self._file[0] != episode.table:
            opened = pq.ParquetFile(episode.table)
            _require_once(opened.schema_arrow.names)
            self._file, self._table = (episode.table, opened, _episodes_of(opened)), None
        _, file, held = self._file
        groups = tuple(group for group, episodes in enumerate(held) if episodes is None or episode.index in episodes)
        if self._table is None or self._table[1] != groups:
            self._table = (episode.table, groups, file.read_row_groups(list(groups)))
        return self._table[2]


def _require_once(names: Sequence[str]) -> None:
    """Raise ValueError if a table has two columns with one name: it is unknown which one is valid."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"column '{twice}' appears twice")


def _episodes_of(file: pq.ParquetFile) -> list[set[int] | None]:
    """The episodes in each row group; None where the table does not say.

    It reads the column itself: reading a column's statistics in a damaged file crashes the process (pyarrow 26).
    """
    if "episode_index" not in file.schema_arrow.names:
        return [None] * file.num_row_groups
    columns = (file.read_row_group(group, columns=["episode_index"]) for group in range(file.num_row_groups))
    return [set(pc.unique(column.column(0)).to_pylist()) for column in columns]


def _column(table: pa.Table, name: str, path: Path) -> NDArray[Any]:
    """A column as an array; nulls in it are an error."""
    column = table.column(name).combine_chunks()
    if column.null_count:
        raise PersistWorldError(f"column '{name}' has {column.null_count} empty cells", where=str(path), fix=_FETCH)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        flat = np.asarray(column.flatten().to_numpy(zero_copy_only=False))
        if flat.size % table.num_rows:
            raise PersistWorldError(f"column '{name}' has rows of unequal length", where=str(path), fix=_FETCH)
        array = flat.reshape(table.num_rows, -1)
    else:
        array = np.asarray(column.to_numpy(zero_copy_only=False))
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _texts(value: Any) -> tuple[str, ...]:
    """A list of texts; None is an empty one. Raises TypeError."""
    if value is not None and not isinstance(value, list):
        raise TypeError("tasks are not a list")
    return tuple(str(text) for text in value or [])
