"""openpi's protocol: the wire, client and server with their failures, and where a policy comes from."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from policy_views import IMAGES, REST, VIEW, observation
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve
from websockets.typing import Origin

from persistworld_cli.config.settings import PolicySettings
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.policies.action_spaces import at_joints
from persistworld_cli.policies.client import PolicyClient, policy_uri
from persistworld_cli.policies.controller import PolicyController
from persistworld_cli.policies.embedded import make_policy
from persistworld_cli.policies.msgpack_numpy import pack, unpack
from persistworld_cli.policies.server import API_KEY_VARIABLE, serve_embedded
from persistworld_cli.policies.source import check_policy, open_policies


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


# -- client and server ------------------------------------------------------------------------------------------------


def test_server_and_client_speak_the_protocol() -> None:
    with serve_embedded("scripted") as server, PolicyClient(server.uri, wait_s=5) as client:
        assert client.metadata["policy"] == "scripted"
        answer = client.infer(observation())
        expected = make_policy("scripted").infer(observation())
        assert np.array_equal(answer["actions"], expected["actions"])
        assert answer["server_timing"]["infer_ms"] > 0
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/healthz", timeout=5) as response:
            assert response.status == 200
    with pytest.raises(PersistWorldError, match="closed"):
        client.infer(observation())


def test_server_answers_a_client_written_from_the_description() -> None:
    with serve_embedded("hold") as server, connect(server.uri, proxy=None) as connection:
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
    with serve_embedded("hold") as server:
        client = PolicyClient(server.uri, wait_s=5)
        with pytest.raises(PersistWorldError, match=r"(?s)Traceback.*no field 'observation/joint_position'"):
            client.infer({"prompt": "no joints"})
        with PolicyClient(server.uri, wait_s=5) as other:  # the server lives on
            assert "actions" in other.infer(observation())


def test_api_key_and_origin_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_embedded("hold", api_key="secret") as server:
        with pytest.raises(PersistWorldError, match="HTTP 401") as refused:
            PolicyClient(server.uri, wait_s=5, api_key="wrong")
        assert API_KEY_VARIABLE in str(refused.value)
        monkeypatch.setenv(API_KEY_VARIABLE, "secret")
        with open_policies(server.uri, PolicySettings(wait_s=5), 1) as (client,):
            assert "actions" in client.infer(observation())
    with serve_embedded("hold") as server, pytest.raises(InvalidStatus, match="403"):
        connect(server.uri, proxy=None, origin=Origin("http://evil.example"))


def test_no_server_is_waited_for_with_a_countdown_and_then_reported() -> None:
    left: list[float] = []
    with pytest.raises(PersistWorldError, match=r"within 0\.7 s") as absent:
        PolicyClient("ws://127.0.0.1:9", wait_s=0.7, on_wait=left.append)
    assert left == sorted(left, reverse=True)
    assert len(left) >= 2
    assert "persistworld policy-server" in str(absent.value)


def test_a_server_that_comes_late_is_found(caplog: pytest.LogCaptureFixture) -> None:
    with serve_embedded("hold") as probe:
        port = probe.port
    late = serve_embedded("hold", port=port)

    class StartsServer(logging.Handler):
        """Starts the server when the client says that it waits."""

        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())
            if len(said) == 1:
                late.start()

    said: list[str] = []
    listener, logger = StartsServer(logging.WARNING), logging.getLogger("persistworld_cli.policies.source")
    logger.addHandler(listener)
    try:
        with open_policies("server", PolicySettings(port=port, wait_s=60), 1) as (client,):
            assert "actions" in client.infer(observation())
        assert "waiting up to 60 s more" in said[0]
    finally:
        logger.removeHandler(listener)
        late.close()


def test_a_slow_answer_is_given_up_and_the_connection_closed() -> None:
    def slow(connection: ServerConnection) -> None:
        connection.send(pack({}))
        connection.recv()
        with contextlib.suppress(ConnectionClosed):
            connection.recv()  # no answer, until the client has had enough

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
def test_bad_first_messages_are_reported(first: str | bytes | None, text: str) -> None:
    def handle(connection: ServerConnection) -> None:
        if first is not None:
            connection.send(first)
            connection.recv()

    with raw_server(handle) as uri, pytest.raises(PersistWorldError, match=text):
        PolicyClient(uri, wait_s=5, timeout_s=5)


def test_what_is_no_policy_server_is_reported_at_once() -> None:
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
    lines = (
        "import numpy as np",
        "class Still:",
        "    def infer(self, obs):",
        "        if obs['prompt'] == 'fail': raise ValueError('my mistake')",
        "        return {'actions': np.zeros((15, 8))}",
        "    def reset(self): pass",
        "class Half:",
        "    def infer(self, obs): pass",
        "class Deaf:",
        "    def infer(self): pass",
        "    def reset(self): self.calls.clear()",
    )
    (tmp_path / "my_policy.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_policy", raising=False)
    with open_policies("my_policy:Still", PolicySettings(), 2) as (one, two):
        assert one is not two
        assert one.infer(observation())["actions"].shape == (15, 8)
        with pytest.raises(PersistWorldError, match=r"failed in Still.infer: ValueError: my mistake\n") as failed:
            two.infer(observation(prompt="fail"))
        assert failed.value.where == f"my_policy:Still; {tmp_path}/my_policy.py:4: {lines[3].strip()}"
    with open_policies("my_policy:Deaf", PolicySettings(), 1) as (one,):
        with pytest.raises(PersistWorldError, match=r"failed: TypeError: Deaf.infer\(\) takes 1"):
            one.infer(observation())
        with pytest.raises(PersistWorldError, match=r"failed in Deaf.reset: AttributeError"):
            one.reset()
    for name, text in (("my_policy:Half", "reset"), ("my_policy:None_", "no class"), ("nowhere_x:A", "no module")):
        with pytest.raises(UsageError, match=text):
            check_policy(name, "joint-velocity")


def test_policy_names_are_checked_before_any_compute() -> None:
    for name in ("scripted", "server", "", "ws://a:1", "localhost:8000"):
        check_policy(name, "joint-velocity")
    with pytest.raises(UsageError, match=r"unknown policy 'scripped'.*\n.*\n.*scripted"):
        check_policy("scripped", "joint-velocity")


class Together:
    """Answers all rollouts at once; the gripper position says in which place."""

    requests = 0

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError("one by one")

    def infer_batch(self, observations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        Together.requests += 1
        kept = len(observations) if observations[0]["prompt"] == "a" else 1
        return [{"actions": np.tile([0.0] * 7 + [i / 4], (15, 1))} for i in range(kept)]

    def reset(self) -> None: ...


def test_a_server_of_another_action_space_is_refused() -> None:
    """Joint positions and velocities are eight numbers each: nothing else would tell them apart."""
    with serve_embedded("hold", "joint-position") as server:
        with open_policies(server.uri, PolicySettings(actions="joint-position", wait_s=5), 1) as (policy,):
            assert policy.infer(observation())["actions"].shape == (15, 8)
        velocities = open_policies(server.uri, PolicySettings(wait_s=5), 1)
        with pytest.raises(UsageError, match="answers in joint-position, not joint-velocity"), velocities:
            pass


@pytest.mark.parametrize("served", [False, True])
def test_a_policy_may_answer_several_rollouts_in_one_request(served: bool) -> None:
    name, before = f"{__name__}:Together", Together.requests
    with contextlib.ExitStack() as stack:
        uri = stack.enter_context(serve_embedded(name)).uri if served else name
        policies = stack.enter_context(open_policies(uri, PolicySettings(wait_s=5), 3))
        controller = PolicyController(policies, VIEW, [at_joints(REST)] * 3, ["a", "b", "c"])
        assert np.allclose(controller.poses(np.stack([IMAGES] * 3))[:, -1, 6], [0, 0.25, 0.5])
        assert Together.requests == before + 1
        controller = PolicyController(policies, VIEW, [at_joints(REST)] * 3, ["x", "b", "c"])
        with pytest.raises(PersistWorldError, match="3 observations with as many answers"):
            controller.poses(np.stack([IMAGES] * 3))


def test_every_rollout_has_a_connection_of_its_own() -> None:
    with open_policies("random", PolicySettings(seed=4, wait_s=5), 2) as (one, two):
        first = one.infer(observation())["actions"]
        one.infer(observation())
        assert np.array_equal(two.infer(observation())["actions"], first)
