"""Kinematics, keys and joint-velocity adapters against the reference's numbers and DROID's recordings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import GoldenFiles
from golden_table import close
from safetensors.torch import load_file, save_file

from persistworld_cli.config.settings import DriveSettings, RobotSettings, Settings
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.robot.adapter import GainAdapter, load_adapter
from persistworld_cli.robot.keyboard import KeyMap, parse_keys
from persistworld_cli.robot.kinematics import PANDA, forward, jacobian, joint_frames, pose

REST = np.array([0.0, 0.05, 0.3, -2.25, 0.0, 2.5, -np.pi / 2])


def test_forward_kinematics_equal_the_reference(golden: GoldenFiles) -> None:
    data = np.load(golden / "fk_random.npz")
    close("D forward kinematics, matrices", forward(data["joints"]), data["T"], 1e-10)
    expected = np.concatenate([data["xyz"], data["euler_xyz"]], axis=1)
    close("D forward kinematics, poses", pose(data["joints"]), expected, 1e-10)


def test_forward_kinematics_equal_droids_recorded_poses(shared_data: Path) -> None:
    files = sorted((shared_data / "droid_subset" / "annotation").rglob("*.json"))
    assert files
    for file in files:
        episode = json.loads(file.read_text())
        ours = pose(episode["observation.state.joint_position"])
        recorded = np.asarray(episode["observation.state.cartesian_position"])
        turn = np.angle(np.exp(1j * (ours[:, 3:] - recorded[:, 3:])))  # recorded roll jumps between +pi and -pi
        assert np.abs(ours[:, :3] - recorded[:, :3]).max() < 1e-7, file.name
        assert np.abs(turn).max() < 1e-6, file.name


def test_kinematics_keep_batch_axes_and_refuse_wrong_widths() -> None:
    batch = np.tile(REST, (2, 3, 1))
    assert forward(batch).shape == (2, 3, 4, 4)
    assert pose(batch).shape == (2, 3, 6)
    assert pose(np.empty((0, 7))).shape == (0, 6)
    assert joint_frames(REST).shape == (8, 4, 4)
    assert np.array_equal(forward(batch)[1, 2], forward(REST))
    with pytest.raises(ValueError, match=r"\(\.\.\., 7\)"):
        forward(np.zeros(8))


def test_jacobian_is_the_derivative_of_the_tool_point() -> None:
    def point(joints: np.ndarray) -> np.ndarray:
        frame = forward(joints)
        return frame[:3, 3] + 0.15 * frame[:3, 2]

    step = 1e-6
    numeric = np.stack([(point(REST + step * e) - point(REST - step * e)) / (2 * step) for e in np.eye(7)], axis=1)
    ours = jacobian(REST, tool_z=0.15)
    assert ours.shape == (6, PANDA.num_joints)
    assert np.abs(ours[:3] - numeric).max() < 1e-8
    spin = (forward(REST + step * np.eye(7)[6])[:3, :3] @ forward(REST)[:3, :3].T - np.eye(3)) / step
    assert np.abs(ours[3:, 6] - [spin[2, 1], spin[0, 2], spin[1, 0]]).max() < 1e-5


def test_keys_equal_the_reference(golden: GoldenFiles) -> None:
    data = np.load(golden / "keyboard.npz")
    keymap = KeyMap(Settings())
    for index, key in enumerate(data["keys"]):
        for number, start in enumerate(data["poses"]):
            close("E keyboard", keymap.chunk(start, str(key)), data["chunks"][index, number], 1e-10)


def test_keymap_follows_its_settings() -> None:
    drive = DriveSettings(step=dict.fromkeys("xyz", 0.02), keys={**DriveSettings().keys, "c": "gripper=0.5 close"})
    keymap = KeyMap(Settings(drive=drive, robot=RobotSettings(limits={"x": (0.3, 0.55)})))
    start = np.array([0.54, 0.0, 0.2, 3.0, 0.0, 0.0, 0.1])
    assert np.allclose(keymap.chunk(start, "l", rows=3)[:, 1], [0.0, -0.01, -0.02])
    assert np.allclose(keymap.chunk(start, "f")[-1, 0], 0.55)
    assert np.allclose(keymap.chunk(start, "c", rows=2)[:, 6], [0.1, 0.5])
    assert keymap.chunk(start, "u", rows=1).shape == (1, 7)
    own = {"w": "+x", "g": "gripper=0.7 close"}
    keymap = KeyMap(Settings(drive=DriveSettings(keys=own)))
    assert np.allclose(keymap.chunk(start, "w")[-1, 0], 0.62) and keymap.chunk(start, "g")[-1, 6] == 0.7
    assert keymap.meaning("w") == "+x" and np.allclose(keymap.chunk(start, "l"), start)
    with pytest.raises(UsageError, match=r"unknown key 'l'.*\n.*\n.*w \+x, g close \(gripper=0.7\)"):
        parse_keys("wl", own)


def test_unknown_keys_are_refused_with_the_list_of_keys() -> None:
    assert parse_keys("lllrrr") == list("lllrrr")
    assert parse_keys("l, l u") == list("llu")
    assert parse_keys("l*3 u,r*12") == list("lllu") + ["r"] * 12
    for text in ("l**2", "*2", "l*0", "l*1000", " *2"):
        with pytest.raises(UsageError, match="unknown key"):
            parse_keys(text)
    with pytest.raises(UsageError, match="unknown key 'q'") as refused:
        parse_keys("llq")
    assert all(f"{key} " in str(refused.value) for key in "lrfbudoc")
    with pytest.raises(UsageError, match="no keys"):
        parse_keys("  ")


def test_mlp_adapter_equals_the_reference(golden: GoldenFiles, tmp_path: Path) -> None:
    data = np.load(golden / "action_adapter_golden.npz")
    weights = golden / "action_adapter_weights.safetensors"
    # Ctrl-World's file is a plain state dict without our prefix.
    torch.save({k.removeprefix("weights."): v for k, v in load_file(weights).items()}, tmp_path / "model2_15_9.pth")
    for path in (weights, tmp_path / "model2_15_9.pth"):
        adapter = load_adapter(str(path))
        for joints, velocities, future in zip(data["joint"], data["joint_vel"], data["joint_future"], strict=True):
            close("D joint-velocity adapter", adapter(velocities, joints), future, 1e-5)
    assert adapter(velocities[:10], joints).shape == (10, 7)
    longer = adapter(np.concatenate([velocities, velocities[:3]]), joints)  # the rest begins where 15 rows end
    assert np.allclose(longer, np.concatenate([future, adapter(velocities[:3], longer[14])]), atol=1e-5)


def test_gain_adapter_sums_what_each_row_moves(tmp_path: Path) -> None:
    velocities = np.ones((15, 7))
    assert np.allclose(load_adapter("gain")(velocities, REST)[-1] - REST, 15 * 0.054)
    meta = tmp_path / "adapter.json"
    gain = np.linspace(0.04, 0.06, 7)
    meta.write_text(json.dumps({"gain": gain.tolist(), "episodes": 3}))
    assert np.allclose(load_adapter("meta", meta=meta)(velocities, REST)[0] - REST, gain)
    assert np.allclose(GainAdapter(0.2)(velocities[:2], REST)[:, 0], [0.2, 0.4])


def test_bad_adapters_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(PersistWorldError, match="build-meta"):
        load_adapter("meta", meta=tmp_path / "adapter.json")
    (tmp_path / "adapter.json").write_text('{"gain": [1, 2]}')
    with pytest.raises(PersistWorldError, match="not a joint-velocity adapter"):
        load_adapter("meta", meta=tmp_path / "adapter.json")
    with pytest.raises(PersistWorldError, match="no joint-velocity adapter"):
        load_adapter(str(tmp_path / "none.pth"))
    save_file({"net.0.weight": torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(PersistWorldError, match=r"'net\.0\.weight' has shape \(4, 4\)"):
        load_adapter(str(tmp_path / "other.safetensors"))
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    with pytest.raises(PersistWorldError, match="cannot read"):
        load_adapter(str(tmp_path / "broken.pth"))
