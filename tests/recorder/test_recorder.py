"""The recorder of the bundled world, and the recordings that are shipped."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from bundled_starts import recorder as recorder_module
from bundled_starts import require_drawing

from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.policies.bundled_world.scene import RecordedStart
from persistworld_cli.policies.bundled_world.simulator import recorded_origin

ROOT = Path(__file__).resolve().parents[2]
WORLD = ROOT / "dataset_example" / "world"
CAMERAS = ("exterior_1_left", "exterior_2_left", "wrist_left")
DROID_COLUMNS = [
    "observation.state.joint_position",
    "observation.state.gripper_position",
    "observation.state.cartesian_position",
    "observation.state",
    "action.joint_position",
    "action.gripper_position",
    "action.cartesian_position",
    "action.joint_velocity",
    "action",
    "is_episode_successful",
    "language_instruction",
    "timestamp",
    "frame_index",
    "episode_index",
    "index",
    "task_index",
]
JOINT_LOW = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
JOINT_HIGH = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])


def panda_flange(joints: np.ndarray) -> np.ndarray:
    """Franka's published modified DH table, written apart from the recorder's: (7,) -> (4, 4)."""
    half = np.pi / 2
    rows = [(0, 0.333, 0), (0, 0, -half), (0, 0.316, half), (0.0825, 0, half), (-0.0825, 0.384, -half), (0, 0, half)]
    rows += [(0.088, 0, half), (0, 0.107, 0)]
    pose = np.eye(4)
    for (a, d, alpha), q in zip(rows, [*joints, 0.0], strict=True):
        twist = np.array([[1, 0, 0], [0, np.cos(alpha), -np.sin(alpha)], [0, np.sin(alpha), np.cos(alpha)]])
        turn = np.array([[np.cos(q), -np.sin(q), 0], [np.sin(q), np.cos(q), 0], [0, 0, 1]])
        step = np.eye(4)
        step[:3, :3] = twist @ turn
        step[:3, 3] = np.array([a, 0, 0]) + twist @ np.array([0, 0, d])
        pose = pose @ step
    return pose


def euler_matrix(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """Extrinsic xyz."""
    cr, sr, cp, sp, cy, sy = np.cos(roll), np.sin(roll), np.cos(pitch), np.sin(pitch), np.cos(yaw), np.sin(yaw)
    x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    return z @ y @ x


def check_kinematics(joints: np.ndarray, poses: np.ndarray) -> None:
    for q, pose in zip(joints, poses, strict=True):
        frame = panda_flange(q)
        np.testing.assert_allclose(frame[:3, 3], pose[:3], atol=2e-5)
        np.testing.assert_allclose(frame[:3, :3], euler_matrix(*pose[3:]), atol=2e-5)


# The recorder ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorder():
    return recorder_module("episode")


@pytest.fixture(scope="module")
def simulated(recorder):
    """Three whole episodes at 15 Hz, without images."""
    return [recorder.record_episode(5, index, render=False) for index in range(3)]


@pytest.fixture(scope="module")
def rendering(recorder) -> None:
    require_drawing()


def test_same_seed_same_states_whatever_the_rate(recorder, simulated) -> None:
    slow = recorder.record_episode(5, 1, fps=5, render=False)
    assert (slow.instruction, slow.success) == (simulated[1].instruction, simulated[1].success)
    for name, values in slow.columns.items():
        np.testing.assert_array_equal(values, simulated[1].columns[name][::3], err_msg=name)


def test_episodes_differ(simulated) -> None:
    assert len({episode.objects for episode in simulated}) == 3
    assert all(len({item.colour for item in episode.objects}) == 3 for episode in simulated)


def test_recorded_pose_is_the_kinematics_of_recorded_joints(simulated) -> None:
    for episode in simulated:
        for kind in ("observation.state", "action"):
            joints, poses = (
                episode.columns[f"{kind}.{name}"][::10] for name in ("joint_position", "cartesian_position")
            )
            check_kinematics(joints, poses)


def test_velocities_are_droids(simulated) -> None:
    """Within DROID's range, and the arm moves about 0.054 rad a frame for a velocity of 1."""
    velocity = np.concatenate([episode.columns["action.joint_velocity"][:-1] for episode in simulated])
    moved = np.concatenate(
        [np.diff(episode.columns["observation.state.joint_position"], axis=0) for episode in simulated]
    )
    assert np.abs(velocity).max() <= 1.0 + 1e-4
    assert 0.04 < (velocity * moved).sum() / (velocity**2).sum() < 0.06


def test_grasped_object_follows_the_hand(simulated) -> None:
    """Whenever a small object is up in the air it hangs between the fingers, or rests on another object."""
    carried = 0
    for episode in simulated:
        objects = episode.columns["sim.object_pose"].reshape(-1, 3, 7)[:, :, :3]
        poses = episode.columns["observation.state.cartesian_position"]
        fingers = np.array([pose[:3] + 0.15 * euler_matrix(*pose[3:])[:, 2] for pose in poses])
        step = np.linalg.norm(np.diff(objects[:, :2], axis=0), axis=2)
        lifted = (objects[1:, :2, 2] > 0.09) & (step > 0.012)  # up, and faster than 0.18 m/s
        near = np.linalg.norm(objects[1:, :2] - fingers[1:, None], axis=2) < 0.06
        carried += int((lifted & near).sum())
        assert (lifted & near).sum() >= 0.9 * lifted.sum()
    assert carried > 15


def test_objects_stay_on_the_table(simulated) -> None:
    for episode in simulated:
        places = episode.columns["sim.object_pose"].reshape(-1, 3, 7)[:, :, :3]
        assert places[..., 2].min() > 0.02
        assert places[..., 0].min() > 0.28 and places[..., 0].max() < 0.74 and np.abs(places[..., 1]).max() < 0.31


def test_something_moves_most_of_the_time(simulated) -> None:
    for episode in simulated:
        places = episode.columns["sim.object_pose"].reshape(-1, 3, 7)[::3, :, :3]
        moving = (np.linalg.norm(np.diff(places, axis=0), axis=2) * 5 > 0.02).any(axis=1)
        seconds = moving[: len(moving) // 5 * 5].reshape(-1, 5).any(axis=1)
        assert seconds.mean() > 0.5


def test_instructions_have_an_index(simulated) -> None:
    from persistworld_cli.policies.bundled_world.rules import all_instructions

    texts = all_instructions()
    assert len(set(texts)) == len(texts)
    assert all(episode.instruction in texts for episode in simulated)


def test_recording_on_disk(rendering, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layout, splits and resuming of a small recording, by the command that people run."""
    from dataset_example.recorder.__main__ import main

    command = [sys.executable, "-m", "dataset_example.recorder", str(tmp_path / "out")]
    options = ["--episodes", "2", "--val", "1", "--first-id", "7", "--fps", "5", "--seconds", "1", "--workers", "1"]
    options += ["--design", "steady"]
    subprocess.run([*command, *options], cwd=ROOT, check=True, capture_output=True)
    info = json.loads((tmp_path / "out/meta/info.json").read_text())
    assert info["splits"] == {"train": "7:8", "val": "8:9"}
    assert (info["fps"], info["total_episodes"], info["total_frames"]) == (5, 2, 10)
    check_layout(tmp_path / "out", info)
    first = tmp_path / "out/data/chunk-000/episode_000007.parquet"
    before = first.stat().st_mtime_ns
    arguments = [str(tmp_path / "out"), *options]
    assert main(arguments) == 0 and first.stat().st_mtime_ns == before
    assert main([*arguments, "--seed", "3"]) == 1
    assert "2 are there" in (said := capsys.readouterr().err) and "--seed" in said
    assert main([*arguments, "--design", "varied"]) == 1 and "--design" in capsys.readouterr().err
    assert recorded_origin(RecordedStart(RawDataset(tmp_path / "out"), 8, 0, ())) == (0, "steady")


# Designs of the world -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steady(recorder):
    """Two whole episodes of the world that is easier to learn, without images."""
    from dataset_example.recorder.design import STEADY

    return [recorder.record_episode(5, index, render=False, design=STEADY) for index in range(2)]


def test_default_design_is_that_of_the_shipped_recordings(recorder, info: dict) -> None:
    """Objects, instruction and first pose of shipped episodes, drawn again: no draw was added or moved."""
    from dataset_example.recorder.design import DEFAULT

    for line in read_jsonl(WORLD / "meta/episodes.jsonl")[::4]:
        index = line["episode_index"]
        world, director = recorder.build_world(22, index, DEFAULT)
        drawn = [(item.name, *(round(v, 4) for v in item.rgb)) for item in director.objects]
        assert drawn == [(item["name"], *item["rgb"]) for item in line["objects"]]
        sizes = [[2 * v for v in item.half] for item in director.objects]
        np.testing.assert_allclose(sizes, [item["size"] for item in line["objects"]], atol=1e-4)
        columns = ["observation.state.joint_position", "sim.object_pose"]
        first = pq.read_table(WORLD / f"data/chunk-000/episode_{index:06d}.parquet", columns=columns).slice(0, 1)
        for name, value in world.observe().items():
            if name in columns:
                np.testing.assert_allclose(first[name][0].as_py(), value, atol=1e-5)
        director.next_script(world.snapshot())
        assert [director.instruction] == line["tasks"]
    assert recorded_origin(RecordedStart(RawDataset(WORLD), 0, 0, ())) == (22, DEFAULT.name)


def test_designs_are_frozen(recorder) -> None:
    """Scenes as MJCF and mats of a few episodes, and how the arm moves: other numbers would be another design."""
    from dataset_example.recorder.design import DESIGNS
    from dataset_example.recorder.scene import build_mjcf, sample_scene

    found = {}
    for name, design in DESIGNS.items():
        scenes = [sample_scene(np.random.default_rng([20, index]), design) for index in range(6)]
        told = "".join(build_mjcf(scene) for scene in scenes).encode()
        told += b"".join(scene.mat_pixels.tobytes() for scene in scenes) + repr(design.motion).encode()
        found[name] = hashlib.sha256(told).hexdigest()[:16]
    assert found == {"varied": "55da1ef4475f85c6", "steady": "c3ee84f36a43e51a"}


def test_most_steady_scenes_share_cameras_and_light(recorder) -> None:
    from dataset_example.recorder.design import DESIGNS
    from dataset_example.recorder.scene import sample_scene

    for design in DESIGNS.values():
        scenes = [sample_scene(np.random.default_rng([0, index]), design) for index in range(100)]
        for find in (
            lambda scene: tuple(np.concatenate([camera.position for camera in scene.cameras.values()])),
            lambda scene: (*scene.light_position, scene.light_strength, scene.ambient),
        ):
            found = [find(scene) for scene in scenes]
            most = max(found.count(value) for value in set(found))
            assert most == 1 if design.steady == 0 else abs(most / 100 - design.steady) < 0.1
        for item in (item for scene in scenes for item in scene.objects):
            size = design.objects.sizes[item.shape]
            assert size.across[0] <= item.half[0] == item.half[1] <= size.across[1]
            assert 2 * max(item.half[:2]) < 2 * design.motion.finger_stroke or not item.graspable
        assert len({scene.mat_pixels.tobytes() for scene in scenes}) > 50


def test_steady_episodes_are_good_recordings(steady) -> None:
    test_recorded_pose_is_the_kinematics_of_recorded_joints(steady)
    test_velocities_are_droids(steady)
    test_objects_stay_on_the_table(steady)
    test_instructions_have_an_index(steady)


def test_an_episode_is_restored_in_its_own_design(steady) -> None:
    from dataset_example.recorder.live import restore

    columns, row = {name: values[60] for name, values in steady[1].columns.items()}, 60
    there = {
        "joints": columns["observation.state.joint_position"],
        "gripper": float(columns["observation.state.gripper_position"]),
        "objects": columns["sim.object_pose"].reshape(3, 7),
    }
    assert restore(5, 1, row, design="steady", **there)[1] < 1e-4
    assert restore(5, 1, row, design="varied", **there)[1] > 1e-2


def test_statistics_of_a_world(rendering, recorder) -> None:
    """Two seconds of an episode measured; spells; and a camera that stands still sees what it saw."""
    from benchmarks import world_statistics as statistics
    from dataset_example.recorder.design import STEADY

    touching = np.array([0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1], bool)
    assert statistics.spells(touching) == [(1, 6), (11, 11)]
    told = statistics.measure(STEADY, 900, 1, 2.0, None)
    result = statistics.compare(told, told)
    assert all(row["ratio"][0] == pytest.approx(1) for row in result["rows"].values() if row["new"][0] > 0)
    assert not result["too_rare"] and not result["too_small"]
    u, v = statistics._pixels()
    place, axes = np.array([0.5, 0.1, 0.4]), np.eye(3)  # looks straight down
    table = statistics._on_table(place, axes, 70.0, u, v)
    np.testing.assert_allclose(statistics._project(place, axes, 70.0, table), (u, v), atol=1e-9)
    assert table[0, 40, 1] > place[1] > table[-1, 40, 1] and table[24, -1, 0] > place[0]  # up is y, right is x


# The shipped recordings -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def info() -> dict:
    if not WORLD.is_dir():
        pytest.skip("the bundled world is not in this checkout")
    return json.loads((WORLD / "meta/info.json").read_text())


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_layout(root: Path, info: dict) -> None:
    """Every episode named in `meta/` is there, with DROID's columns, as long as it says."""
    import av

    tasks = {row["task_index"]: row["task"] for row in read_jsonl(root / "meta/tasks.jsonl")}
    episodes = read_jsonl(root / "meta/episodes.jsonl")
    assert len(episodes) == info["total_episodes"] and sum(row["length"] for row in episodes) == info["total_frames"]
    features = [name for name in info["features"] if not name.startswith("observation.images.")]
    for row in episodes:
        index = row["episode_index"]
        place = {"episode_chunk": index // info["chunks_size"], "episode_index": index}
        table = pq.read_table(root / info["data_path"].format(**place))
        assert table.column_names == features and features[: len(DROID_COLUMNS)] == DROID_COLUMNS
        assert table.num_rows == row["length"]
        assert table["episode_index"].unique().to_pylist() == [index]
        assert [tasks[i] for i in table["task_index"].unique().to_pylist()] == row["tasks"]
        assert len(row["objects"]) == 3 and all(
            {"name", "rgb", "size", "shape"} <= item.keys() for item in row["objects"]
        )
        for camera in CAMERAS:
            path = root / info["video_path"].format(video_key=f"observation.images.{camera}", **place)
            with av.open(str(path)) as video:
                stream = video.streams.video[0]
                assert (stream.frames, stream.height, stream.width) == (row["length"], 180, 320)
                assert stream.average_rate == info["fps"]


def test_shipped_layout(info: dict) -> None:
    assert (info["codebase_version"], info["fps"], info["splits"]) == ("v2.1", 15, {"train": "0:60", "val": "60:80"})
    check_layout(WORLD, info)


def test_shipped_numbers(info: dict) -> None:
    """Joints within Franka's limits; poses agree with them; grippers between open and closed."""
    for path in sorted(WORLD.glob("data/chunk-*/episode_*.parquet"))[::8]:
        table = pq.read_table(path)
        column = {name: np.array(table[name].to_pylist()) for name in DROID_COLUMNS if name != "language_instruction"}
        joints = column["observation.state.joint_position"]
        assert (joints > JOINT_LOW).all() and (joints < JOINT_HIGH).all()
        check_kinematics(joints[::20], column["observation.state.cartesian_position"][::20])
        for kind in ("observation.state", "action"):
            gripper = column[f"{kind}.gripper_position"]
            assert gripper.min() >= 0 and gripper.max() <= 1
            np.testing.assert_array_equal(column[kind], np.column_stack([column[f"{kind}.joint_position"], gripper]))
        np.testing.assert_allclose(np.diff(column["timestamp"]), 1 / info["fps"], atol=1e-5)
        assert (np.diff(column["index"]) == 1).all() and column["frame_index"][0] == 0


def test_shipped_matches_a_real_recording(info: dict, shared_data: Path) -> None:
    """Same keys, features and column types as DROID's own files; ours come after them."""
    real = json.loads((shared_data / "droid_raw_v21/meta/info.json").read_text())
    assert set(info) == set(real)
    for name, feature in real["features"].items():
        assert info["features"][name].keys() == feature.keys() and info["features"][name]["shape"] == feature["shape"]
    theirs = pq.read_schema(next((shared_data / "droid_raw_v21/data").glob("*/*.parquet")))
    ours = pq.read_schema(WORLD / "data/chunk-000/episode_000000.parquet")
    assert [(f.name, f.type) for f in ours][: len(theirs)] == [(f.name, f.type) for f in theirs]
