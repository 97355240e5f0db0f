"""Driving by keys and policies in the loop, whole: a tiny untrained model of the real classes in a dataset on disk."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drive_world import arm_world, drive_settings
from eval_world import HEIGHT, VIEWS, WIDTH, settings
from golden_files import GoldenFiles
from golden_model import golden_model
from golden_table import close
from safetensors.torch import load_file
from websockets.sync.server import ServerConnection
from websockets.sync.server import serve as listen

from persistworld_cli.checkpoints.loading import load_model
from persistworld_cli.config.requests import DriveRequest, PolicyRolloutRequest
from persistworld_cli.config.settings import (
    DriveSettings,
    PolicySettings,
    SamplingSettings,
    Settings,
)
from persistworld_cli.data.clips.store import ActionStat, open_store
from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.data.raw.video import count_frames, read_frames
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.interact import drive
from persistworld_cli.policies import run as policy_rollout
from persistworld_cli.policies.action_spaces import JointVelocity, at_joints
from persistworld_cli.policies.controller import PolicyController
from persistworld_cli.policies.embedded import make_policy
from persistworld_cli.policies.msgpack_numpy import pack, unpack
from persistworld_cli.policies.observation import PolicyView
from persistworld_cli.robot.adapter import load_adapter
from persistworld_cli.robot.keyboard import KeyMap
from persistworld_cli.rollout.engine import RolloutEngine, first_latent
from persistworld_cli.rollout.interactive import InteractiveRollout, make_start
from persistworld_cli.rollout.recording import Item


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return arm_world(tmp_path_factory.mktemp("drive"))


def world(root: Path, **policy: Any) -> Settings:
    return replace(settings(root), policy=PolicySettings(**{"wait_s": 5.0, "steps": 2, **policy}))


# -- drive ------------------------------------------------------------------------------------------------------------


def test_drive_writes_what_was_seen(root: Path, tmp_path: Path) -> None:
    result = drive.run(drive_settings(root, episode="8", start=2, seed=5), DriveRequest(keys="lcu", output=tmp_path))
    assert count_frames(Path(result["video"])) == result["frames"] == 1 + 3 * 4
    image = read_frames(Path(result["video"]), [0])[0]
    assert image.shape[1] >= 3 * 300  # enlarged: a view of 48 pixels would show nothing
    assert Path(result["sheet"]).stat().st_size > 1000
    record = json.loads(Path(result["json"]).read_text())
    assert (record["keys"], record["episode"], record["start"], record["seed"]) == ("lcu", "8", 2, 5)
    poses = np.asarray(record["poses"])
    assert poses.shape == (3, 5, 7)
    states = json.loads((root / "world" / "annotation" / "val" / "8.json").read_text())["states"]
    assert np.allclose(poses[0], KeyMap(Settings()).chunk(np.asarray(states[2]), "l"))
    assert np.allclose(poses[1, 0], poses[0, -1])  # a key begins where the last one ended
    assert poses[1, -1, 6] == 0.7
    assert len(record["seconds"]) == 3
    assert "poses" not in result


def test_drive_defaults_to_the_settings_and_the_first_episode(root: Path, tmp_path: Path) -> None:
    own = replace(settings(root), drive=DriveSettings(start=1, seed=9))
    result = drive.run(own, DriveRequest(keys="o", output=tmp_path))
    assert (result["episode"], result["start"], result["seed"]) == ("7", 1, 9)


def test_mistakes_are_told_before_any_weights_are_read(root: Path, tmp_path: Path) -> None:
    blind = replace(settings(root), model=replace(settings(root).model, ckpt=str(tmp_path / "none.safetensors")))
    request = DriveRequest(keys="l", output=tmp_path)
    with pytest.raises(UsageError, match="unknown key 'w'"):
        drive.run(blind, replace(request, keys="lw"))
    with pytest.raises(PersistWorldError, match="no episode '99'"):
        drive.run(replace(blind, drive=DriveSettings(episode="99")), request)
    with pytest.raises(PersistWorldError, match="frame 30"):
        drive.run(replace(blind, drive=DriveSettings(start=30)), request)
    with pytest.raises(UsageError, match="no dataset"):
        drive.run(replace(blind, world=replace(blind.world, dataset="")), request)
    with pytest.raises(PersistWorldError, match=r"none\.safetensors"):
        drive.run(blind, request)


def test_rollouts_do_not_depend_on_their_batch_and_follow_their_seed(root: Path) -> None:
    own = settings(root)
    store, model = open_store(own), load_model(own)
    starts = [make_start(store, Item(episode, 1, seed), "val") for episode, seed in (("7", 0), ("8", 0), ("7", 1))]
    steps = np.stack([KeyMap(Settings()).chunk(start.pose, "f") for start in starts])
    batch = InteractiveRollout(model, store, starts, own)
    assert batch.images.shape == (3, VIEWS, HEIGHT, WIDTH, 3)
    together = batch.step(steps)
    assert together.images.shape == (3, 4, VIEWS, HEIGHT, WIDTH, 3)
    assert np.array_equal(batch.poses, steps[:, -1])
    alone = InteractiveRollout(model, store, starts[1:2], own).step(steps[1:2])
    assert np.abs(alone.images[0].astype(int) - together.images[1]).max() <= 1
    assert not np.array_equal(together.images[0], together.images[2])  # another seed


def test_a_dataset_without_latents_is_encoded_from_its_videos(root: Path, tmp_path: Path) -> None:
    bare = tmp_path / "world"
    bare.mkdir()
    for name in ("annotation", "videos", "meta"):
        (bare / name).symlink_to(root / "world" / name)
    own = settings(root)
    model = load_model(own)
    start = make_start(open_store(own), Item("7", 3, 0), "train")  # found in val
    store = open_store(replace(own, world=replace(own.world, dataset=str(bare))))
    encoded = first_latent(model, store, start, encode_missing=True)
    assert torch.equal(encoded[None], model.encode_frames(torch.from_numpy(store.frames("val", "7", [3]))))
    assert encoded.shape == first_latent(model, open_store(own), start).shape
    with pytest.raises(PersistWorldError, match="latents of camera 0"):  # measuring takes nothing but stored latents
        first_latent(model, store, start)


# -- policies ---------------------------------------------------------------------------------------------------------


def test_a_served_policy_acts_in_the_world(root: Path, tmp_path: Path) -> None:
    result = policy_rollout.run(world(root, seed=3), PolicyRolloutRequest(rollouts=9, output=tmp_path))
    assert result["complete"]
    assert [entry["episode"] for entry in result["rollouts"]] == ["7", "8"]
    assert json.loads((tmp_path / "rollouts.json").read_text())["policy"] == "scripted"
    entry = result["rollouts"][1]
    record = json.loads(Path(entry["json"]).read_text())
    for key in ("success", "start_idx", "end_idx", "instructions", "joint_pos", "joint_vel", "state_fk"):
        assert key in record
    assert record["success"] is None
    assert record["instructions"] == "push the red block"
    assert count_frames(Path(entry["video"])) == 1 + 2 * 4 == record["end_idx"] + 1
    assert Path(entry["sheet"]).is_file()
    skip = 3  # the bundled task's
    for key in ("joint_pos", "joint_vel", "state_fk"):
        assert np.shape(record[key]) == (2 * 4 * skip, 7)
    start = json.loads((root / "world" / "annotation" / "val" / "8.json").read_text())
    assert np.allclose(record["joint_pos"][0], start["joints"][0][:7])
    assert np.allclose(record["state_fk"][0], start["states"][0])
    moved = np.asarray(record["joint_pos"])
    assert np.allclose(moved[1:12] - moved[:11], 0.054 * np.asarray(record["joint_vel"])[:11])
    assert np.allclose(np.asarray(record["poses"])[:, 0], np.asarray(record["state_fk"])[::12])


def test_the_action_space_of_a_policy_is_recorded(root: Path, tmp_path: Path) -> None:
    request = PolicyRolloutRequest(policy="hold", output=tmp_path)
    result = policy_rollout.run(world(root, steps=1, actions="pose"), request)
    record = json.loads(Path(result["rollouts"][0]["json"]).read_text())
    assert result["actions"] == record["actions"] == "pose"
    assert np.allclose(record["answers"], record["state_fk"], atol=1e-5) and record["joint_vel"] == []
    columns = RawDataset(tmp_path / "lerobot").read(0, ["action.joint_position", "action.cartesian_position"])
    assert np.allclose(columns["action.cartesian_position"], record["answers"][0][:6], atol=1e-5)
    with pytest.raises(PersistWorldError, match="joint_velocity"):
        RawDataset(tmp_path / "lerobot").read(0, ["action.joint_velocity"])


def test_a_policy_of_this_process_sees_the_predicted_images(root: Path, tmp_path: Path) -> None:
    Watcher.seen.clear()
    request = PolicyRolloutRequest(policy=f"{__name__}:Watcher", episodes=("7",), instruction="look", output=tmp_path)
    policy_rollout.run(
        world(root, images={"observation/exterior_image_1_left": "exterior_1_left"}, image_size=64), request
    )
    assert [obs["prompt"] for obs in Watcher.seen] == ["look", "look"]
    first, second = (obs["observation/exterior_image_1_left"] for obs in Watcher.seen)
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert first[:10].max() == 0  # padded above and below
    assert not np.array_equal(first, second)
    moved = Watcher.seen[1]["observation/joint_position"] - Watcher.seen[0]["observation/joint_position"]
    assert np.allclose(moved, 12 * 0.054 * 0.1)
    assert np.allclose(Watcher.seen[1]["observation/gripper_position"], 0.5)


class Watcher:
    """Moves every joint a little, and keeps what it was shown."""

    seen: list[dict[str, Any]] = []  # noqa: RUF012

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(obs)
        return {"actions": np.tile([0.1] * 7 + [0.5], (15, 1))}

    def reset(self) -> None:
        self.seen.clear()


def test_a_plan_takes_task_request_and_settings_into_account(root: Path) -> None:
    own = world(root)
    store = open_store(own)
    plan = policy_rollout.make_plan(own, PolicyRolloutRequest(policy="hold"), store)
    assert [s.item.episode for s in plan.starts] == ["7"]
    request = PolicyRolloutRequest(policy="hold", rollouts=9, start=2)
    plan = policy_rollout.make_plan(world(root, seed=3), request, store)
    found = [(s.item.episode, s.item.start, s.item.seed) for s in plan.starts]
    assert found == [("7", 2, 3), ("8", 2, 3)]
    assert (plan.view.skip, plan.view.space.gripper_cap, plan.steps) == (3, 1.0, 2)
    plan = policy_rollout.make_plan(world(root, skip=2, gripper_cap=0.6, steps=0), request, store)
    assert (plan.view.skip, plan.view.space.gripper_cap, plan.steps) == (2, 0.6, 8)


def failing_server(respond: Callable[[int, ServerConnection], None]) -> Any:
    """A server whose policy holds still; ``respond`` may interfere with the n-th request of all connections."""
    count = 0
    lock = threading.Lock()

    def handle(connection: ServerConnection) -> None:
        nonlocal count
        connection.send(pack({"policy": "failing"}))
        policy = make_policy("hold")
        for message in connection:
            with lock:
                count += 1
                number = count
            respond(number, connection)
            assert isinstance(message, bytes)
            connection.send(pack(policy.infer(unpack(message))))

    server = listen(handle, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.mark.parametrize(
    ("how", "text"),
    [
        (lambda connection: connection.close(), "closed the connection"),
        (lambda connection: connection.send("Traceback: out of memory"), "(?s)failed.*out of memory"),
        (lambda connection: connection.send(pack({"actions": np.full((15, 8), np.nan)})), r"nan at \[0, 0\]"),
    ],
)
def test_a_policy_that_dies_in_mid_rollout_leaves_what_was_rolled_out(
    root: Path, tmp_path: Path, how: Callable[[ServerConnection], None], text: str
) -> None:
    # Two rollouts, asked in turn: the fourth request is the second rollout's second step.
    server = failing_server(lambda number, connection: how(connection) if number == 4 else None)
    uri = f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
    with pytest.raises(PersistWorldError, match=text) as failed:
        policy_rollout.run(world(root, steps=3), PolicyRolloutRequest(policy=uri, rollouts=9, output=tmp_path))
    server.shutdown()
    assert not isinstance(failed.value, UsageError)  # exit code 1
    assert "saved" in str(failed.value)
    summary = json.loads((tmp_path / "rollouts.json").read_text())
    assert summary["complete"] is False
    for entry in summary["rollouts"]:
        record = json.loads(Path(entry["json"]).read_text())
        assert (record["complete"], record["steps"], record["steps_planned"]) == (False, 1, 3)
        assert record["error"]
        assert np.shape(record["joint_pos"]) == (12, 7)
        assert count_frames(Path(entry["video"])) == 5


def test_a_policy_that_fails_at_once_leaves_the_start(root: Path, tmp_path: Path) -> None:
    server = failing_server(lambda number, connection: connection.close())
    uri = f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
    with pytest.raises(PersistWorldError, match="closed"):
        policy_rollout.run(world(root), PolicyRolloutRequest(policy=uri, output=tmp_path))
    server.shutdown()
    record = json.loads((tmp_path / "episodes_7_0_0.json").read_text())
    assert (record["steps"], record["end_idx"], record["joint_pos"]) == (0, 0, [])


def test_what_cannot_be_rolled_out_is_told_before_any_weights_are_read(root: Path, tmp_path: Path) -> None:
    request = PolicyRolloutRequest(policy="hold", output=tmp_path)

    def blind(**policy: Any) -> Settings:
        own = world(root, **policy)
        return replace(own, model=replace(own.model, ckpt=str(tmp_path / "none.safetensors")))

    for own, more, text in (
        (blind(task="stack"), {}, r"no episode of task 'stack' is in this dataset \(0012, 0013\)"),
        (blind(task="stak"), {}, "unknown task 'stak'"),
        (blind(actions="pose"), {"policy": "scripted"}, "policy 'scripted' does not answer in pose"),
        (blind(images={"image": "front"}), {}, "no camera 'front', which 'image' shows"),
        (blind(joint_velocity_adapter="meta"), {}, "no fitted joint-velocity adapter"),
        (blind(), {"policy": "hodl"}, "unknown policy 'hodl'"),
        (blind(), {"episodes": ("12",)}, "no episode '12'"),
        (blind(port=9, wait_s=0.1), {"policy": "server"}, "no policy server answered"),
    ):
        with pytest.raises(PersistWorldError, match=text):
            policy_rollout.run(own, replace(request, **more))
    with pytest.raises(PersistWorldError, match=r"none\.safetensors"):
        policy_rollout.run(blind(), request)


def test_a_recording_without_joints_is_refused(root: Path, tmp_path: Path) -> None:
    bare = tmp_path / "world"
    (bare / "annotation" / "val").mkdir(parents=True)
    note = json.loads((root / "world" / "annotation" / "val" / "7.json").read_text())
    del note["joints"]
    (bare / "annotation" / "val" / "7.json").write_text(json.dumps(note))
    own = replace(world(root), world=replace(world(root).world, dataset=str(bare)))
    with pytest.raises(PersistWorldError, match="no joint angles"):
        policy_rollout.run(own, PolicyRolloutRequest(policy="hold", output=tmp_path))


# -- against the reference's own loop ---------------------------------------------------------------------------------


def reference_loop(golden: GoldenFiles, file: str, tag: str, policy: bool) -> tuple[RolloutEngine, Any, Any]:
    """The engine, the state at the start, and the reference's tensors of one of its rollouts."""
    tiny = golden_model(encoder=golden / "tiny_ctrl_world.safetensors")
    data = load_file(golden / file)
    meta = json.loads((golden / "tiny_rollout_meta.json").read_text())["pi" if policy else "keyboard"]
    meta = meta[tag] if policy else meta
    stat = ActionStat(np.asarray(meta["state_p01"]), np.asarray(meta["state_p99"]))
    sampling = SamplingSettings(steps=meta["steps"], guidance=meta["guidance"])
    engine = RolloutEngine(tiny, sampling, stat, sampling.history_policy if policy else None)
    tiny._text_cache[meta["text"]] = data["text_embeds"][0]  # the reference's tokenizer is not at hand
    own = {key.removeprefix(tag + "."): value for key, value in data.items() if key.startswith(tag)}
    state = engine.start(own["first_latent"][None], own["pose_raw"][:1, 0].numpy(), [meta["text"]])
    return engine, state, own


@pytest.mark.parametrize(("tag", "skip"), [("skip2", 2), ("skip3", 3)])
def test_policy_in_the_loop_equals_the_reference(golden: GoldenFiles, tag: str, skip: int) -> None:
    engine, state, data = reference_loop(golden, "tiny_rollout_pi.safetensors", tag, policy=True)
    chunks = iter(data["chunk"].numpy())

    class Recorded:
        def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
            return {"actions": next(chunks)}

        def reset(self) -> None: ...

        def close(self) -> None: ...

    adapter = load_adapter(str(golden / "action_adapter_weights.safetensors"))
    view = PolicyView(space=JointVelocity(adapter, 0.75), skip=skip)
    controller = PolicyController([Recorded()], view, [at_joints(data["joint_in"][0].numpy())], ["go"])
    images = np.zeros((1, 3, 8, 8, 3), np.uint8)
    for i, noise in enumerate(data["noise"]):
        poses = controller.poses(images)
        close(f"I policy {tag}, poses", poses[0], data["poses_taken"][i], 1e-5)
        predicted = engine.step(state, poses, noise[None])
        close(f"I policy {tag}, {len(data['noise'])} interactions", predicted[0], data["pred"][i], 5e-5)
    close(f"I policy {tag}, poses", state.memory.current[1][0], data["pose_buffer_end"][-1], 1e-5)


def test_keys_in_the_loop_equal_the_reference(golden: GoldenFiles) -> None:
    engine, state, data = reference_loop(golden, "tiny_rollout_keyboard.safetensors", "g2", policy=False)
    for i, noise in enumerate(data["noise"]):
        poses = KeyMap(Settings()).chunk(state.memory.current[1][0], "lfduco"[i])[None]
        close("I keyboard, poses", poses[0], data["pose_raw"][i, 6:], 1e-10)
        predicted = engine.step(state, poses, noise[None])
        close(f"I keyboard, {len(data['noise'])} interactions", predicted[0], data["pred"][i], 5e-5)
