"""`drive --web`: drive a session from a web page. The main thread computes; server threads only pass messages.

The page sends JSON: ``{"do": "key", "key": "l"}``, ``branch``, ``undo``, ``rewind`` and ``images`` (with ``step``),
``save`` (with ``kind``). It receives JSON with a ``type`` (hello, working, step, head, error), and binary messages: the
length of a JSON header (4 bytes, big-endian), the header, and a PNG or a file. A PNG is one frame, its views side by
side; it is lossless, so the page shows exactly the frames that `drive --keys` writes.

Shape legend: V cameras, H, W pixels.
"""

from __future__ import annotations

import json
import math
import secrets
import struct
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from persistworld_cli.config.keys import SESSION_KEYS, parse_action
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.interact.outputs import title, write_lerobot_zip, write_record, write_video
from persistworld_cli.interact.session import DriveSession, Step
from persistworld_cli.interact.web_server import DriveServer
from persistworld_cli.reports.videos import camera_names
from persistworld_cli.rollout.interactive import Images

_POLL_S = 0.5  # so that Ctrl-C takes effect while no message arrives
_MOVES = ("key", "branch", "undo", "rewind")
_MOST = 64  # waiting requests at most; a page sends one at a time
SAVES: dict[str, tuple[str, Callable[[DriveSession, Path], None]]] = {
    "mp4": ("drive.mp4", write_video),
    "json": ("drive.json", write_record),
    "lerobot": ("drive-lerobot.zip", write_lerobot_zip),
}


class Inbox:
    """A bounded queue of messages of a page: server threads add them, the computing thread takes them.

    At most one move waits: a newer one replaces it, so keys pressed during a step do not pile up. Requests for images
    and files wait in order and come first.
    """

    def __init__(self) -> None:
        self._questions: deque[dict[str, Any]] = deque()
        self._move: dict[str, Any] | None = None
        self._changed = threading.Condition()

    def put(self, message: dict[str, Any]) -> bool:
        """Add a message; False if too many requests wait already."""
        with self._changed:
            if message.get("do") in _MOVES:
                self._move = message
            elif len(self._questions) >= _MOST:
                return False
            else:
                self._questions.append(message)
            self._changed.notify()
            return True

    def take(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message; None after the timeout."""
        with self._changed:
            self._changed.wait_for(lambda: self._questions or self._move is not None, timeout_s)
            if self._questions:
                return self._questions.popleft()
            move, self._move = self._move, None
            return move


def drive_web(session: DriveSession, server: DriveServer, output: Path) -> None:
    """Serve a session until the process is interrupted; files that the page saves go into ``output``."""
    inbox = Inbox()

    def hear(message: str | None) -> None:
        if not inbox.put({"do": "hello"} if message is None else _read(message)):
            server.send(json.dumps({"type": "error", "text": "too many requests at once"}))

    host = _Host(session, server.send, output)
    with suppress(KeyboardInterrupt):
        server.start(hear)
        while True:
            if (message := inbox.take(_POLL_S)) is not None:
                host.do(message)


def _read(text: str) -> dict[str, Any]:
    """A page's message; a malformed one becomes {}, which is refused as an unknown message."""
    with suppress(ValueError, RecursionError):  # RecursionError: nested too deeply
        if isinstance(message := json.loads(text), dict):
            return message
    return {}


class _Host:
    """Carries out the messages of a page and reports to it."""

    def __init__(self, session: DriveSession, send: Callable[[str | bytes], bool], output: Path) -> None:
        self._session, self._send, self._output = session, send, output
        self._name = secrets.token_hex(8)  # a page that reconnects after a restart must drop its images

    def do(self, message: dict[str, Any]) -> None:
        """Carry out one message; errors are sent to the page."""
        what = message.get("do")
        try:
            if what == "hello":
                self._report(hello(self._session, self._name))
            elif what in ("key", "branch"):
                self._move(message)
            elif what == "undo":
                self._session.undo()
                self._send_head()
            elif what == "rewind":
                self._session.rewind(_whole(message, "step"))
                self._send_head()
            elif what == "images":
                self._show(self._session.find(_whole(message, "step")))
            elif what == "save":
                self._save(str(message.get("kind")))
            else:
                raise UsageError("unknown message")
        except PersistWorldError as error:
            self._report({"type": "error", "text": error.what, "fix": error.fix or ""})
            self._send_head()

    def _move(self, message: dict[str, Any]) -> None:
        """Compute the step of a key or a branch; send its frames one by one, then its numbers."""
        session, known = self._session, len(self._session.steps)
        self._report({"type": "working", "key": str(message.get("key", ""))})
        step = session.press(str(message.get("key"))) if message["do"] == "key" else session.branch()
        if len(session.steps) > known:
            self._show(step)
            self._report({"type": "step", "step": step_message(step)})
        self._send_head()

    def _show(self, step: Step) -> None:
        """Send all frames of a step."""
        for place, images in enumerate(step.images):
            header = {"type": "image", "step": step.number, "frame": place, "frames": len(step.images)}
            self._send(packed(header, png(images)))

    def _save(self, kind: str) -> None:
        """Write the path to the current step into the output folder, and send the file."""
        if kind not in SAVES:
            raise UsageError(f"cannot save as {kind!r}", fix=f"known: {', '.join(SAVES)}")
        name, write = SAVES[kind]
        path = self._output / name
        write(self._session, path)
        self._send(packed({"type": "file", "name": name, "path": str(path)}, path.read_bytes()))

    def _send_head(self) -> None:
        self._report({"type": "head", "head": self._session.head.number})

    def _report(self, event: dict[str, Any]) -> None:
        self._send(json.dumps(event, allow_nan=False))


def hello(session: DriveSession, name: str) -> dict[str, Any]:
    """Everything that a page needs when it connects, except images, which it requests; ``name`` is the session's."""
    settings, start = session.settings, session.start
    return {
        "type": "hello",
        "session": name,
        "title": title(session).partition(": ")[2],
        "instruction": start.text,
        "cameras": camera_names(settings),
        "height": int(session.head.images.shape[2]),
        "width": int(session.head.images.shape[3]),
        "rate": settings.world.rate_hz,
        "keys": [_key(key, action) for key, action in settings.drive.keys.items()],
        "session_keys": dict(SESSION_KEYS),
        "dimensions": [
            {"name": one.name, "unit": one.unit, "low": _finite(one.low), "high": _finite(one.high)}
            for one in session.keymap.dimensions
        ],
        "saves": list(SAVES),
        "steps": [step_message(step) for step in session.steps],
        "head": session.head.number,
    }


def _key(key: str, text: str) -> dict[str, str]:
    """A key, the number that it changes and how, and both in words."""
    action = parse_action(text)
    return {"key": key, "name": action.name, "way": ("=", "+", "-")[action.sign], "meaning": action.text}


def _finite(number: float) -> float | None:
    """A limit; None for none, since JSON has no infinity."""
    return number if math.isfinite(number) else None


def step_message(step: Step) -> dict[str, Any]:
    """A step without its images."""
    return {
        "number": step.number,
        "parent": step.parent,
        "depth": step.depth,
        "key": step.key,
        "branch": step.branch,
        "seconds": round(step.seconds, 4),
        "pose": [round(float(number), 5) for number in step.poses[-1]],
    }


def packed(header: dict[str, Any], body: bytes) -> bytes:
    """A binary message: header and body."""
    head = json.dumps(header).encode()
    return struct.pack(">I", len(head)) + head + body


def png(images: Images) -> bytes:
    """Views (V, H, W, 3) as one PNG (H, V W, 3)."""
    buffer = BytesIO()
    row = np.ascontiguousarray(images.swapaxes(0, 1)).reshape(images.shape[1], -1, 3)
    Image.fromarray(row).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _whole(message: dict[str, Any], key: str) -> int:
    """A whole number from a message. Raises UsageError."""
    value = message.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"'{key}' must be a whole number")
    return value
