"""openpi's protocol (client, server, failures), the embedded policies, and what a policy's chunk means for the arm."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from golden_table import close
from safetensors.numpy import load_file
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve
from websockets.typing import Origin

from persistworld_cli.config.settings import PolicySettings
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.robot.adapter import GainAdapter, load_adapter
from persistworld_cli.robot.keyboard import KeyMap
from persistworld_cli.robot.kinematics import forward
from persistworld_cli.rollout.controllers import (
    KeyboardController,
    PolicyController,
    PolicyView,
    RecordedController,
    interpret_chunk,
)
from persistworld_cli.rollout.observation import build_observation, check_actions, find_layout, resize_with_pad
from persistworld_cli.rollout.policies import POLICIES, make_policy
from persistworld_cli.rollout.policy_client import PolicyClient, policy_uri
from persistworld_cli.rollout.policy_server import API_KEY_VARIABLE, serve_embedded
from persistworld_cli.rollout.policy_source import check_policy, open_policies
from persistworld_cli.rollout.tasks import load_task, task_names
from persistworld_cli.rollout.wire import pack, unpack

REST = np.array([0.0, 0.05, 0.3, -2.25, 0.0, 2.5, -np.pi / 2, 0.0])
PICTURE = np.zeros((6, 8, 3), np.uint8)
PI05 = find_layout("pi05")


def observation(joints: np.ndarray = REST, prompt: str = "lift the cube") -> dict[str, Any]:
    return build_observation(PICTURE, PICTURE, joints, prompt, 16)


@contextlib.contextmanager
def raw_server(handle: Callable[[ServerConnection], None], **options: Any) -> Iterator[str]:
    """A server written from the protocol's description, without the project's own."""
    with serve(handle, "127.0.0.1", 0, **options) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()


# -- the wire ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", ">f8", "bool", "<U5"])
def test_arrays_come_back_as_they_were(dtype: str) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)[:, ::2].transpose(2, 0, 1)  # not contiguous
    back = unpack(pack({"a": array, "n": [1, None, {"x": "y"}]}))
    assert back["n"] == [1, None, {"x": "y"}]
    assert back["a"].dtype == array.dtype
    assert np.array_equal(back["a"], array)
    back["a"][...] = array  # writable


def test_scalars_and_empty_arrays_come_back() -> None:
    back = unpack(pack({"f": np.float32(1.5), "b": np.bool_(True), "e": np.zeros((0, 8)), "s": np.array(3)}))
    assert back["f"] == 1.5
    assert isinstance(back["f"], np.float32)
    assert back["b"] is np.True_
    assert back["e"].shape == (0, 8)
    assert back["s"].shape == ()


def test_encoding_is_the_described_one() -> None:
    plain = msgpack.unpackb(pack({"a": np.array([[1, 2]], "<i4"), "g": np.float32(0.5)}))
    assert plain["a"] == {b"__ndarray__": True, b"data": b"\1\0\0\0\2\0\0\0", b"dtype": "<i4", b"shape": [1, 2]}
    assert plain["g"] == {b"__npgeneric__": True, b"data": 0.5, b"dtype": "<f4"}
    raw = {b"__npgeneric__": True, b"data": np.float32(2.5).tobytes(), b"dtype": b"<f4"}
    assert unpack(msgpack.packb(raw)) == 2.5  # writers that send a scalar's bytes


def test_what_cannot_travel_is_refused() -> None:
    for value in (np.array([object()]), np.array([1j]), object()):
        with pytest.raises(PersistWorldError, match="cannot encode"):
            pack({"x": value})
    array = {b"__ndarray__": True, b"data": b"12345678", b"shape": [1]}
    for entry, text in (
        ({**array, b"dtype": "|O"}, "refused"),
        ({**array, b"dtype": "<f4"}, "came with 8 bytes"),
        ({**array, b"dtype": "<f8", b"shape": [-1]}, "came with 8 bytes"),
        ({**array, b"dtype": "nonsense"}, "not a policy message"),
    ):
        with pytest.raises(PersistWorldError, match=text):
            unpack(msgpack.packb({"x": entry}))
    for data in (b"", b"\xc1", pack({"a": 1})[:-1]):
        with pytest.raises(PersistWorldError, match="not a policy message"):
            unpack(data)


# -- observation and answer -------------------------------------------------------------------------------------------


def test_pictures_keep_their_aspect_and_are_padded() -> None:
    out = resize_with_pad(np.full((192, 320, 3), 200, np.uint8), 224)
    assert out.shape == (224, 224, 3)
    assert out.dtype == np.uint8
    assert (out[45:179] == 200).all()
    assert out[:45].max() == out[179:].max() == 0
    assert resize_with_pad(np.full((8, 4, 3), 9, np.uint8), 8)[:, 2:6].min() == 9
    droid = resize_with_pad(np.full((192, 320, 3), 200, np.uint8), 224, (180, 320))  # 180x320 is 126x224
    assert (droid[49:175] == 200).all() and droid[:49].max() == droid[175:].max() == 0


def test_observation_has_the_described_fields() -> None:
    obs = build_observation(np.zeros((192, 320, 3), np.uint8), np.ones((192, 320, 3), np.uint8), REST, "go")
    shapes = {key: np.shape(value) for key, value in obs.items()}
    assert shapes == {
        "observation/exterior_image_1_left": (224, 224, 3),
        "observation/wrist_image_left": (224, 224, 3),
        "observation/joint_position": (7,),
        "observation/gripper_position": (1,),
        "prompt": (),
    }


def test_wrong_answers_name_the_field() -> None:
    good = np.zeros((15, 8), np.float32)
    assert check_actions({"actions": good}, PI05, "p").dtype == np.float64
    bad = good.copy()
    bad[3, 2] = np.nan
    for answer, text in (
        ([1], "not a map"),
        ({"action": good}, "no field 'actions' .it has: action."),
        ({"actions": [["a"] * 8] * 15}, "not numbers"),
        ({"actions": good[:, :7]}, r"shape \(15, 7\)"),
        ({"actions": good[:10]}, "policy.layout=pi0"),
        ({"actions": bad}, r"nan at \[3, 2\] .velocity of joint 3 in row 3."),
    ):
        with pytest.raises(PersistWorldError, match=text):
            check_actions(answer, PI05, "p")
    with pytest.raises(UsageError, match="pi07"):
        find_layout("pi07")


# -- policies ---------------------------------------------------------------------------------------------------------


def act(policy: Any, joints: np.ndarray, rows: int = 12) -> np.ndarray:
    """The joints after the first rows of a policy's answer, as the gain adapter moves them."""
    actions = check_actions(policy.infer(observation(joints)), PI05, "p")
    arm = GainAdapter()(actions[:, :7], joints[:7])[rows - 1]
    return np.append(arm, np.clip(actions[rows - 1, 7], 0, 1))


def pads(joints: np.ndarray) -> np.ndarray:
    frame = forward(joints[:7])
    return frame[:3, 3] + 0.15 * frame[:3, 2]


def test_scripted_policy_reaches_closes_and_lifts() -> None:
    policy = make_policy("scripted", PI05)
    path = [REST]
    for _ in range(6):
        path.append(act(policy, path[-1]))
    lowest = min(pads(joints)[2] for joints in path)
    assert lowest < 0.1 < pads(path[0])[2]
    assert path[-1][7] == 1.0
    assert np.abs(pads(path[-1]) - [0.51, 0.0, 0.17]).max() < 0.01
    again = act(make_policy("scripted", PI05), path[2])  # it follows from the joints alone
    assert np.array_equal(again, path[3])


def test_scripted_policy_rises_before_it_crosses_the_table() -> None:
    policy = make_policy("scripted", PI05)
    low = min((act(policy, act(policy, REST), rows) for rows in range(1, 13)), key=lambda joints: pads(joints)[2])
    assert pads(low)[2] < 0.06
    low[0] += 0.5  # beside the spot, at its height, the gripper open
    low[7] = 0.0
    actions = check_actions(policy.infer(observation(low)), PI05, "p")
    first = pads(np.append(low[:7] + 0.054 * actions[0, :7], 0)) - pads(low)
    assert first[2] > 0.5 * np.linalg.norm(first)


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("layout", ["pi05", "pi0", "pi0-fast"])
def test_every_policy_answers_in_every_layout(name: str, layout: str) -> None:
    actions = check_actions(make_policy(name, find_layout(layout), 3).infer(observation()), find_layout(layout), name)
    assert np.abs(actions[:, :7]).max() <= 1.0
    with pytest.raises(PersistWorldError, match="observation/joint_position"):
        make_policy(name, PI05).infer({"prompt": "x"})


def test_random_policy_depends_on_seed_call_and_episode_only() -> None:
    def draw(seed: int, calls: int, prompt: str = "a") -> np.ndarray:
        policy = make_policy("random", PI05, seed)
        return [policy.infer(observation(prompt=prompt))["actions"] for _ in range(calls)][-1]

    assert np.array_equal(draw(1, 2), draw(1, 2))
    others = (draw(2, 2), draw(1, 1), draw(1, 2, "b"))
    assert not any(np.array_equal(draw(1, 2), other) for other in others)
    assert np.array_equal(make_policy("hold", PI05).infer(observation())["actions"], np.zeros((15, 8)))


# -- client and server ------------------------------------------------------------------------------------------------


def test_server_and_client_speak_the_protocol() -> None:
    with serve_embedded("scripted", PI05) as server, PolicyClient(server.uri, wait_s=5) as client:
        assert client.metadata["policy"] == "scripted"
        answer = client.infer(observation())
        expected = make_policy("scripted", PI05).infer(observation())
        assert np.array_equal(answer["actions"], expected["actions"])
        assert answer["server_timing"]["infer_ms"] > 0
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/healthz", timeout=5) as response:
            assert response.status == 200
    with pytest.raises(PersistWorldError, match="closed"):
        client.infer(observation())


def test_server_answers_a_client_written_from_the_description() -> None:
    with serve_embedded("hold", PI05) as server, connect(server.uri, proxy=None) as connection:
        assert msgpack.unpackb(connection.recv())["policy"] == "hold"
        image = {b"__ndarray__": True, b"data": bytes(12), b"dtype": "|u1", b"shape": [2, 2, 3]}
        joints = {b"__ndarray__": True, b"data": REST[:7].tobytes(), b"dtype": "<f8", b"shape": [7]}
        gripper = {b"__ndarray__": True, b"data": np.array([0.25]).tobytes(), b"dtype": "<f8", b"shape": [1]}
        request = {
            "observation/exterior_image_1_left": image,
            "observation/wrist_image_left": image,
            "observation/joint_position": joints,
            "observation/gripper_position": gripper,
            "prompt": "hold",
        }
        connection.send(msgpack.packb(request))
        actions = msgpack.unpackb(connection.recv())["actions"]
        assert actions[b"shape"] == [15, 8]
        assert np.frombuffer(actions[b"data"], actions[b"dtype"]).reshape(15, 8)[0, 7] == 0.25


def test_a_failing_policy_shows_its_traceback() -> None:
    with serve_embedded("hold", PI05) as server:
        client = PolicyClient(server.uri, wait_s=5)
        with pytest.raises(PersistWorldError, match=r"(?s)Traceback.*no field 'observation/joint_position'"):
            client.infer({"prompt": "no joints"})
        with PolicyClient(server.uri, wait_s=5) as other:  # the server lives on
            assert "actions" in other.infer(observation())


def test_api_key_and_origin_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_embedded("hold", PI05, api_key="secret") as server:
        with pytest.raises(PersistWorldError, match="HTTP 401") as refused:
            PolicyClient(server.uri, wait_s=5, api_key="wrong")
        assert API_KEY_VARIABLE in str(refused.value)
        monkeypatch.setenv(API_KEY_VARIABLE, "secret")
        with open_policies(server.uri, PolicySettings(wait_s=5), 1) as (client,):
            assert "actions" in client.infer(observation())
    with serve_embedded("hold", PI05) as server, pytest.raises(InvalidStatus, match="403"):
        connect(server.uri, proxy=None, origin=Origin("http://evil.example"))


def test_no_server_is_waited_for_with_a_countdown_and_then_told() -> None:
    left: list[float] = []
    began = time.monotonic()
    with pytest.raises(PersistWorldError, match=r"within 0\.7 s") as absent:
        PolicyClient("ws://127.0.0.1:9", wait_s=0.7, on_wait=left.append)
    assert 0.6 < time.monotonic() - began < 5
    assert left == sorted(left, reverse=True)
    assert len(left) >= 2
    assert "persistworld policy-server" in str(absent.value)


def test_a_server_that_comes_late_is_found(caplog: pytest.LogCaptureFixture) -> None:
    with serve_embedded("hold", PI05) as probe:
        port = probe.port
    late = serve_embedded("hold", PI05, port=port)
    timer = threading.Timer(0.6, late.start)
    timer.start()
    try:
        with (
            caplog.at_level(logging.WARNING),
            open_policies("server", PolicySettings(port=port, wait_s=10), 1) as (client,),
        ):
            assert "actions" in client.infer(observation())
        assert "waiting 10 s more" in caplog.text
    finally:
        timer.join()
        late.close()


def test_a_slow_answer_is_given_up_and_the_connection_closed() -> None:
    def slow(connection: ServerConnection) -> None:
        connection.send(pack({}))
        connection.recv()
        time.sleep(1.0)

    with raw_server(slow) as uri:
        client = PolicyClient(uri, timeout_s=0.2, wait_s=5)
        with pytest.raises(PersistWorldError, match=r"an answer within 0\.2 s"):
            client.infer(observation())
        with pytest.raises(PersistWorldError, match="is closed"):
            client.infer(observation())


@pytest.mark.parametrize(
    ("first", "text"),
    [
        ("Traceback: no checkpoint", "(?s)failed:.*no checkpoint"),
        (b"\xc1", "not a policy message"),
        (msgpack.packb([1]), "list as its metadata"),
        (None, "closed the connection"),
    ],
)
def test_bad_first_messages_are_told(first: str | bytes | None, text: str) -> None:
    def handle(connection: ServerConnection) -> None:
        if first is not None:
            connection.send(first)
            connection.recv()

    with raw_server(handle) as uri, pytest.raises(PersistWorldError, match=text):
        PolicyClient(uri, wait_s=5, timeout_s=5)


def test_what_is_no_policy_server_is_told_at_once() -> None:
    def not_found(connection: ServerConnection, request: Any) -> Any:
        return connection.respond(404, "nothing here")

    with (
        raw_server(lambda _: None, process_request=not_found) as uri,
        pytest.raises(PersistWorldError, match="HTTP 404"),
    ):
        PolicyClient(uri, wait_s=60)
    with pytest.raises(UsageError, match="not the address"):
        PolicyClient("http://127.0.0.1:1", wait_s=1)
    assert policy_uri("gpu7", 8000) == "ws://gpu7:8000"
    assert policy_uri("::1", 8000) == "ws://[::1]:8000"
    assert policy_uri("wss://host/p", 8000) == "wss://host/p"


# -- where a policy comes from ----------------------------------------------------------------------------------------


def test_a_policy_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_policy.py").write_text(
        "import numpy as np\n"
        "class Still:\n"
        "    def infer(self, obs):\n"
        "        if obs['prompt'] == 'fail': raise ValueError('my mistake')\n"
        "        return {'actions': np.zeros((15, 8))}\n"
        "    def reset(self): pass\n"
        "class Half:\n"
        "    def infer(self, obs): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_policy", raising=False)
    with open_policies("my_policy:Still", PolicySettings(), 2) as (one, two):
        assert one is not two
        assert one.infer(observation())["actions"].shape == (15, 8)
        with pytest.raises(PersistWorldError, match=r"(?s)Traceback.*my mistake"):
            two.infer(observation(prompt="fail"))
    for name, text in (("my_policy:Half", "reset"), ("my_policy:None_", "no class"), ("nowhere_x:A", "no module")):
        with pytest.raises(UsageError, match=text):
            check_policy(name)


def test_policy_names_are_checked_before_any_compute() -> None:
    for name in ("scripted", "server", "", "ws://a:1", "localhost:8000"):
        check_policy(name)
    with pytest.raises(UsageError, match=r"unknown policy 'scripped'.*\n.*\n.*scripted"):
        check_policy("scripped")


def test_every_rollout_has_a_connection_of_its_own() -> None:
    with open_policies("random", PolicySettings(seed=4, wait_s=5), 2) as (one, two):
        first = one.infer(observation())["actions"]
        one.infer(observation())
        assert np.array_equal(two.infer(observation())["actions"], first)


# -- what a chunk means -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tag", "skip"), [("skip2", 2), ("skip3", 3)])
def test_chunks_become_poses_as_in_the_reference(golden: Path, tag: str, skip: int) -> None:
    data = {k.removeprefix(tag + "."): v for k, v in load_file(golden / "tiny_rollout_pi.safetensors").items()}
    adapter = load_adapter(str(golden / "action_adapter_weights.safetensors"))
    for i, (actions, joints) in enumerate(zip(data["chunk"], data["joint_in"], strict=True)):
        chunk = interpret_chunk(actions, joints, adapter, skip=skip, gripper_cap=0.75)
        close(f"I policy {tag}, adapter's joints", chunk.adapter_joints, data["adapter_joints"][i], 1e-6)
        close(f"I policy {tag}, joints", chunk.joints[:, :7], data["fk_joints"][i], 1e-6)
        close(f"I policy {tag}, states", chunk.states, data["fk_states"][i], 1e-6)
        close(f"I policy {tag}, poses of a chunk", chunk.poses_taken, data["poses_taken"][i], 1e-6)
        close(f"I policy {tag}, joints of a chunk", chunk.joints_taken, data["joints_taken"][i], 1e-6)


def test_policy_controller_follows_the_reference_through_a_rollout(golden: Path) -> None:
    tag, skip = "skip3", 3
    data = {k.removeprefix(tag + "."): v for k, v in load_file(golden / "tiny_rollout_pi.safetensors").items()}

    class Recorded:
        def __init__(self) -> None:
            self.asked: list[dict[str, Any]] = []

        def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
            self.asked.append(obs)
            return {"actions": data["chunk"][len(self.asked) - 1]}

        def reset(self) -> None: ...

        def close(self) -> None: ...

    adapter = load_adapter(str(golden / "action_adapter_weights.safetensors"))
    view = PolicyView(layout=PI05, adapter=adapter, skip=skip, gripper_cap=0.75, camera=1, wrist_camera=2)
    policies = [Recorded(), Recorded()]
    controller = PolicyController(policies, view, np.stack([data["joint_in"][0]] * 2), ["a", "b"])
    pictures = np.zeros((2, 3, 8, 8, 3), np.uint8)
    pictures[:, 1], pictures[:, 2] = 10, 20
    current = np.zeros((2, 7))
    for i in range(4):
        poses = controller.poses(i, current, pictures)
        assert np.abs(poses - data["poses_taken"][i]).max() < 1e-5
    assert np.abs(policies[1].asked[3]["observation/joint_position"] - data["joint_in"][3, :7]).max() < 1e-5
    assert policies[1].asked[0]["prompt"] == "b"
    assert policies[0].asked[0]["observation/exterior_image_1_left"].max() == 10
    assert policies[0].asked[0]["observation/wrist_image_left"].max() == 20
    trace = controller.traces[0]
    for name in ("joint_pos", "joint_vel", "state_fk"):
        expected = data[f"info_{name}"].reshape(-1, 7)
        close(f"I policy {tag}, saved {name}", np.asarray(getattr(trace, name)), expected, 1e-5)


def test_a_chunk_too_short_for_its_skip_is_refused() -> None:
    with pytest.raises(UsageError, match="skip 3 needs 13 rows") as short:
        interpret_chunk(np.zeros((10, 8)), REST, GainAdapter(), skip=3, gripper_cap=1.0)
    assert "at most 2" in str(short.value)


def test_the_gripper_of_now_is_capped_only_where_asked() -> None:
    now = np.append(REST[:7], 0.9)
    actions = np.ones((15, 8)) * [0, 0, 0, 0, 0, 0, 0, 1.5]
    chunk = interpret_chunk(actions, now, GainAdapter(), skip=2, gripper_cap=0.75)
    assert np.allclose(chunk.poses_taken[:, 6], [0.9, 0.75, 0.75, 0.75, 0.75])
    capped = interpret_chunk(actions, now, GainAdapter(), skip=2, gripper_cap=0.75, cap_current=True)
    assert np.allclose(capped.poses_taken[:, 6], 0.75)


def test_recorded_and_keyboard_controllers() -> None:
    states = np.arange(12 * 7, dtype=float).reshape(12, 7)
    poses = RecordedController([states, states], [0, 5]).poses(1, np.zeros((2, 7)))
    assert np.array_equal(poses[0], states[4:9])
    assert np.array_equal(poses[1], states[[9, 10, 11, 11, 11]])  # clipped to the last
    start = np.array([[0.5, 0.0, 0.3, 3.0, 0.0, 0.0, 0.0]] * 2)
    keys = KeyboardController(KeyMap(), "lo")
    assert np.allclose(keys.poses(0, start)[:, -1, 1], -0.08)
    assert np.array_equal(keys.poses(1, start)[1], KeyMap().chunk(start[1], "o"))
    with pytest.raises(UsageError):
        KeyboardController(KeyMap(), "lx")


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_the_six_tasks_and_the_bundled_one_are_there() -> None:
    caps = {
        "pickplace": 0.75,
        "towel_fold": 0.95,
        "wipe_table": 0.95,
        "tissue": 0.97,
        "close_laptop": 0.95,
        "stack": 0.75,
    }
    assert set(task_names()) == {*caps, "bundled"}
    for name, cap in caps.items():
        task = load_task(name)
        assert task.gripper_cap == cap
        assert task.skip == (3 if name in ("tissue", "close_laptop") else 2)
        assert all(start.episode and start.instruction for start in task.starts)
    assert load_task("bundled").starts[0].episode == ""


def test_task_files_are_checked(tmp_path: Path, shared_data: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('skip = 1\n[[starts]]\nepisode = "7"\n')
    assert load_task(str(own)).starts[0].episode == "7"
    for text, message in (
        ("skips = 1", "skips.*\n.*\n.*skip"),
        ("skip = 1.5", "type int"),
        ("skip = 0", "from 1"),
        ("starts = 3", "tables"),
        ("skip =", "not TOML"),
    ):
        own.write_text(text)
        with pytest.raises(UsageError, match=message):
            load_task(str(own))
    with pytest.raises(UsageError, match="stack"):
        load_task("stacks")
    annotations = shared_data / "droid_new_setup" / "annotation" / "val"
    texts = {"wipe_table": "0006", "tissue": "0008", "close_laptop": "0011"}
    for name, episode in texts.items():
        start = next(s for s in load_task(name).starts if s.episode == episode)
        assert start.instruction in (annotations / f"{episode}.json").read_text()
