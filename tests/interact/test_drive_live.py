"""`drive --live` in a real pseudo-terminal, and images in the languages of terminals."""

from __future__ import annotations

import base64
import fcntl
import os
import re
import select
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drive_world import arm_world, drive_command, drive_settings, pseudo_terminal, session
from PIL import Image

from persistworld_cli.config.requests import DriveRequest
from persistworld_cli.interact import drive
from persistworld_cli.interact.live import arrange, drive_live, mosaic
from persistworld_cli.interact.terminal import LEAVE
from persistworld_cli.interact.terminal_images import draw, find_protocol, fit
from persistworld_cli.launch.terminal import keep_terminal


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return arm_world(tmp_path_factory.mktemp("live"))


class Watched:
    """The person's side of a terminal: what was shown, and keys; to be left before the terminal is closed.

    A reader that outlived its terminal would read on from whatever file is next given the same number.
    """

    def __init__(self, person: int) -> None:
        self._person, self.shown, self._closed = person, b"", False
        self._answers: list[tuple[bytes, bytes]] = []
        self._news = threading.Condition()
        self._leave, self._left = os.pipe()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._left, b"x")
        self._thread.join()
        os.close(self._leave)
        os.close(self._left)

    def _read(self) -> None:
        while self._person in select.select([self._person, self._leave], [], [])[0]:
            try:
                data = os.read(self._person, 65536)
            except OSError:  # nobody has the program's side open
                data = b""
            with self._news:
                self.shown += data
                self._closed = not data
                self._press()
                self._news.notify_all()
            if not data:
                return

    def _press(self) -> None:
        while self._answers and self._answers[0][0] in self.shown:
            os.write(self._person, self._answers.pop(0)[1])

    def answer(self, shown: str, keys: str) -> None:
        """Press keys as soon as a text is shown, for a program that runs in this thread."""
        with self._news:
            self._answers.append((shown.encode(), keys.encode()))
            self._press()

    def wait(self, text: str, after: int = 0) -> None:
        """Wait until a text is shown after so many bytes."""
        with self._news:
            self._news.wait_for(lambda: text.encode() in self.shown[after:] or self._closed)
            assert text.encode() in self.shown[after:], f"waited in vain: {text}"

    def type(self, keys: str, then: str = "") -> None:
        """Press keys; wait until a text is shown that was not there before."""
        before = len(self.shown)
        os.write(self._person, keys.encode())
        if then:
            self.wait(then, before)


def modes(terminal: int) -> list[Any]:
    return termios.tcgetattr(terminal)


def drive_by_hand(watched: Watched, process: subprocess.Popen[bytes], changed: Callable[[], bool]) -> bytes:
    """Press keys as a person would and end with Ctrl-C; what the command then printed."""
    watched.wait("press a key")
    assert changed()
    watched.type("l", "Hleft (-y)\x1b[K")
    watched.type("\x1b[D7", "key '7' does nothing here")  # an arrow is no d
    watched.type("x", "branch 1")
    watched.type("z", "undone")
    watched.type("zz", "no step to undo")
    watched.type("lc", "Hclose (gripper=0.7)\x1b[K")  # typed ahead
    watched.wait("gripper +0.700")
    watched.type("\x03")
    return process.communicate()[0]


def test_the_command_drives_in_a_terminal_and_leaves_it_as_it_was(root: Path, tmp_path: Path) -> None:
    command, environment = drive_command(root, "--live", "--seed", "3", "--output", str(tmp_path / "live"))
    environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    with pseudo_terminal() as (person, program):
        before = modes(program)
        with subprocess.Popen(
            command,
            stdin=program,
            stdout=subprocess.PIPE,
            stderr=program,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
        ) as process:
            try:
                with Watched(person) as watched:
                    out = drive_by_hand(watched, process, lambda: modes(program) != before)
            finally:
                process.kill()
        assert process.returncode == 0 and modes(program) == before
    screen = watched.shown.decode()
    assert screen.count("\x1b[?1049h") == 1 and LEAVE in screen
    assert (
        "\x1b[38;2;" in screen
        and "▀" in screen
        and "x +" in screen
        and re.search(r"time of the step \d+\.\d\d s", screen)
    )
    assert "drive.mp4" in out.decode() and "\x1b[38;2" not in out.decode()
    result = drive.run(drive_settings(root, seed=3), DriveRequest(keys="lc", output=tmp_path / "keys"))
    for name in ("drive.mp4", "drive.json"):
        assert (tmp_path / "live" / name).stat().st_size > 100
    assert (tmp_path / "live" / "drive.png").read_bytes() == Path(result["sheet"]).read_bytes()  # the same frames


@contextmanager
def own_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Watched, int]]:
    """A terminal in the place of this process's (no fixture: pytest puts its own back before a test begins)."""
    with (
        pseudo_terminal() as (person, program),
        os.fdopen(os.dup(program)) as stdin,
        os.fdopen(os.dup(program), "w") as stderr,
        monkeypatch.context() as patched,
        Watched(person) as watched,
    ):
        patched.setattr(sys, "stdin", stdin)
        patched.setattr(sys, "stderr", stderr)
        yield watched, program


@pytest.mark.parametrize("end", ["q", "\x04"])
def test_q_and_end_of_input_quit(root: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    here = session(root)
    with own_terminal(monkeypatch) as (watched, program):
        before = modes(program)
        watched.answer("press a key", end)
        drive_live(here)
        assert here.head.number == 0 and modes(program) == before
        watched.wait(LEAVE)
    assert b"step 0" in watched.shown and "▀".encode() not in watched.shown


def test_the_terminal_is_put_back_for_a_worker_that_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    with own_terminal(monkeypatch) as (watched, program):
        before = modes(program)
        with keep_terminal():
            changed = modes(program)
            changed[3] &= ~(termios.ICANON | termios.ECHO)
            termios.tcsetattr(program, termios.TCSANOW, changed)
        assert modes(program) == before
        watched.wait("\x1b[?25h")


# -- images ---------------------------------------------------------------------------------------------------------

IMAGE = np.zeros((12, 20, 3), np.uint8)
IMAGE[:, :10], IMAGE[:, 10:] = (200, 30, 10), (20, 40, 220)


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app", "COLORTERM": "truecolor"}, "iterm"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "screen-256color", "TMUX": "/x", "KITTY_WINDOW_ID": "1"}, "blocks-256"),
        ({"TERM": "tmux-256color", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "xterm-256color", "COLORTERM": "24bit"}, "blocks"),
        ({"TERM": "xterm"}, "blocks-256"),
        ({"TERM": "dumb"}, "none"),
        ({}, "none"),
    ],
)
def test_the_environment_tells_what_a_terminal_can_show(environment: dict[str, str], protocol: str) -> None:
    assert find_protocol("auto", environment) == protocol
    assert find_protocol("sixel", environment) == "sixel"  # the preset's word


def test_kitty_and_iterm_get_the_image_whole() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)  # more than one chunk
    text = draw("kitty", noise, 6, 20)
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert len(parts) > 1 and max(len(data) for _, data in parts) <= 4096
    assert "q=2" in parts[0][0] and "c=20,r=6" in parts[0][0]
    assert [control[-3:] for control, _ in parts] == ["m=1"] * (len(parts) - 1) + ["m=0"] or parts[-1][0] == "m=0"
    inline = re.fullmatch(r"\x1b\]1337;File=([^:]*):([^\x07]*)\x07", draw("iterm", noise, 6, 20))
    assert inline and "width=20;height=6" in inline[1]
    for data in ("".join(data for _, data in parts), inline[2]):
        assert np.array_equal(np.asarray(Image.open(BytesIO(base64.b64decode(data)))), noise)


def test_sixels_paint_the_image() -> None:
    text = draw("sixel", IMAGE, 3, 5)
    head, body = re.fullmatch(r'\x1bPq"1;1;(\d+;\d+)((?:.|\n)*)\x1b\\', text).groups()  # type: ignore[union-attr]
    wide, high = map(int, head.split(";"))
    assert (wide, high) == (50, 60)
    colours = {int(i): tuple(map(int, rgb)) for i, *rgb in re.findall(r"#(\d+);2;(\d+);(\d+);(\d+)", body)}
    canvas = np.full((high, wide), -1)
    bands = re.sub(r"#\d+;2;\d+;\d+;\d+", "", body).split("-")[:-1]
    for top, band in enumerate(bands):
        for row in band.split("$"):
            colour, column = re.match(r"#(\d+)", row)[1], 0  # type: ignore[index]
            for count, sixel in re.findall(r"(?:!(\d+))?([?-~])", row[1 + len(colour) :]):
                bits = ord(sixel) - 63
                for line in range(6):
                    if bits >> line & 1:
                        canvas[6 * top + line, column : column + int(count or 1)] = int(colour)
                column += int(count or 1)
            assert column == wide
    assert canvas.min() >= 0
    assert np.allclose(colours[int(canvas[30, 5])], np.array(IMAGE[0, 0]) / 2.55, atol=3)
    assert np.allclose(colours[int(canvas[30, 45])], np.array(IMAGE[0, -1]) / 2.55, atol=3)


def test_half_blocks_show_two_pixels_a_cell() -> None:
    rows = draw("blocks", IMAGE, 3, 10).split("\r\n")
    assert len(rows) == 3 and all(row.count("▀") == 10 and row.endswith("\x1b[0m") for row in rows)
    assert "\x1b[38;2;200;30;10m\x1b[48;2;200;30;10m" in rows[0] and rows[0].count("\x1b[38") == 2  # where it changes
    few = draw("blocks-256", IMAGE, 3, 10)
    assert "\x1b[38;5;160m" in few and "\x1b[38;5;20m" in few  # (215, 0, 0) and (0, 0, 215) of the cube
    grey = draw("blocks-256", np.full((4, 4, 3), 128, np.uint8), 2, 4)
    assert "\x1b[38;5;244m" in grey
    assert draw("none", IMAGE, 3, 10) == ""


def test_views_are_laid_out_as_large_as_the_screen_allows() -> None:
    views = np.stack([np.full((48, 80, 3), shade, np.uint8) for shade in (50, 100, 150)])
    assert fit(48, 80, 100, 80) == (24, 80) and fit(48, 80, 12, 80) == (12, 40)
    whole, high, wide = arrange(views, 12, 120)
    assert whole.shape == (48, 244, 3) and high <= 12 and wide <= 120
    assert arrange(views, 30, 100)[0].shape == (98, 162, 3)
    assert arrange(views, 60, 40)[0].shape == (148, 80, 3)
    two = mosaic(views, 2)
    assert two[10, 10, 0] == 50 and two[10, 100, 0] == 100 and two[60, 10, 0] == 150 and two[60, 100, 0] == 0
