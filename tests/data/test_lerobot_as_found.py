"""LeRobot datasets as they are found: what is accepted, and which fault is named with episode, camera and values.

The layout is what LeRobot 0.6.1 (v3.0) and 0.3.3 (v2.1) write: their own files give the same images and states.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_raw import CAMERAS, HEIGHT, TASK, WIDTH, columns, encode, image, table_path, video_path, write_v21, write_v30
from PIL import Image

from persistworld_cli.config.settings import WorldSettings
from persistworld_cli.data.metadata.annotations import load_annotation
from persistworld_cli.data.raw import video
from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.extraction.pipeline import extract_latents
from persistworld_cli.training.vae import load_images

LENGTHS, CAMERA = [8, 7, 9], CAMERAS[0]
SHARED = "data/chunk-000/file-000.parquet"  # of a v3.0 dataset
LIST = "meta/episodes/chunk-000/file-000.parquet"
HEAD = f"videos/observation.images.{CAMERA}/"
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same three episodes in every layout."""
    root = tmp_path_factory.mktemp("raw")
    lengths = dict(enumerate(LENGTHS))
    return {
        "v2.1": write_v21(root / "a", lengths),
        "v2.1, images": write_v21(root / "b", lengths, stored=True),
        "v3.0": write_v30(root / "c", LENGTHS),
        "v3.0, images": write_v30(root / "d", LENGTHS, stored=True),
    }


def change(file: str, **cells: Any) -> Change:
    """Write columns of a table again; ``cells``: column -> function of its list of values; ``__`` means ``/``."""

    def apply(root: Path) -> None:
        table = pq.read_table(root / file)
        for name, function in cells.items():
            name = name.replace("head__", HEAD).replace("camera", f"observation.images.{CAMERA}")
            array = pa.array(function(table.column(name).to_pylist()))
            table = table.set_column(table.column_names.index(name), name, array)
        pq.write_table(table, root / file)

    return apply


def second(value: Any) -> Callable[[list[Any]], list[Any]]:
    """In the list of episodes: another value for episode 1."""
    return lambda values: [float(values[0]), value, float(values[2])]


def rows(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[list[Any]], list[Any]]:
    """In the shared table: other values in the rows of episode 1."""
    begin, end = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    return lambda values: [*values[:begin], *function(np.array(values[begin:end])).tolist(), *values[end:]]


def info(**values: Any) -> Change:
    def apply(root: Path) -> None:
        path = root / "meta/info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def film(fps: float, frames: list[int]) -> Change:
    """Another video of episode 1 (v2.1)."""

    def apply(root: Path) -> None:
        video.write_mp4(video_path(root, 1, CAMERA), [image(1, 0, f) for f in frames], fps, crf=1)

    return apply


def listed(**values: Any) -> Change:
    """Other values of episode 1 in episodes.jsonl (v2.1)."""

    def apply(root: Path) -> None:
        path = root / "meta/episodes.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps(line | (values if line["episode_index"] == 1 else {})) for line in lines))

    return apply


def depth_png() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((HEIGHT, WIDTH), 3000, np.uint16)).save(out, "PNG")
    return out.getvalue()


def no_timestamps(root: Path) -> None:
    for path in (root / "data").rglob("*.parquet"):
        pq.write_table(pq.read_table(path).drop(["timestamp"]), path)


EMPTY = {f"head__{name}": second(float("nan")) for name in ("chunk_index", "file_index")}
FAULTS: dict[str, tuple[str, list[Change], str]] = {  # layout, changes, how episode 1 is refused
    "NaN in the video columns": ("v3.0", [change(LIST, **EMPTY)], f"episode 1 has no video of camera '{CAMERA}'"),
    "null in the video columns": (
        "v3.0",
        [change(LIST, head__chunk_index=second(None))],
        f"episode 1 has no video of camera '{CAMERA}'",
    ),
    "NaN in from_timestamp": (
        "v3.0",
        [change(LIST, head__from_timestamp=second(float("nan")))],
        "entry of episode 1 is unreadable: .*from_timestamp is nan",
    ),
    "from_timestamp two frames late": (
        "v3.0",
        [change(LIST, head__from_timestamp=second(10 / 15))],
        f"camera '{CAMERA}' of episode 1 is from_timestamp 0.667 to 1.000 s in its video, its 7 rows last 0.467 s",
    ),
    "a frame lost in the table": (
        "v3.0",
        [change(SHARED, timestamp=rows(lambda t: t + (t > 0.3) / 15))],
        "timestamps of episode 1: rows 4 and 5 are at 0.267 and 0.400 s, 2.0 frames apart",
    ),
    "a timestamp that is no number": (
        "v3.0, images",
        [change(SHARED, timestamp=rows(lambda t: np.where(t > 0.25, np.nan, t)))],
        "timestamps of episode 1: the timestamp of row 4 is not a finite number",
    ),
    "timestamps that stand still": (
        "v3.0, images",
        [change(SHARED, timestamp=rows(lambda t: np.minimum(t, t[5])))],
        "timestamps of episode 1: rows 5 and 6 are at 0.333 and 0.333 s",
    ),
    "no image in a cell": (
        "v3.0, images",
        [change(SHARED, camera=lambda cells: [None if i == 11 else c for i, c in enumerate(cells)])],
        f"camera '{CAMERA}' of episode 1, row 3 has no image",
    ),
    "depth maps in the table": (
        "v3.0, images",
        [
            change(
                SHARED,
                camera=lambda cells: [
                    {"bytes": depth_png(), "path": ""} if 8 <= i < 15 else c for i, c in enumerate(cells)
                ],
            )
        ],
        f"camera '{CAMERA}' of episode 1, row 0 is a depth map of 16-bit numbers",
    ),
    "timestamps at half the video's speed": (
        "v2.1",
        [change("data/chunk-000/episode_000001.parquet", timestamp=lambda t: [2 * x for x in t])],
        f"camera '{CAMERA}' of episode 1: frame 2 is at 0.133 s in the video, at 0.267 s by timestamp",
    ),
    "a video at half speed": (
        "v2.1",
        [film(7.5, list(range(7)))],
        f"camera '{CAMERA}' of episode 1: frame 1 is at 0.133 s in the video, at 0.067 s by timestamp",
    ),
    "a video with more frames than rows": (
        "v2.1",
        [film(15, list(range(8)))],
        f"camera '{CAMERA}' of episode 1 has 8 frames, the table 7 rows",
    ),
    "a length that is none": ("v2.1", [listed(length=None)], "entry of episode 1 is unreadable: length is None"),
}


def changed(prepared: dict[str, Path], layout: str, changes: list[Change], to: Path) -> Path:
    shutil.copytree(prepared[layout], to)
    for apply in changes:
        apply(to)
    return to


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_its_episode_alone_and_is_named(prepared: dict[str, Path], tmp_path: Path, fault: str) -> None:
    layout, changes, expected = FAULTS[fault]
    raw = RawDataset(changed(prepared, layout, changes, tmp_path / "raw"))
    assert raw.episodes == [0, 1, 2]
    with pytest.raises(PersistWorldError, match=expected) as caught:
        list(raw.images(1, CAMERA, [0, 3, 6]))
    assert caught.value.where and caught.value.fix
    assert [len(list(raw.images(index, CAMERA, [0, 3, 6]))) for index in (0, 2)] == [3, 3]


ACCEPTED: dict[str, tuple[str, list[Change]]] = {  # layout, changes after which the same states and images come out
    "v2.1": ("v2.1", []),
    "v2.1, images": ("v2.1, images", []),
    "v3.0": ("v3.0", []),
    "v3.0, images": ("v3.0, images", []),
    "info.json says twice the rate": ("v3.0", [info(fps=30)]),
    "info.json says half the rate": ("v2.1", [info(fps=7.5)]),
    "info.json says twice the rate of images": ("v2.1, images", [info(fps=30)]),
    "timestamps of the clock on the wall": ("v3.0", [change(SHARED, timestamp=rows(lambda t: t + 1000))]),
    "timestamps that tremble": ("v3.0", [change(SHARED, timestamp=rows(lambda t: t + 0.015 * np.sin(50 * t)))]),
    "no timestamps": ("v2.1", [no_timestamps]),
    "numbers of files that are floats": ("v3.0", [change(LIST, head__file_index=lambda v: [float(x) for x in v])]),
    "one task instead of a list": ("v2.1", [listed(tasks=TASK)]),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_time_is_what_timestamps_say(prepared: dict[str, Path], tmp_path: Path, name: str) -> None:
    layout, changes = ACCEPTED[name]
    raw = changed(prepared, layout, changes, tmp_path / "raw")
    world = WorldSettings(cameras=(CAMERA,), exterior=(0,), wrist=(), height=HEIGHT, width=WIDTH)
    report = extract_latents(world, raw, tmp_path / "out", encode)
    assert report.done == ["0", "1", "2"] and not report.failed
    assert set(report.other_fps.values()) == ({15.0} if "info.json" in name else set())
    for index, length in enumerate(LENGTHS):
        note = load_annotation(tmp_path / f"out/annotation/train/{index}.json")
        want = columns(index, length)["observation.state.gripper_position"][::3].astype(float)
        assert np.array(note["states"])[:, -1].tolist() == want.tolist()
        assert note["raw_fps"] == 15 and note["texts"] == [TASK]
        latents = np.load(tmp_path / f"out/latent_videos/train/{index}/0.npy").astype(float)
        brightness = 255 * latents[:, :3, HEIGHT // 16 :].mean(axis=(1, 2, 3))
        assert brightness == pytest.approx(40 + 12 * np.arange(len(brightness)), abs=1.5)  # one frame is 4


def test_without_timestamps_the_rate_of_info_json_must_be_that_of_the_video(
    prepared: dict[str, Path], tmp_path: Path
) -> None:
    raw = RawDataset(changed(prepared, "v2.1", [no_timestamps, info(fps=30)], tmp_path / "raw"))
    with pytest.raises(PersistWorldError, match=r"is at 0\.067 s in the video, at 0\.033 s by info\.json's 30 fps"):
        list(raw.images(1, CAMERA, [0]))


def test_two_episodes_in_the_same_seconds_of_a_video_are_both_in_doubt(
    prepared: dict[str, Path], tmp_path: Path
) -> None:
    early = change(LIST, head__from_timestamp=second(6 / 15), head__to_timestamp=second(13 / 15))
    raw = RawDataset(changed(prepared, "v3.0", [early], tmp_path / "raw"))
    for index, other in ((0, 1), (1, 0)):
        with pytest.raises(PersistWorldError, match=f"of episode {index} .* s in its video, which overlaps.* {other}"):
            raw.images(index, CAMERA, [0])
    assert len(list(raw.images(2, CAMERA, [0]))) == len(list(raw.images(0, CAMERAS[1], [0]))) == 1


def test_several_tasks_of_an_episode_are_in_any_order(prepared: dict[str, Path], tmp_path: Path) -> None:
    raw = changed(prepared, "v2.1", [listed(tasks=["then push it", "lift it"])], tmp_path / "raw")
    table = pq.read_table(table_path(raw, 1)).drop(["language_instruction"])
    pq.write_table(table.append_column("task_index", pa.array([1] * LENGTHS[1])), table_path(raw, 1))
    tasks = pa.table({"task": ["then push it", "lift it"], "task_index": [0, 1]})
    pq.write_table(tasks, raw / "meta/tasks.parquet")  # the other version's form
    assert RawDataset(raw).instruction(1) == "lift it"
    (raw / "meta/tasks.parquet").unlink()
    assert RawDataset(raw).instruction(1) == "then push it"


def test_images_to_train_a_vae_follow_the_timestamps_too(prepared: dict[str, Path], tmp_path: Path) -> None:
    world = WorldSettings(cameras=(CAMERA,), exterior=(0,), wrist=(), height=HEIGHT, width=WIDTH)
    raw = changed(prepared, "v3.0", [info(fps=30)], tmp_path / "raw")
    images = load_images(raw, world, tmp_path / "images.npy", quiet=True)
    assert images.shape == (3, 3, HEIGHT, WIDTH, 3)  # as many as the shortest episode has
    assert images[:, :, HEIGHT // 2 :].mean(axis=(2, 3, 4)) == pytest.approx(np.array([[40, 52, 64]] * 3), abs=1.5)


@pytest.mark.parametrize("fault", ["NaN in the video columns", "a frame lost in the table"])
def test_episodes_without_usable_images_are_left_out_by_name(
    prepared: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    world = WorldSettings(cameras=(CAMERA,), exterior=(0,), wrist=(), height=HEIGHT, width=WIDTH)
    layout, changes, message = FAULTS[fault]
    images = load_images(changed(prepared, layout, changes, tmp_path / "raw"), world, tmp_path / "i.npy", quiet=True)
    assert images.shape[0] == 2 and images[1, 0].mean() != images[0, 0].mean()
    assert re.search(rf"1 of 3 episodes cannot be read and are left out:\n  episode 1: .*{message}", caplog.text)
    with pytest.raises(PersistWorldError, match=r"none of 3 episodes can be read:(\n  episode \d: .*){3}"):
        load_images(tmp_path / "raw", replace(world, cameras=("nowhere",)), tmp_path / "none.npy", quiet=True)
    assert not (tmp_path / "none.npy").exists()


def test_a_recording_slower_than_the_model_is_refused(prepared: dict[str, Path], tmp_path: Path) -> None:
    world = WorldSettings(cameras=(CAMERA,), exterior=(0,), wrist=(), height=HEIGHT, width=WIDTH, rate_hz=20)
    report = extract_latents(world, prepared["v2.1"], tmp_path / "out", encode)
    assert "recorded at 15 fps, under the model's 20 Hz" in report.failed[0]["reason"]
