"""Reader of raw LeRobot datasets, versions 2.0, 2.1 (one file per episode) and 3.0 (many episodes per file).

Every path comes from the templates in ``meta/info.json``. A camera is a video (``dtype: video``) or a column of images
in the tables (``dtype: image``). A dataset may be partial: an episode without any video on disk is not listed (the
tables of all episodes are small, and usually present).

Checked against what LeRobot 0.6.1 (v3.0) and 0.3.3 (v2.1) write, and 0.6.1 converts, deletes from, merges and splits.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from persistworld_cli.data.raw.clock import Clock
from persistworld_cli.data.raw.video import TIMES_FIX, Frames, iter_rows
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


class VideoSpan(NamedTuple):
    """An episode in a camera's video: from ``begin`` to ``end`` seconds; None: the file holds this episode alone."""

    path: Path
    begin: float | None = None
    end: float | None = None
    shared: int | None = None  # an episode that has some of these seconds too


@dataclass(frozen=True)
class RawEpisode:
    """Location of an episode: table file, and its span in the video of each camera that has one."""

    index: int
    length: int
    tasks: tuple[str, ...]
    table: Path
    videos: dict[str, VideoSpan]


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
            kinds = {k.removeprefix(_IMAGES): v.get("dtype") for k, v in self.features.items()}
            self.cameras = tuple(name for name, kind in kinds.items() if kind in ("video", "image"))
            self._in_videos = tuple(name for name in self.cameras if kinds[name] == "video")
            self._check_info()
        self._known: dict[int, RawEpisode] = {}
        self._file: tuple[Path, pq.ParquetFile, list[set[int] | None]] | None = None
        self._table: tuple[Path, tuple[int, ...], pa.Table] | None = None
        self._last: tuple[tuple[Path, int], pa.Table] | None = None  # the rows of one episode

    def _check_info(self) -> None:
        """Raise if the rest of info.json holds values of the wrong type."""
        whole_number(self.info.get("chunks_size", 1000), "chunks_size", 1, _MOST)
        as_object(self.info.get("splits") or {})
        fields = _PLACE if self.version.startswith("v3") else ("episode_chunk", "episode_index")
        names: dict[str, int | str] = dict.fromkeys(fields, 0)
        fill_template(self.info["data_path"], names)
        if self._in_videos:
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
        """Location of episode ``index``. Raises PersistWorldError: not or wrongly in the metadata, or not on disk."""
        if index in self._known:
            return self._known[index]
        episode = self._all.get(index)
        if isinstance(episode, PersistWorldError):
            raise episode
        if episode is not None and index in self._present:
            return episode
        if episode is not None:
            raise PersistWorldError(f"episode {index} is not on disk", where=str(episode.table), fix=_FETCH)
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

    def width(self, columns: Sequence[str]) -> int | None:
        """How many numbers a row of these columns has, by info.json; None: it does not state it."""
        shapes = [self._shape(name) for name in columns]
        return sum(map(math.prod, shapes)) if all(shapes) else None

    def image_size(self, camera: str) -> tuple[int, int] | None:
        """Height and width of a camera's images, by info.json; None: it does not state them."""
        feature = self._feature(camera)
        shape, names = self._shape(feature), self.features.get(feature, {}).get("names")
        if isinstance(names, list) and len(names) == len(shape) and "height" in names and "width" in names:
            return shape[names.index("height")], shape[names.index("width")]
        sides = [side for side in shape if side > 4]  # the other is the colours, first or last
        return (sides[0], sides[1]) if len(sides) == 2 else None

    def columns(self, index: int) -> list[str]:
        """Names of the columns in the table of an episode."""
        return list(self._rows(self.episode(index)).column_names)

    def clock(self, index: int) -> Clock:
        """Times of an episode's rows: those of column ``timestamp``, without it ``row / fps``.

        Raises:
            PersistWorldError: timestamps that do not increase or leave frames out, or an unreadable table.
        """
        episode = self.episode(index)
        if "timestamp" in self.columns(index):
            stamps, source = self.read(index, ["timestamp"])["timestamp"], "timestamp"
        else:
            stamps, source = np.arange(self._rows(episode).num_rows) / self.fps, f"info.json's {self.fps:g} fps"
        with reading(f"timestamps of episode {index}", episode.table, TIMES_FIX):
            return Clock.of(stamps, self.fps, source)

    def images(self, index: int, camera: str, rows: Sequence[int], threads: int = 0) -> Iterator[Frames]:
        """A camera's images (H, W, 3) at some rows of an episode, ascending, nearest in time (see `video.iter_rows`).

        Files, times and lengths that the metadata states are checked at once, the rest while reading.

        Raises:
            PersistWorldError: no such camera, something missing or damaged, times that disagree by over half a frame.
        """
        key, name = camera.removeprefix(_IMAGES), f"camera '{camera}' of episode {index}"
        clock = self.clock(index)
        if key in self.cameras and key not in self._in_videos:
            return self._stored(index, self._feature(key), rows, name)
        span = self.video(index, camera)
        if span.begin is not None and span.end is not None:
            wrong = None if span.shared is None else f"which overlaps episode {span.shared}"
            if abs(span.end - span.begin - clock.duration) > 0.5 * clock.spacing:
                wrong = f"its {len(clock.times)} rows last {clock.duration:.3f} s"
            if wrong:
                what = f"{name} is from_timestamp {span.begin:.3f} to {span.end:.3f} s in its video, {wrong}"
                raise PersistWorldError(what, where=str(self.path / "meta/episodes"), fix=TIMES_FIX)
        return iter_rows(span.path, clock, rows, name=name, begin=span.begin, threads=threads)

    def video(self, index: int, camera: str) -> VideoSpan:
        """Where the video of an episode's camera is.

        Raises:
            PersistWorldError: the dataset or this episode has no such camera, or the file is not on disk.
        """
        episode, key = self.episode(index), camera.removeprefix(_IMAGES)
        if key not in episode.videos:
            known = key in self._in_videos
            raise PersistWorldError(
                f"episode {index} has no video of camera '{camera}'" if known else f"no camera '{camera}'",
                where=str(self.path / "meta"),
                fix="leave the episode out, or the camera" if known else nearest(key, self.cameras),
            )
        if not episode.videos[key].path.is_file():
            path = str(episode.videos[key].path)
            raise PersistWorldError(f"video of camera '{camera}' is missing", where=path, fix=_FETCH)
        return episode.videos[key]

    def instruction(self, index: int) -> str:
        """The instruction, '' if none is recorded.

        From column ``language_instruction``, else the episode's only task, else the task of its first row (LeRobot
        lists several tasks in any order).
        """
        episode = self.episode(index)
        text = self._first(episode, "language_instruction") or (episode.tasks[0] if len(episode.tasks) == 1 else None)
        if text is None:
            task = self._first(episode, "task_index")
            with reading("unreadable table", episode.table, _FETCH):
                text = "" if task is None else self._tasks.get(whole_number(task, "task_index"), "")
            text = text or next(iter(episode.tasks), "")
        return "" if text == _NO_TASK else str(text)

    @cached_property
    def _all(self) -> dict[int, RawEpisode | PersistWorldError]:
        """Every episode that the metadata names, or why its entry cannot be read."""
        return self._episodes_v3() if self.version.startswith("v3") else self._episodes_v2()

    @cached_property
    def _present(self) -> set[int]:
        """The episodes with a video on disk, or a table where not all cameras are videos; each folder is listed once.

        Episodes with an unreadable entry count as present, so that extraction names them.
        """
        folders: dict[Path, set[str]] = {}

        def there(path: Path) -> bool:
            if path.parent not in folders:
                folders[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
            return path.name in folders[path.parent]

        stored = len(self._in_videos) < len(self.cameras)
        return {
            index
            for index, episode in self._all.items()
            if isinstance(episode, PersistWorldError)
            or any(there(span.path) for span in episode.videos.values())
            or ((stored or not episode.videos) and there(episode.table))
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

    def _episodes_v2(self) -> dict[int, RawEpisode | PersistWorldError]:
        """Version 2: ``meta/episodes.jsonl`` and one file per episode."""
        path = self.path / "meta" / "episodes.jsonl"
        if not path.is_file():
            raise PersistWorldError("list of episodes is missing", where=str(path), fix=_FETCH)
        chunk = int(self.info.get("chunks_size", 1000))

        def parse(row: dict[str, Any]) -> RawEpisode:
            index = int(row["episode_index"])
            names = {"episode_chunk": index // chunk, "episode_index": index}
            return self._episode(row, names, {c: VideoSpan(self._video_file(c, names)) for c in self._in_videos})

        return _listed(read_json_lines(path, "unreadable list of episodes", _FETCH), path, parse)

    def _episodes_v3(self) -> dict[int, RawEpisode | PersistWorldError]:
        """Version 3: ``meta/episodes/chunk-*/file-*.parquet`` gives the file of each episode, and its place there."""
        files = sorted((self.path / "meta" / "episodes").glob("*/*.parquet"))
        if not files:
            raise PersistWorldError("list of episodes is missing", where=str(self.path / "meta/episodes"), fix=_FETCH)
        rows: list[dict[str, Any]] = []
        for path in files:
            with reading("unreadable list of episodes", path, _FETCH):
                # the statistics columns are most of the file: leave them
                names = [n for n in pq.read_schema(path).names if not n.startswith("stats/")]
                _require_once(names)
                rows += pq.read_table(path, columns=names).to_pylist()
        episodes = _listed(rows, self.path / "meta/episodes", self._row_v3)
        _mark_shared([e for e in episodes.values() if isinstance(e, RawEpisode)], 0.5 / self.fps)
        return episodes

    def _row_v3(self, row: dict[str, Any]) -> RawEpisode:
        """An episode from its row in the version 3 list."""
        videos: dict[str, VideoSpan] = {}
        for camera in self._in_videos:
            head = f"videos/{self._feature(camera)}/"
            if _empty(row.get(head + "chunk_index")):  # pandas writes NaN where an episode lacks a camera
                continue
            names = {name: whole_number(row[head + name], head + name, 0, _MOST) for name in _PLACE}
            begin, end = (row[head + name] for name in ("from_timestamp", "to_timestamp"))
            for name, value in (("from_timestamp", begin), ("to_timestamp", end)):
                if not isinstance(value, int | float) or not 0 <= value < _MOST:
                    raise ValueError(f"{head}{name} is {value}, not a time in seconds")
            videos[camera] = VideoSpan(self._video_file(camera, names), float(begin), float(end))
        names = {name: whole_number(row[f"data/{name}"], f"data/{name}", 0, _MOST) for name in _PLACE}
        return self._episode(row, names, videos)

    def _episode(self, row: dict[str, Any], names: dict[str, int], videos: dict[str, VideoSpan]) -> RawEpisode:
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
        return self.path / fill_template(self.info["video_path"], {"video_key": self._feature(camera), **names})

    def _shape(self, feature: str) -> list[int]:
        """A feature's shape by info.json; [] where it states none."""
        shape = self.features.get(feature, {}).get("shape")
        if not isinstance(shape, list) or not all(isinstance(size, int) and size > 0 for size in shape):
            return []
        return shape

    def _feature(self, camera: str) -> str:
        """The feature of a camera; some datasets name it without the usual ``observation.images.``."""
        return camera if camera in self.info["features"] else _IMAGES + camera

    def _first(self, episode: RawEpisode, column: str) -> Any:
        """The first row's value of a column; None where the table has no such column."""
        table = self._rows(episode)
        return table.column(column)[0].as_py() if column in table.column_names else None

    def _rows(self, episode: RawEpisode, camera: str | None = None) -> pa.Table:
        """The rows of one episode, by frame: all columns but images; with a camera's feature, that column of images."""
        if camera is None and self._last is not None and self._last[0] == (episode.table, episode.index):
            return self._last[1]
        if not episode.table.is_file():
            raise PersistWorldError("table is missing", where=str(episode.table), fix=_FETCH)
        with reading("unreadable table", episode.table, _FETCH):
            table = self._groups(episode, camera)
            if "episode_index" in table.column_names:
                table = table.filter(pc.equal(table.column("episode_index"), episode.index))
            if table.num_rows == 0:
                raise PersistWorldError(f"no rows of episode {episode.index}", where=str(episode.table), fix=_FETCH)
            if "frame_index" in table.column_names:
                table = table.sort_by("frame_index")
                frames = table.column("frame_index").to_numpy()
                if not np.array_equal(frames - frames[0], np.arange(len(frames))):
                    raise PersistWorldError("frame_index leaves frames out", where=str(episode.table), fix=_FETCH)
        if camera is None:
            self._last = (episode.table, episode.index), table
        return table

    def _groups(self, episode: RawEpisode, camera: str | None) -> pa.Table:
        """The row groups of the episode's file that may hold it: a v3 file may be too large for memory.

        The last ones stay in memory, without images: a v3 file serves many episodes.
        """
        if self._file is None or self._file[0] != episode.table:
            opened = pq.ParquetFile(episode.table)
            _require_once(opened.schema_arrow.names)
            self._file, self._table = (episode.table, opened, _episodes_of(opened)), None
        _, file, held = self._file
        groups = tuple(group for group, episodes in enumerate(held) if episodes is None or episode.index in episodes)
        if camera is not None:
            return file.read_row_groups(list(groups), columns=[camera, "episode_index", "frame_index"])
        if self._table is None or self._table[1] != groups:
            images = {self._feature(name) for name in self.cameras}
            names = [name for name in file.schema_arrow.names if name not in images]
            self._table = (episode.table, groups, file.read_row_groups(list(groups), columns=names))
        return self._table[2]

    def _stored(self, index: int, feature: str, rows: Sequence[int], name: str) -> Iterator[Frames]:
        """The images of a camera that are stored in the table."""
        episode = self.episode(index)
        if feature not in pq.read_schema(episode.table).names:
            raise PersistWorldError(f"{name} has no images", where=str(episode.table), fix=_FETCH)
        cells, sizes = self._rows(episode, feature).column(feature), set()
        for row in rows:
            image = _decode(cells[int(row)].as_py(), f"{name}, row {row}", episode.table)
            sizes.add(image.shape)
            if len(sizes) > 1:
                raise PersistWorldError(f"{name} has images of several sizes", where=str(episode.table), fix=_FETCH)
            yield image


def _listed(
    rows: Sequence[dict[str, Any]], path: Path, parse: Callable[[dict[str, Any]], RawEpisode]
) -> dict[int, RawEpisode | PersistWorldError]:
    """Episodes by number from their entries in the list ``path``; one that cannot be used does not hide the others.

    Raises:
        PersistWorldError: an entry does not give the number of its episode.
    """
    out: dict[int, RawEpisode | PersistWorldError] = {}
    for number, row in enumerate(rows, 1):
        with reading(f"entry {number} is unreadable", path, _FETCH):
            index = whole_number(row["episode_index"], "episode_index", 0, _MOST)
        try:
            with reading(f"entry of episode {index} is unreadable", path, _FETCH):
                if index in out:
                    raise ValueError("the list has the episode twice")
                out[index] = parse(row)
        except PersistWorldError as error:
            out[index] = error
    return out


def _mark_shared(episodes: Sequence[RawEpisode], half: float) -> None:
    """Note at the spans of a video that overlap by over half a frame (s) which other episode each overlaps."""
    files: dict[tuple[str, Path], list[RawEpisode]] = {}
    for episode in episodes:
        for camera, span in episode.videos.items():
            files.setdefault((camera, span.path), []).append(episode)
    for (camera, _), sharing in files.items():
        last: RawEpisode | None = None  # the one that ends last of those before
        for episode in sorted(sharing, key=lambda one: one.videos[camera].begin or 0.0):
            span, before = episode.videos[camera], last.videos[camera] if last else None
            if last and before and before.end is not None and (span.begin or 0.0) < before.end - half:
                episode.videos[camera] = span._replace(shared=last.index)
                last.videos[camera] = before._replace(shared=episode.index)
            if before is None or (span.end or 0.0) > (before.end or 0.0):
                last = episode


def _empty(value: Any) -> bool:
    """Whether a cell holds nothing: null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _decode(cell: Any, name: str, path: Path) -> Frames:
    """The image (H, W, 3) in a cell ``{bytes, path}``, an encoded PNG or JPEG."""
    from PIL import Image

    if not cell or not cell.get("bytes"):
        raise PersistWorldError(f"{name} has no image in the table", where=str(path), fix=_FETCH)
    with reading(f"{name}: unreadable image", path, _FETCH), Image.open(io.BytesIO(cell["bytes"])) as image:
        if image.mode[0] in "IF":  # converted to RGB, all that is further than 255 mm would be white
            raise PersistWorldError(
                f"{name} is a depth map of {'float' if image.mode == 'F' else '16-bit'} numbers",
                where=str(path),
                fix="make videos of the depth maps: lerobot-edit-dataset --operation.type convert_image_to_video",
            )
        return np.asarray(image.convert("RGB"))


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
    """A list of texts, or one text; None is an empty list. Raises TypeError."""
    if value is not None and not isinstance(value, list | str):
        raise TypeError("tasks are not a list")
    return tuple(str(text) for text in ([value] if isinstance(value, str) else value or []))
