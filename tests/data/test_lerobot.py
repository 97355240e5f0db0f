from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_raw import CAMERAS, TASK, columns, table_path, video_path, write_v21, write_v30

from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.errors import PersistWorldError

LENGTHS = [70, 12, 31]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[RawDataset]:
    root = tmp_path_factory.mktemp("raw")
    return [RawDataset(write_v21(root / "v21", dict(enumerate(LENGTHS)))), RawDataset(write_v30(root / "v30", LENGTHS))]


def test_both_versions_give_the_same_episodes(both: list[RawDataset]) -> None:
    for raw in both:
        assert raw.episodes == raw.declared == [0, 1, 2]
        assert raw.fps == 15 and raw.cameras == CAMERAS
        for index, length in enumerate(LENGTHS):
            expected = columns(index, length)
            got = raw.read(index, list(expected))
            for name, values in expected.items():
                assert got[name].dtype == np.float64
                np.testing.assert_array_equal(got[name], values.astype(np.float64), err_msg=name)
            assert raw.instruction(index) == TASK


def test_both_versions_give_the_same_images(both: list[RawDataset]) -> None:
    for index, length in enumerate(LENGTHS):
        seen = []
        for raw in both:
            seen.append(np.stack(list(raw.images(index, "wrist_left", [0, 5, length - 1]))).astype(int))
        assert np.abs(seen[0] - seen[1]).max() <= 3  # next frame would differ by 4
        assert seen[0].mean(axis=(1, 2, 3)).round() == pytest.approx(40 + 4 * np.minimum([0, 5, length - 1], 52), abs=3)


def test_a_part_of_a_dataset_is_normal(tmp_path: Path) -> None:
    root = write_v21(tmp_path, {0: 5, 1: 5, 2: 5})
    for camera in CAMERAS:
        video_path(root, 0, camera).unlink()
    for camera in CAMERAS:
        video_path(root, 1, camera).unlink()
    raw = RawDataset(root)
    assert raw.declared == [0, 1, 2] and raw.episodes == [2]
    with pytest.raises(PersistWorldError, match="episode 0 is not on disk"):
        raw.read(0, ["action.joint_velocity"])
    with pytest.raises(PersistWorldError, match="no episode 7"):
        raw.episode(7)


def test_an_instruction_may_stand_in_the_list_of_tasks_alone(tmp_path: Path) -> None:
    root = write_v21(tmp_path, {0: 5, 1: 5})
    rows = [json.loads(line) for line in (root / "meta/episodes.jsonl").read_text().splitlines()]
    (root / "meta/episodes.jsonl").write_text("\n".join(json.dumps(row | {"tasks": []}) for row in rows))
    for episode in (0, 1):
        table = pq.read_table(table_path(root, episode)).drop(["language_instruction"])
        table = table.append_column("task_index", pa.array([3 + episode] * 5))
        pq.write_table(table, table_path(root, episode))
    (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 3, "task": "turn the knob"}))
    raw = RawDataset(root)
    assert [raw.instruction(episode) for episode in (0, 1)] == ["turn the knob", ""]  # 4 is not in the list


def test_of_a_shared_table_only_the_row_groups_of_the_episode_are_read(tmp_path: Path) -> None:
    root = write_v30(tmp_path, LENGTHS)
    path = root / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=20)  # episode 1 is in the fourth and fifth of six
    raw = RawDataset(root)
    for index in (2, 0, 1):
        got = raw.read(index, ["action.joint_velocity"])["action.joint_velocity"]
        np.testing.assert_array_equal(got, columns(index, LENGTHS[index])["action.joint_velocity"].astype(np.float64))
    assert raw._table is not None and raw._table[1] == (3, 4)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(PersistWorldError, match="no LeRobot dataset here"):
        RawDataset(tmp_path)
    raw = RawDataset(write_v21(tmp_path, {0: 5}, splits={"train": "0:1", "val": "1:2"}))
    assert raw.splits == {"train": (0, 1), "val": (1, 2)}
    with pytest.raises(PersistWorldError, match=r"column 'action\.joint_velocities' is missing") as caught:
        raw.read(0, ["action.joint_velocities"])
    assert "action.joint_velocity" in str(caught.value)
    with pytest.raises(PersistWorldError, match="no camera 'wrist_right'") as caught:
        raw.video(0, "wrist_right")
    assert "wrist_left" in str(caught.value)
    info = tmp_path / "meta/info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"codebase_version": "v1.6"}))
    with pytest.raises(PersistWorldError, match=r"version 'v1\.6'"):
        RawDataset(tmp_path)


def test_real_droid_in_both_versions(shared_data: Path) -> None:
    old, new = RawDataset(shared_data / "droid_raw_v21"), RawDataset(shared_data / "droid_raw_v30")
    assert old.episodes == [0, 1, 5, 6, 199, 1799] and new.episodes == list(range(6))
    names = ["observation.state.cartesian_position", "action.joint_velocity", "is_episode_successful"]
    for a, b in zip(old.episodes, new.episodes, strict=True):
        left, right = old.read(a, names), new.read(b, names)
        assert all(np.array_equal(left[n], right[n]) for n in names)
        assert old.instruction(a) == new.instruction(b)  # v3.0 says "no instruction" where v2.1 is empty
        assert old.clock(a).duration == new.clock(b).duration
