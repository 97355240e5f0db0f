"""`drive --web`: the real command's page in a real browser, and who is let in."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from urllib.parse import urlsplit

import numpy as np
import pytest
from browser import Page, wait_for
from drive_world import arm_world, drive_command, session
from eval_world import HEIGHT, VIEWS, WIDTH
from typer.testing import CliRunner
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from persistworld_cli.commands.app import app
from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.data.raw.video import count_frames
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.interact.web_server import DriveServer, open_server


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return arm_world(tmp_path_factory.mktemp("web"))


@dataclass
class Served:
    """A running `drive --web`."""

    url: str
    output: Path
    process: subprocess.Popen[str]


@pytest.fixture
def served(root: Path, tmp_path: Path) -> Iterator[Served]:
    """The real command, with one episode and seed."""
    command, environment = drive_command(root, "--web", "--seed", "2", "--json", "--output", str(tmp_path / "out"))
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr
    lines = process.stderr
    try:
        found = (re.search(r"http://127\.0\.0\.1:\d+/", line) for line in lines)
        url = next((match for match in found if match), None)
        assert url, "the command ended without an address"
        threading.Thread(target=lines.read, daemon=True).start()  # a full pipe would stop the command
        yield Served(url[0], tmp_path / "out", process)
    finally:
        process.kill()
        process.wait()


def visit(page: Page, url: str) -> None:
    """Open the page and wait until it shows where the session stands."""
    page.call("Page.navigate", url="about:blank")
    page.call("Page.navigate", url=url)
    page.wait("document.body?.dataset.state === 'ready' && document.body.dataset.shown !== undefined")


def at(page: Page, step: int, frame: int = 3) -> None:
    """Wait until the last frame of a step is shown."""
    shown = f"d.head === '{step}' && d.shown === '{step}.{frame}' && d.state === 'ready'"
    try:
        page.wait(f"(d => {shown})(document.body.dataset)")
    except AssertionError as error:
        state = page.js("JSON.stringify([document.body.dataset, document.querySelector('#message').textContent])")
        raise AssertionError(f"{error}; instead {state}, errors {page.errors}") from error


def views(page: Page) -> np.ndarray:
    """What the canvases hold, uint8 (V, H, W, 3)."""
    data = page.js(
        "[...document.querySelectorAll('#views canvas')].map("
        "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])"
    )
    return np.asarray(data, dtype=np.uint8).reshape(VIEWS, HEIGHT, WIDTH, 4)[..., :3]


def go_back(page: Page, step: int) -> None:
    """Click a step of the timeline."""
    page.js(f"document.querySelector('[data-step=\"{step}\"]').scrollIntoView({{block: 'center', inline: 'center'}})")
    page.click(f'[data-step="{step}"]')
    at(page, step)


def test_driving_on_the_page(root: Path, served: Served, new_page: Callable[[], Page]) -> None:
    here = session(root, seed=2)  # what the same keys and seed give in this process
    page = new_page()
    visit(page, served.url)
    at(page, 0, 0)
    assert np.array_equal(views(page), here.head.images[-1])
    for number, key in enumerate("lcu", 1):
        page.key(key)
        at(page, number)
        assert np.array_equal(views(page), here.press(key).images[-1])
    page.key("x")
    at(page, 4)
    assert np.array_equal(views(page), here.branch().images[-1])

    go_back(page, 2)  # the same frames, bit for bit
    assert np.array_equal(views(page), here.rewind(2).images[-1])
    page.key("u")  # known already
    at(page, 3)
    assert np.array_equal(views(page), here.press("u").images[-1])
    page.key("z")
    at(page, 2)
    page.key("ArrowUp")
    at(page, 5)
    here.undo()
    assert np.array_equal(views(page), here.press("f").images[-1])
    assert page.js("document.querySelector('#pose').textContent").startswith(f"x+{here.pose[0]:.3f} m")
    assert re.fullmatch(r"this step\d+\.\d\d s.*", page.js("document.querySelector('#times').textContent"))
    assert page.js("document.querySelectorAll('.step').length") == 6 == len(here.steps)

    keys = "document.body.dataset.head"
    page.call("Input.dispatchKeyEvent", type="keyDown", key="r", text="r")  # and hold it
    page.wait(f"+{keys} >= 8")
    page.call("Input.dispatchKeyEvent", type="keyUp", key="r")
    page.wait("document.body.dataset.state === 'ready' && document.body.dataset.shown.endsWith('.3')")
    many = int(page.js(keys))
    assert 8 <= many <= 11  # it ends when it is let go
    saved_is_right(page, served, "lcf" + "r" * (many - 5))
    page.call("Page.reload")
    page.wait("document.body?.dataset.state === 'ready' && document.body.dataset.shown !== undefined")
    at(page, many)
    assert page.js("document.querySelectorAll('.step').length") == many + 1  # the session is the server's
    page.key("q")
    page.wait("document.querySelector('#message').textContent.includes('“q” does nothing here')")
    for width in (420, 1280):  # nothing is cut, and there is one scrollbar
        page.size(width, 800)
        page.wait(f"innerWidth === {width} && document.documentElement.scrollWidth <= innerWidth")
        buttons = "[...document.querySelectorAll('.key, [data-save]')]"
        assert page.js(f"{buttons}.every(one => one.getBoundingClientRect().right < innerWidth)")
        assert page.js("(tree => tree.scrollHeight <= tree.clientHeight)(document.querySelector('#tree'))")
    assert not page.errors
    another_tab_asks(page, new_page(), served, many)

    served.process.send_signal(signal.SIGINT)
    out, _ = served.process.communicate()
    told = json.loads(out)
    assert served.process.returncode == 0 and told["keys"] == "lc"
    assert json.loads(Path(told["json"]).read_text())["branches"] == [0, 0]
    assert Path(told["sheet"]).is_file() and count_frames(Path(told["video"])) == 9


def saved_is_right(page: Page, served: Served, keys: str) -> None:
    """Save in each way; the browser has the files, and the output folder too."""
    for kind, name in (("json", "drive.json"), ("mp4", "drive.mp4"), ("lerobot", "drive-lerobot.zip")):
        page.click(f"[data-save={kind}]")
        page.wait(f"document.body.dataset.saved === '{name}'")
        assert page.js("document.activeElement === document.body")  # the next key drives
        file = page.downloads / name
        wait_for(lambda file=file: file.is_file(), name)  # type: ignore[misc]
        assert file.read_bytes() == (served.output / name).read_bytes()
    assert json.loads((page.downloads / "drive.json").read_text())["keys"] == keys
    zipfile.ZipFile(page.downloads / "drive-lerobot.zip").extractall(page.downloads)
    assert RawDataset(page.downloads / "drive-lerobot").episode(0).length == 1 + 4 * len(keys)
    assert count_frames(page.downloads / "drive.mp4") == 1 + 4 * len(keys)


def another_tab_asks(first: Page, second: Page, served: Served, many: int) -> None:
    """One tab drives; another is told so and may take over; going back is what the first one then finds."""
    second.call("Page.navigate", url=served.url)
    second.wait("document.body?.dataset.state === 'taken'")
    assert "Another tab drives" in second.js("document.querySelector('#cover').innerText")
    second.click("#take")
    at(second, many)
    first.wait("document.body.dataset.state === 'taken'")
    go_back(second, 2)


# -- who is let in ------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded() -> Iterator[tuple[DriveServer, SimpleQueue[str | None]]]:
    """A server on loopback with a token; what its tab said."""
    heard: SimpleQueue[str | None] = SimpleQueue()
    with DriveServer("127.0.0.1", 0, "secret") as server:
        server.start(heard.put)
        yield server, heard


def answer(server: DriveServer, path: str, **headers: str) -> tuple[int, str, str]:
    """Status, body and content policy of a GET."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", path, headers=headers)
    got = connection.getresponse()
    return got.status, got.read().decode(), got.headers.get("Content-Security-Policy", "")


def dial(server: DriveServer, query: str = "token=secret", **headers: str) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{server.port}/ws?{query}", additional_headers=headers, proxy=None)


def test_page_and_websocket_need_the_token(guarded: tuple[DriveServer, SimpleQueue[str | None]]) -> None:
    server, heard = guarded
    assert server.url == f"http://127.0.0.1:{server.port}/?token=secret"
    status, page, policy = answer(server, "/?token=secret")
    assert status == 200 and "<title>persistworld drive</title>" in page and "default-src 'none'" in policy
    assert "secret" not in page and not re.search(r"""(src|href)=["']?http""", page)
    for path in ("/", "/?token=wrong", "/?token=", "/ws", "/other"):
        assert answer(server, path)[0] == 401
    assert answer(server, "/other?token=secret")[0] == 404
    for query in ("", "token=wrong"):
        with pytest.raises(InvalidStatus, match="401"):
            dial(server, query)
    with dial(server) as socket:
        socket.send('{"do": "undo"}')
        assert [heard.get(), heard.get()] == [None, '{"do": "undo"}']


def test_other_origins_and_names_are_refused(guarded: tuple[DriveServer, SimpleQueue[str | None]]) -> None:
    server, heard = guarded
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{server.port}", "http://127.0.0.1:1"):
        with pytest.raises(InvalidStatus, match="403"):
            dial(server, Origin=origin)
        assert answer(server, "/?token=secret", Origin=origin)[0] == 403
    for host in ("evil.example", f"evil.example:{server.port}", "", "127.0.0.1.evil.example"):
        assert answer(server, "/?token=secret", Host=host)[0] == 403  # a name that resolves to loopback
    assert heard.empty()
    for host in (f"127.0.0.1:{server.port}", f"localhost:{server.port}"):
        assert answer(server, "/?token=secret", Host=host)[0] == 200
    with dial(server, Origin=f"http://127.0.0.1:{server.port}"):
        assert heard.get() is None and heard.empty()


def test_what_a_tab_may_send_is_bounded(guarded: tuple[DriveServer, SimpleQueue[str | None]]) -> None:
    server, _ = guarded
    with dial(server) as socket:
        socket.send("x" * 10_000)
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=10)
    wait_for(lambda: not server.send("nobody"), "the tab gone")
    with dial(server), dial(server) as second, pytest.raises(ConnectionClosed) as refused:
        second.recv(timeout=10)
    assert refused.value.rcvd is not None and refused.value.rcvd.code == 4001


def test_beyond_loopback_a_token_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="needs a token"):
        DriveServer("0.0.0.0", 0)
    with open_server("0.0.0.0", 0) as server:
        token = urlsplit(server.url).query.removeprefix("token=")
        assert len(token) >= 20 and server.url.startswith("http://127.0.0.1:")
        server.start(lambda _: None)
        assert answer(server, "/")[0] == 401 and answer(server, f"/?token={token}", Host="some.machine")[0] == 200
    monkeypatch.setenv("PERSISTWORLD_DRIVE_TOKEN", "mine")
    with open_server("127.0.0.1", 0) as server, pytest.raises(PersistWorldError, match="cannot listen on 127"):
        assert server.url.endswith("?token=mine")
        open_server("127.0.0.1", server.port)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--keys", "l", "--web"], "--keys and --web are different ways"),
        (["--live", "--port", "1"], "--port needs --web"),
        (["--token", "x"], "--token needs --web"),
        (["--live"], "--live needs a terminal, but standard input is not a terminal"),
        (["--keys", "lw"], "unknown key 'w' (character 2 of 'lw')"),
    ],
)
def test_mistakes_are_told_before_anything_starts(arguments: list[str], text: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["drive", *arguments, "--output", str(tmp_path / "out")])
    assert done.exit_code == 2 and text in done.stderr and "to do:" in done.stderr
    assert not list(tmp_path.iterdir())
