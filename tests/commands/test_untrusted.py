"""What others send: texts with control characters, answers of policy servers, requests to this package's servers."""

from __future__ import annotations

import ast
import http.client
import json
import logging
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from drive_world import arm_world, session
from policy_views import VIEW
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

import persistworld_cli
from persistworld_cli.commands.app import app
from persistworld_cli.commands.run import show_result, write_json
from persistworld_cli.console import (
    escaped,
    file_console,
    listen_to_library,
    note,
    show_error,
    show_traceback,
    stderr_console,
    stdout_console,
    write_out,
)
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.interact.live import _line
from persistworld_cli.interact.web import Inbox, _Host, _read
from persistworld_cli.interact.web_server import DriveServer
from persistworld_cli.policies.client import PolicyClient
from persistworld_cli.policies.msgpack_numpy import pack
from persistworld_cli.policies.observation import check_actions
from persistworld_cli.policies.server import PolicyServer, serve_embedded
from persistworld_cli.reports.progress import Meter

MOST = VIEW.space.most
# Clears the screen, sets the title, CSI as one character, overwrites the line, turns text round, half a surrogate pair.
NASTY = "a\x1b[2Jb\x1b]0;title\x07c\x9b31md\re\x08f\u202eg\ud800h\x7fi"
SHOWN = r"a\u001b[2Jb\u001b]0;title\u0007c\u009b31md\u000de\u0008f\u202eg\ud800h\u007fi"


def clean(text: str) -> str:
    """The text, of which a terminal would obey nothing but newlines."""
    bad = [character for character in text if not character.isprintable() and character not in "\n\t"]
    assert not bad, (bad, text)
    return text


# -- the one sink -----------------------------------------------------------------------------------------------------


def test_escaping_keeps_what_is_readable_and_every_json_value() -> None:
    assert escaped(NASTY) == SHOWN
    for plain in ("pick up the rote Tasse ☕ — 把杯子", "two\nlines\tand a tab", "", "\\u001b"):
        assert escaped(plain) == plain
    assert escaped("windows\r\nline") == "windows\nline"
    document = {NASTY: [NASTY, "x\ny"]}
    assert json.loads(escaped(json.dumps(document, ensure_ascii=False, indent=1))) == document


def _log(text: str) -> None:
    listen_to_library()
    library = logging.getLogger("persistworld_cli")
    library.propagate = False  # pytest-xdist cannot send half a surrogate pair that pytest has captured
    try:
        library.getChild("test").warning("instruction %s", text)
    finally:
        library.propagate = True


def _error(text: str) -> None:
    show_error(PersistWorldError(text, where=text, fix=text))


def _traceback(text: str) -> None:
    try:
        raise RuntimeError(text)
    except RuntimeError:
        show_traceback()


def _meter(text: str) -> None:
    with Meter(text, 2) as meter:
        meter.advance(2)


def _table(text: str) -> None:
    table = Table(text, title=text, caption=text)
    table.add_row(text)
    table.add_row(Text(text))
    stdout_console().print(table)


@pytest.mark.parametrize(
    "show",
    [
        note,
        write_out,
        _log,
        _error,
        _traceback,
        _meter,
        _table,
        lambda text: write_json({"instruction": text}),
        lambda text: show_result({"texts": [text], "name": text, "rows": [{text: text}]}, as_json=False),
        lambda text: show_result({"nested": {text: text}}, as_json=True),
        lambda text: stderr_console().print(Text(text)),
        lambda text: write_out(_line(text, 200)),
    ],
)
def test_no_way_to_the_terminal_lets_control_characters_through(
    show: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    show(NASTY)
    out, err = capsys.readouterr()
    assert "title" in clean(out) + clean(err)


def test_rendered_reports_are_clean_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = StringIO()
    file_console(text, 200).print(NASTY, markup=False)
    assert clean(text.getvalue()).strip() == SHOWN
    report = tmp_path / "report.txt"
    report.write_text(NASTY.replace("\ud800", ""), encoding="utf-8")
    show_result({"text": str(report)}, as_json=False)
    assert "title" in clean(capsys.readouterr().out)


def test_nothing_else_writes_to_the_terminal() -> None:
    """`print`, the standard streams and Rich's console are used in console.py alone; two modules draw screens."""
    package = Path(persistworld_cli.__file__).parent
    own = {"console.py", "interact/terminal.py", "launch/terminal.py"}
    found = []
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        if name in own:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            to_file = isinstance(node, ast.Call) and ("file" in {word.arg for word in node.keywords})
            direct = called.endswith(("stdout.write", "stderr.write", ".print_exc"))
            if (direct or called in ("print", "Console", "typer.echo", "click.echo")) and not to_file:
                found.append(f"{name}:{node.lineno} {called}")
    assert not found


# -- what a policy answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actions", "text"),
    [
        ([[0.0] * 8] * 14 + [[0.0] * 7], "not an array"),
        ([[0.0] * 8] * 14 + [[0.0] * 7 + [[1.0]]], "not an array"),
        ([[0.0] * 8] * 14 + [[0.0] * 7 + ["fast"]], "not numbers"),
        ([[0.0] * 8] * 14 + [[0.0] * 7 + [2**70]], "not numbers"),
        ([[0.0] * 8] * 14 + [[0.0] * 7 + [None]], "not numbers"),
        ([[0.0] * 8] * 14 + [[0.0] * 7 + [float("nan")]], r"nan at \[14, 7\] \(gripper position in row 14\)"),
        ([[0.0] * 8] * 14 + [[1e300] * 8], r"1e\+300 at \[14, 0\] \(velocity of joint 1 in row 14\)"),
        ([[0.0] * 8] * 14 + [[-MOST * 1.01] * 8], r"-101\.0 at"),
        (np.full((15, 8), np.finfo(np.float16).max, np.float16), "65504"),
        (np.full((15, 8), -np.inf, np.float32), "-inf"),
        ({}, "not numbers"),
        ([], "shape"),
        (None, "not numbers"),
    ],
)
def test_an_answer_that_is_no_chunk_is_one_error(actions: Any, text: str) -> None:
    with pytest.raises(PersistWorldError, match=text) as refused:
        check_actions({"actions": actions}, VIEW, "a server")
    assert refused.value.where == "a server"


def test_the_largest_commands_pass() -> None:
    assert np.array_equal(check_actions({"actions": [[MOST] * 8] * 15}, VIEW, "x"), np.full((15, 8), MOST))


@contextmanager
def policy_server(handle: Callable[[ServerConnection], None]) -> Iterator[str]:
    """A websocket server that does as it likes."""
    with serve(handle, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("surplus", [pack({"actions": 1}), "Traceback: too late"])
def test_a_surplus_answer_is_never_taken_for_the_next_one(surplus: bytes | str) -> None:
    sent = threading.Event()

    def handle(connection: ServerConnection) -> None:
        connection.send(pack({}))
        for _ in connection:
            connection.send(pack({"actions": 0}))
            connection.send(surplus)
            connection.ping().wait(5)  # its pong comes after the surplus message was read
            sent.set()

    with policy_server(handle) as uri, PolicyClient(uri, wait_s=5) as client:
        assert client.infer({})["actions"] == 0
        assert sent.wait(5)
        with pytest.raises(PersistWorldError, match="more answers" if isinstance(surplus, bytes) else "too late"):
            client.infer({})
        with pytest.raises(PersistWorldError, match="is closed"):
            client.infer({})


def test_messages_that_are_none_name_the_server() -> None:
    broken = [b"\xc1", msgpack.packb({"actions": {b"__ndarray__": True, b"shape": [2**40, 8], b"dtype": "<f8"}})]
    broken += [msgpack.packb({"x": {b"__npgeneric__": True, b"data": b"", b"dtype": "<f8"}}), b"\x91" * 5000]
    for message in broken:

        def handle(connection: ServerConnection, message: bytes = message) -> None:
            connection.send(pack({}))
            connection.recv()
            connection.send(message)

        with policy_server(handle) as uri, PolicyClient(uri, wait_s=5) as client:
            with pytest.raises(PersistWorldError) as refused:
                client.infer({})
            assert refused.value.where == uri


def test_a_policy_for_other_machines_needs_a_key_or_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERSISTWORLD_POLICY_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "", "192.0.2.1", "example.org"):
        with pytest.raises(UsageError, match="needs a key"):
            serve_embedded("hold", host=host)
    for host in ("127.0.0.1", "localhost", "::1"):
        serve_embedded("hold", host=host)
    serve_embedded("hold", host="0.0.0.0", api_key="k")
    serve_embedded("hold", host="0.0.0.0", keyless=True)
    refused = CliRunner().invoke(app, ["policy-server", "--host", "0.0.0.0"])
    assert refused.exit_code == 2
    assert "--no-key" in refused.output


# -- requests to the servers ------------------------------------------------------------------------------------------

WEBSOCKET = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
KEY = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"


def requests(port: int) -> Iterator[bytes]:
    """Requests that no browser sends."""
    host = f"Host: 127.0.0.1:{port}\r\n"
    for path in (
        "/",
        "/ws",
        "//[",
        "http://[x",
        "/?token=%ff%ff",
        "/" + "a" * 9000,
        "/\x00",
        "/ws?take=1&take",
        "*",
        "",
    ):
        yield f"GET {path} HTTP/1.1\r\n{host}\r\n".encode()
    for path in ("//[/ws", "/ws", "/healthz"):
        yield f"GET {path} HTTP/1.1\r\n{host}{WEBSOCKET}Sec-WebSocket-Key: \x00\r\n\r\n".encode()
        yield f"GET {path} HTTP/1.1\r\n{host}{WEBSOCKET}{KEY}{KEY}\r\n".encode()
        yield f"GET {path} HTTP/1.1\r\n{host}{host}{WEBSOCKET}{KEY}\r\n".encode()
        yield f"GET {path} HTTP/1.1\r\n{host}Origin: a\r\nOrigin: b\r\n{WEBSOCKET}{KEY}\r\n".encode()
        yield f"GET {path} HTTP/1.1\r\n{host}Authorization: a\r\nAuthorization: b\r\n{WEBSOCKET}{KEY}\r\n".encode()
        yield f"GET {path} HTTP/1.1\r\nHost: [\r\n{WEBSOCKET}{KEY}\r\n".encode()
        yield f"GET {path} HTTP/1.1\r\n{host}{WEBSOCKET}{KEY}Sec-WebSocket-Protocol: ,;=\r\n\r\n".encode()
        yield f"GET {path} HTTP/1.1\r\n{host}{WEBSOCKET}{KEY}Sec-WebSocket-Extensions: \x01\r\n\r\n".encode()
        yield f"GET {path} HTTP/1.1\r\n{host}{WEBSOCKET}{KEY}Content-Length: -1\r\n\r\n".encode()
        yield f"GET {path} HTTP/1.1\r\n{host}Authorization: \xff\xfe\r\n{WEBSOCKET}{KEY}\r\n".encode("latin-1")
        yield f"GET {path} HTTP/1.1\r\nHost: \xff\r\n{WEBSOCKET}{KEY}\r\n".encode("latin-1")
    for method in ("POST", "HEAD", "DELETE", "get", "\x1b[2J"):
        yield f"{method} / HTTP/1.1\r\n{host}Content-Length: 99999999999999999999\r\n\r\nbody".encode()
    yield b"GET / HTTP/1.0\r\n\r\n"
    yield b"GET / HTTP/1.1\r\n\r\n"
    yield b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 300 + b"\r\n"
    yield b"GET / HTTP/1.1\r\nno colon\r\n\r\n"
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # a browser that speaks TLS
    yield b"\r\n\r\n"
    yield b""
    yield b"GET"
    draw = random.Random(5)
    whole = f"GET /ws?take HTTP/1.1\r\n{host}{WEBSOCKET}{KEY}\r\n".encode()
    for _ in range(60):
        broken = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        yield bytes(broken[: draw.randint(len(broken) // 2, len(broken))])


def poke(port: int, request: bytes) -> bytes:
    """Send a request, say that no more comes, and read what is answered; a websocket that opened is dropped."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(request)
        raw.shutdown(socket.SHUT_WR)
        answer = b""
        while not answer.startswith(b"HTTP/1.1 101"):
            try:
                more = raw.recv(65536)
            except ConnectionResetError:
                break
            if not more:
                break
            answer += more
        return answer


def no_tracebacks(log: pytest.LogCaptureFixture) -> None:
    assert [record.getMessage() for record in log.records if record.exc_info] == []
    log.clear()


MESSAGES = [
    "",
    "x",
    "[]",
    "null",
    "NaN",
    "9" * 4000,
    "[" * 4000,
    '{"do":' * 600,
    '{"do": null}',
    '{"do": []}',
    '{"do": {"a": 1}}',
    '{"do": "key"}',
    '{"do": "key", "key": 7}',
    '{"do": "key", "key": ["l"]}',
    '{"do": "key", "key": "\\ud800\\u001b[2J"}',
    '{"do": "key", "key": ""}',
    '{"do": "rewind"}',
    '{"do": "rewind", "step": -1}',
    '{"do": "rewind", "step": 1e999}',
    '{"do": "rewind", "step": NaN}',
    '{"do": "rewind", "step": true}',
    '{"do": "rewind", "step": ' + "9" * 4000 + "}",
    '{"do": "images", "step": -99}',
    '{"do": "images", "step": "0"}',
    '{"do": "images", "step": 123456789012345678901234567890}',
    '{"do": "save"}',
    '{"do": "save", "kind": "../../x"}',
    '{"do": "save", "kind": ["mp4"]}',
    '{"do": "save", "kind": {}}',
    '{"do": "undo", "step": []}',
    '{"do": "branch", "key": {}}',
]


def test_no_request_gives_the_page_server_a_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    inbox, own = Inbox(), session(arm_world(tmp_path), seed=1)
    with DriveServer("127.0.0.1", 0) as server:
        host = _Host(own, server.send, tmp_path)
        server.start(lambda message: inbox.put({"do": "hello"} if message is None else _read(message)) and None)
        for request in requests(server.port):
            answer = poke(server.port, request)
            assert b"Traceback" not in answer
            assert not answer.startswith(b"HTTP/1.1 500"), (request, answer)
        no_tracebacks(caplog)
        while inbox.take(0.0) is not None:
            pass
        url = f"ws://127.0.0.1:{server.port}/ws?take"
        with connect(url, proxy=None, max_size=None) as tab:
            host.do(inbox.take(10.0) or {})
            assert json.loads(tab.recv(10))["type"] == "hello"
            for message in MESSAGES:
                tab.send(message)
                host.do(inbox.take(10.0) or {})
                told: Any = {}
                while told.get("type") != "head":  # every mistake ends in an error and where the session stands
                    answer = tab.recv(10)
                    told = json.loads(answer) if isinstance(answer, str) else told
                assert own.head.number == 0
        for bad in (b"\xff" * 10, "x" * 5000):  # a text that is not UTF-8; one that is too long
            with connect(url, proxy=None) as tab:
                tab.send(bad, text=True)
                with pytest.raises(ConnectionClosed):
                    while True:
                        tab.recv(10)
        no_tracebacks(caplog)
        page = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        page.request("GET", "/")
        assert page.getresponse().status == 200
    clean(capsys.readouterr().err)


def test_no_request_gives_the_policy_server_a_traceback(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    class Policy:
        def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
            asked.append(obs)
            return {"actions": obs["x"]}

        def reset(self) -> None:
            pass

        def close(self) -> None:
            pass

    with PolicyServer(Policy, api_key="schlüssel") as server:
        for request in requests(server.port):
            assert not poke(server.port, request).startswith(b"HTTP/1.1 500")
        with pytest.raises(InvalidHandshake):
            connect(server.uri, proxy=None, additional_headers={"Authorization": "Api-Key \xe9"})
    with PolicyServer(Policy) as server:
        for request in requests(server.port):
            assert not poke(server.port, request).startswith(b"HTTP/1.1 500")
        for message in (b"", b"\xc1", b"\x91" * 3000, msgpack.packb([1]), msgpack.packb({"x": b""})[:-1], "text"):
            with connect(server.uri, proxy=None) as client:
                client.recv(10)
                client.send(message)
                assert "Traceback" in str(client.recv(10))  # openpi's protocol: the client is told, in text
        with PolicyClient(server.uri, wait_s=5) as client:
            assert client.infer({"x": 3})["actions"] == 3
    no_tracebacks(caplog)
    assert "Traceback" not in clean(capsys.readouterr().err)
