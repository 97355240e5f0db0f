"""A robot of one's own by TOML alone: the shipped one-camera preset and its example, from recordings to a policy."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_in_process import run_in_process
from safetensors.torch import load_file
from typer.testing import CliRunner

from dataset_example.six_joints import JOINTS, joint_angles, main
from persistworld_cli.commands.app import app
from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.requests import PolicyRolloutRequest
from persistworld_cli.config.settings import RobotSettings, Settings
from persistworld_cli.data.clips.store import EpisodeStore, open_store
from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.interact.drive import open_session
from persistworld_cli.interact.live import _status
from persistworld_cli.interact.outputs import write_lerobot_zip
from persistworld_cli.interact.web import hello
from persistworld_cli.launch import launcher
from persistworld_cli.policies.action_spaces import ArmState, JointPosition, JointVelocity, Pose
from persistworld_cli.policies.run import make_plan
from persistworld_cli.robot.adapter import GainAdapter
from persistworld_cli.robot.keyboard import KeyMap

PRESET = """
extends = "one-camera"

[world]
raw = "{root}/raw"
dataset = "{root}/latents"
val_rule = "every-2"

[pretrain]
updates = 1
batch = 1
mixed_precision = "no"

[launch]
device = "cpu"
"""
FRAMES = 11


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings and the preset."""
    root = tmp_path_factory.mktemp("arm")
    main([str(root / "raw"), "--episodes", "2", "--frames", str(FRAMES)])
    (root / "arm.toml").write_text(PRESET.format(root=root))
    return root


@pytest.fixture(scope="module")
def run(root: Path) -> Any:
    """``persistworld ARGUMENTS`` with the preset, its task in this process; the result."""

    def command(*arguments: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, [*arguments, "--preset", str(root / "arm.toml"), "--json"])
        assert done.exit_code == 0, done.output
        out: dict[str, Any] = json.loads(done.stdout)
        return out

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(launcher, "run_task", run_in_process)
        patched.chdir(root)
        yield command


@pytest.fixture(scope="module")
def weights(root: Path, run: Any) -> str:
    """A model of this robot after one update."""
    vae = "bundled:presets/tiny/base"
    assert run("extract-latents", "--vae", vae, "--workers", "0")["done"] == 2
    store = EpisodeStore(root / "latents")
    recorded = joint_angles(0, FRAMES + 1)[:-1].astype(np.float32)
    np.testing.assert_array_equal(store.annotation("train", "0").states, recorded.astype(float))
    meta = run("build-meta", "--workers", "1")
    assert [row["number"] for row in meta["health"]["states"]] == list(JOINTS)
    trained = run("pretrain", "--scratch", "--vae", vae)
    assert load_file(trained["weights"])["action_encoder.action_encode.0.weight"].shape[1] == len(JOINTS)
    return str(trained["weights"])


@pytest.fixture(scope="module")
def own(root: Path, weights: str) -> Settings:
    return load_settings(str(root / "arm.toml"), [f"model.ckpt={weights}"], env={})


def test_evaluation_and_driving(run: Any, weights: str) -> None:
    result = run("eval", "--ckpt", weights, "--steps", "1")
    assert (result["rollouts"], result["steps"]) == (1, 1) and result["table"]
    driven = run("drive", "--ckpt", weights, "--keys", "rk")
    poses = np.array(json.loads(Path(driven["json"]).read_text())["poses"])
    assert poses.shape == (2, 5, 6) and np.allclose(np.ptp(poses, axis=1), [[0, 10, 0, 0, 0, 0], [0, 0, 0, 0, 0, 15]])


def test_page_terminal_and_export_show_the_robots_own_numbers(own: Settings, tmp_path: Path) -> None:
    session = open_session(own)
    shown = hello(session, "name")
    assert shown["dimensions"][0] == {"name": "base", "unit": "deg", "low": -35, "high": 35}
    assert {"key": "r", "name": "shoulder", "way": "+", "meaning": "right (+shoulder)"} in shown["keys"]
    lines = "\n".join(_status(session, 80))
    assert f"shoulder {session.pose[1]:+.3f} deg" in lines and "r right (+shoulder)" in lines
    assert max(map(len, lines.splitlines())) < 80
    write_lerobot_zip(session, tmp_path / "drive.zip")
    zipfile.ZipFile(tmp_path / "drive.zip").extractall(tmp_path)
    raw = RawDataset(tmp_path / "drive")
    assert set(raw.features) >= {"observation.state", "action", "observation.images.front"}
    assert raw.read(0, ["observation.state"])["observation.state"].shape == (1, 6)
    assert raw.info["robot_type"] == "six_joints"


class Nod:
    """Raises the tool by a degree per frame."""

    seen: list[dict[str, Any]] = []  # noqa: RUF012
    limit = 60.0

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(obs)
        rows = np.repeat(obs["observation/state"][None], 6, axis=0)
        rows[:, 5] = np.minimum(rows[:, 5] + np.arange(1, 7), self.limit)
        return {"actions": rows}

    def reset(self) -> None:
        self.seen.clear()


def test_a_policy_answers_with_states(run: Any, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("pi-rollout", "--ckpt", weights, "--policy", f"{__name__}:Nod", "--steps", "2")
    result = run(*arguments)
    record = json.loads(Path(result["rollouts"][0]["json"]).read_text())
    poses = np.array(record["poses"])
    assert poses.shape == (2, 5, 6) and np.allclose(np.diff(poses[..., 5], axis=1), 1) and record["fps"] == 10
    assert np.allclose(poses[1, 0], poses[0, -1]) and record["joint_pos"] == record["joint_vel"] == []
    assert Nod.seen[0]["observation/image"].shape == (160, 160, 3) and set(Nod.seen[0]) == {
        *("observation/image", "observation/state", "prompt")
    }
    raw = RawDataset(Path(result["lerobot"]))
    np.testing.assert_allclose(raw.read(0, ["action"])["action"][:4], poses[0, 1:], rtol=1e-6)
    assert run("pi-rollout", "--ckpt", weights, "--policy", "hold", "--steps", "1")["complete"]

    monkeypatch.setattr(Nod, "limit", 75.0)
    for more, text in (
        (("--set", "robot.limits.tool=-60,-59"), "limited to -60 to -59 deg"),
        (("--set", "policy.rate_hz=15"), "15 frames per second; the world has 10"),
        (("--actions", "joint-velocity"), "needs the arm's kinematics"),
        (("--set", "policy.images.wrist=hand"), "no camera 'hand', which 'wrist' shows"),
    ):
        with pytest.raises(AssertionError, match=text):
            run(*arguments, *more)


def test_numbers_without_names_are_refused(own: Settings) -> None:
    unnamed = Settings(world=own.world, model=own.model)
    request, store = PolicyRolloutRequest(policy="hold"), open_store(unnamed)
    for call in (lambda: open_session(unnamed), lambda: make_plan(unnamed, request, store)):
        with pytest.raises(PersistWorldError, match=r"states have 6 numbers, but robot\.dimensions is not set"):
            call()


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ('robot.dimensions=["a", "b"]', r"robot\.dimensions has 2 entries, but model\.action_dim = 6"),
        ("robot.limits.wrsit=-1,1", "robot.limits names 'wrsit', which is no number of the state"),
        ("robot.limits.wrist=1,1", "robot.limits.wrist = 1 .. 1 is empty"),
        ("drive.step.x=1", "drive.step names 'x'"),
        ("drive.step={ base = 1 }", "drive.step has no 'shoulder', which key 'r' changes"),
        ("drive.keys.w=wrist=90", "outside robot.limits.wrist"),
        ("drive.keys.w=open", "'open' of key 'w' is not an action"),
        ("drive.step_m=0.1", "'drive.step_m' has been replaced"),
    ],
)
def test_what_does_not_fit_the_robot_is_named(item: str, text: str) -> None:
    with pytest.raises(PersistWorldError, match=text):
        load_settings("one-camera", [item], env={})


def test_nothing_of_the_bundled_world_is_inherited() -> None:
    settings = load_settings("one-camera", env={})
    assert settings.post_train.referees == ("sharpness_gap", "st_lpips") and "bundled" not in settings.world.raw


class Planar:
    """Two joints in degrees, one metre each."""

    joint_low, joint_high = (-90.0, -90.0), (90.0, 90.0)

    def pose(self, joints: np.ndarray) -> np.ndarray:
        angles = np.radians(np.cumsum(joints, axis=-1))
        return np.stack([np.cos(angles).sum(axis=-1), np.sin(angles).sum(axis=-1)], axis=-1)


@pytest.mark.parametrize("names", [("x m", "y m"), ("x m", "y m", "jaw %")])
def test_other_arms_are_moved_by_their_kinematics(names: tuple[str, ...]) -> None:
    gripper = len(names) == 3
    robot = RobotSettings(dimensions=names, limits={"jaw": (0.0, 100.0)} if gripper else {})
    arm = Planar(), KeyMap(Settings(robot=robot)).dimensions
    joints = np.array([0.0, 90.0, 40.0][: len(names)])
    now = ArmState(np.append(arm[0].pose(joints[:2]), joints[2:]), joints)
    rows = np.tile([[10.0, -10.0, 140.0][: len(names)]], (2, 1))
    moved = JointVelocity(GainAdapter(0.5), 1.0, False, False, *arm).follow(rows, now, 2)
    np.testing.assert_allclose(moved.joints[:, :2], [[0, 90], [5, 85], [10, 80]])
    np.testing.assert_allclose(
        moved.pose[-1], np.append([np.cos(np.radians(10)), 1 + np.sin(np.radians(10))], [100.0] * gripper)
    )
    space = JointPosition(1.0, 1.0, False, False, *arm)
    assert len(space.parts) == len(names) and set(space.observe(now)) == set(space.fields[: 1 + gripper])
    with pytest.raises(PersistWorldError, match="the policy commands 100 at joint 1, whose limits are -90 and 90"):
        space.follow(rows * 10, now, 2)
    with pytest.raises(PersistWorldError, match="needs inverse kinematics"):
        Pose(1.0, 1.0, False, False, *arm)
