"""Ways in which a recording can be broken: each spoils one episode of a small raw dataset (version 2.1)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from data_raw import CAMERAS, table_path, video_path

from persistworld_cli.data.raw import video

LENGTH = 12  # raw frames of every episode
GRIPPER = "observation.state.gripper_position"
Break = Callable[[Path, int], None]


def _table(change: Callable[[pa.Table], pa.Table]) -> Break:
    """Write the table of an episode again, changed."""

    def spoil(raw: Path, episode: int) -> None:
        pq.write_table(change(pq.read_table(table_path(raw, episode))), table_path(raw, episode))

    return spoil


def _bytes(camera: str | None, change: Callable[[bytes], bytes]) -> Break:
    """Change the bytes of a camera's video, or of the table."""

    def spoil(raw: Path, episode: int) -> None:
        path = video_path(raw, episode, camera) if camera else table_path(raw, episode)
        path.write_bytes(change(path.read_bytes()))

    return spoil


def _column(table: pa.Table, value: float | None) -> pa.Table:
    values = table.column(GRIPPER).to_pylist()
    values[4] = value
    return table.set_column(table.column_names.index(GRIPPER), GRIPPER, pa.array(values, pa.float32()))


def _without(data: bytes) -> bytes:
    """The middle of the images' data (box mdat) overwritten; the container around them is whole."""
    begin = data.index(b"mdat") + 4
    size = int.from_bytes(data[begin - 8 : begin - 4], "big") - 8
    first, last = begin + size // 3, begin + 2 * size // 3
    return data[:first] + b"\0" * (last - first) + data[last:]


def _rows(raw: Path, episode: int, **changes: object) -> None:
    """Change an episode's row in meta/episodes.jsonl."""
    path = raw / "meta/episodes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row | changes if row["episode_index"] == episode else row for row in rows]
    path.write_text("\n".join(json.dumps(row) for row in rows))


def _shorter(raw: Path, episode: int) -> None:
    mp4 = video_path(raw, episode, CAMERAS[1])
    video.write_mp4(mp4, video.read_frames(mp4, range(9)), 15)


def _noise(raw: Path, episode: int) -> None:
    """A video whose images are noise (so that its data is long), damaged in the middle."""
    mp4 = video_path(raw, episode, CAMERAS[0])
    images = np.random.default_rng(0).integers(0, 256, (LENGTH, 32, 48, 3), dtype=np.uint8)
    video.write_mp4(mp4, images, 15)
    mp4.write_bytes(_without(mp4.read_bytes()))


BROKEN: dict[str, tuple[Break, str]] = {  # what is done, and what the report must say
    "camera missing": (
        lambda raw, e: video_path(raw, e, CAMERAS[2]).unlink(),
        "video of camera 'wrist_left' is missing",
    ),
    "mp4 cut short": (_bytes(CAMERAS[0], lambda data: data[: len(data) // 2]), "cannot decode video"),
    "mp4 is garbage": (_bytes(CAMERAS[1], lambda data: bytes(range(256)) * 20), "cannot decode video"),
    "mp4 of no bytes": (_bytes(CAMERAS[0], lambda data: b""), "file is empty"),
    "mp4 damaged in the middle": (_noise, "cannot decode video|in the video, at|has . frames"),
    "video shorter than table": (_shorter, "camera 'exterior_2_left' of episode . has 9 frames, the table 12 rows"),
    "NaN in a state": (
        _table(lambda t: _column(t, float("nan"))),
        f"'{GRIPPER}' holds values that are not finite numbers",
    ),
    "empty cell in a state": (_table(lambda t: _column(t, None)), f"'{GRIPPER}' has 1 empty cells"),
    "table without rows": (_table(lambda t: t.slice(0, 0)), "no rows of episode"),
    "table too short": (_table(lambda t: t.slice(0, 8)), "8 rows, the metadata says 12"),
    "row left out, another twice": (
        _table(lambda t: t.take([0, 1, 2, 4, 4, *range(5, 12)])),
        "frame_index leaves frames out",
    ),
    "table missing": (lambda raw, e: table_path(raw, e).unlink(), "table is missing"),
    "table is no parquet": (_bytes(None, lambda data: b"PAR1 cut short"), "unreadable table"),
    "table of no bytes": (_bytes(None, lambda data: b""), "unreadable table"),
    "state column missing": (
        _table(lambda t: t.drop(["observation.state.cartesian_position"])),
        "column 'observation.state.cartesian_position' is missing",
    ),
    "metadata of another length": (lambda raw, e: _rows(raw, e, length=11), "12 rows, the metadata says 11"),
}


def no_instruction(raw: Path, episode: int) -> None:
    """An episode that nothing tells the instruction of: no fault of the recording, but worth a word."""
    _rows(raw, episode, tasks=[])
    _table(lambda t: t.drop(["language_instruction"]))(raw, episode)
