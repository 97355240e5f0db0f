"""The session that keys, terminal and page share, and what waits while it computes."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from drive_world import arm_world, session
from eval_world import settings

from persistworld_cli.checkpoints.loading import load_model
from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.requests import DriveRequest
from persistworld_cli.data.clips.store import open_store
from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.interact import drive
from persistworld_cli.interact.outputs import record, write_lerobot_zip
from persistworld_cli.interact.web import Inbox
from persistworld_cli.robot.keyboard import KeyMap
from persistworld_cli.rollout.interactive import InteractiveRollout, make_start
from persistworld_cli.rollout.recording import Item


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return arm_world(tmp_path_factory.mktemp("session"))


def test_keys_give_what_the_world_gives_along_their_poses(root: Path) -> None:
    own, here = settings(root), session(root, seed=4)
    store = open_store(own)
    start = make_start(store, Item("7", 0, 4), "val")
    world = InteractiveRollout(load_model(own), store, [start], own)
    frames = [world.images[0][None]]
    for key in "lcu":
        here.press(key)
        frames.append(world.step(np.stack([KeyMap(own).chunk(world.poses[0], key)])).images[0])
    assert np.array_equal(here.frames(), np.concatenate(frames))
    assert np.array_equal(here.pose, world.poses[0]) and [s.depth for s in here.path] == [1, 2, 3]


def test_rewind_branch_and_undo(root: Path) -> None:
    here = session(root)
    first, second = here.press("l"), here.press("u")
    assert here.rewind(1) is first and here.rewind(0).depth == 0
    assert here.press("l") is first and here.press("u") is second  # what is known is not computed again
    other = here.branch()
    assert other.branch == 1 and other.parent == first.number and np.array_equal(other.poses, second.poses)
    assert not np.array_equal(other.images, second.images)
    third = here.branch()
    assert third.branch == 2 and not np.array_equal(third.images, other.images)
    assert here.undo() is first and here.press("u") is second
    here.rewind(other.number)
    onward = here.press("r")
    assert [s.key for s in here.path] == ["l", "u", "r"] and record(here)["branches"] == [0, 1, 0]

    again = session(root)  # in another order, nothing remembered: the same frames, bit for bit
    again.press("l")
    again.press("u")
    assert np.array_equal(again.branch().images, other.images)
    assert np.array_equal(again.press("r").images, onward.images)
    again.rewind(1)
    assert np.array_equal(again.press("u").images, second.images)
    again.rewind(0)
    assert not np.array_equal(again.press("r").images, onward.images)


def test_what_cannot_be_done_leaves_the_session_as_it_was(root: Path) -> None:
    here = session(root)
    for act, text in (
        (here.undo, "no step to undo"),
        (here.branch, "no step to branch"),
        (lambda: here.rewind(1), "no step 1"),
        (lambda: here.press("w"), "unknown key 'w'"),
    ):
        with pytest.raises(PersistWorldError, match=text):
            act()
    assert here.head.number == 0 and len(here.steps) == 1 and here.frames().shape[0] == 1


def test_an_interrupted_step_leaves_the_session_as_it_was(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, fresh = session(root), session(root)
    fresh.press("l")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(InteractiveRollout, "_draw", interrupted)  # the engine has advanced by then
        with pytest.raises(KeyboardInterrupt):
            here.press("l")
    assert len(here.steps) == 1
    assert np.array_equal(here.press("l").images, fresh.head.images)


def test_a_drive_of_keys_is_a_session_s(root: Path, tmp_path: Path) -> None:
    result = drive.run(settings(root), DriveRequest(keys="l*2 u", output=tmp_path))
    here = session(root)
    for key in "llu":
        here.press(key)
    told = json.loads((tmp_path / "drive.json").read_text())
    ours = record(here)
    assert result["keys"] == "llu" and told["branches"] == [0, 0, 0]
    assert told["poses"] == ours["poses"] and told["start_pose"] == ours["start_pose"]


def test_a_drive_is_a_lerobot_episode_too(root: Path, tmp_path: Path) -> None:
    here = session(root)
    for key in "lc":
        here.press(key)
    write_lerobot_zip(here, tmp_path / "drive-lerobot.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["drive-lerobot.zip"]
    zipfile.ZipFile(tmp_path / "drive-lerobot.zip").extractall(tmp_path)
    raw = RawDataset(tmp_path / "drive-lerobot")
    fields = settings(root).world.state_fields
    columns = raw.read(0, [*fields, "action"])
    poses = np.concatenate([columns[fields[0]], columns[fields[1]].reshape(-1, 1)], axis=1)
    assert poses.shape == (9, 7) and np.allclose(poses[-1], here.pose, atol=1e-6)
    assert np.allclose(columns["action"][:-1], poses[1:]) and raw.instruction(0) == here.start.text
    for view, camera in enumerate(settings(root).world.cameras):
        images = np.stack(list(raw.images(0, camera, range(9))))
        errors = np.abs(images.astype(int)[:, None] - here.frames()).mean(axis=(0, 2, 3, 4))
        assert errors.argmin() == view and errors[view] < 15  # noise of an untrained model compresses badly


def test_one_move_waits_and_questions_come_first() -> None:
    inbox = Inbox()
    for key in "lru":
        assert inbox.put({"do": "key", "key": key})
    assert inbox.put({"do": "images", "step": 0})
    assert [inbox.take(0), inbox.take(0), inbox.take(0)] == [
        {"do": "images", "step": 0},
        {"do": "key", "key": "u"},  # the last one pressed
        None,
    ]
    assert all(inbox.put({"do": "save"}) for _ in range(64)) and not inbox.put({"do": "save"})


def test_invalid_key_maps_are_refused() -> None:
    assert load_settings(None, ["drive.keys.w=+x"], {}, env={}).drive.keys["w"] == "+x"
    for item, text in (
        ("drive.keys.w=+q", r"'\+q' of key 'w' is not an action"),
        ("drive.keys.z=+x", "'z' is reserved for undo"),
        ("drive.keys.up=+z", "'up' is not one letter"),
        ("drive.keys.1=+z", "'1' is not one letter"),
        ("drive.display=ascii", "drive.display"),
    ):
        with pytest.raises(UsageError, match=text):
            load_settings(None, [item], {}, env={})
