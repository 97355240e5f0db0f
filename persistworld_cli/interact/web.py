"""`drive --web`: a session driven from a page. The main thread computes; the server's threads only carry messages.

From the page come JSON texts: ``{"do": "key", "key": "l"}``, ``branch``, ``undo``, ``rewind`` and ``images`` (with
``step``), ``save`` (with ``kind``). To the page go JSON texts with a ``type`` (hello, working, step, head, error), and
binary messages: the length of a JSON header (4 bytes, big-endian), the header, and a PNG or a file. A PNG is one frame,
its views side by side: without loss, so that the page shows the very frames that `drive --keys` writes.

Shape legend: V cameras, H, W pixels.
"""

from __future__ import annotations

import json
import secrets
import struct
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from persistworld_cli.config.keys import ACTIONS, SESSION_KEYS
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.interact.command_queue import Desk
from persistworld_cli.interact.outputs import title, write_lerobot_zip, write_record, write_video
from persistworld_cli.interact.session import DriveSession, Step
from persistworld_cli.interact.web_server import DriveServer
from persistworld_cli.rollout.interactive import Images

_LOOK_EVERY_S = 0.5  # so that Ctrl-C arrives while nobody drives
SAVES: dict[str, tuple[str, Callable[[DriveSession, Path], None]]] = {
    "mp4": ("drive.mp4", write_video),
    "json": ("drive.json", write_record),
    "lerobot": ("drive-lerobot.zip", write_lerobot_zip),
}


def drive_web(session: DriveSession, server: DriveServer, output: Path) -> None:
    """Serve a session until the process is interrupted.

    Args:
        session: at its start, or wherever it is.
        server: not started yet.
        output: where the page's files are saved.
    """
    desk = Desk()

    def hear(message: str | None) -> None:
        if message is None:
            desk.put({"do": "hello"})
        elif not desk.put(_read(message)):
            server.send(json.dumps({"type": "error", "text": "too much is asked at once"}))

    host = _Host(session, server.send, output)
    with suppress(KeyboardInterrupt):
        server.start(hear)
        while True:
            message = desk.take(_LOOK_EVERY_S)
            if message is not None:
                host.do(message)


def _read(text: str) -> dict[str, Any]:
    """A page's message as a map; what is none becomes one that means nothing."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: nested deep
        message = None
    return message if isinstance(message, dict) else {"do": "nothing"}


class _Host:
    """Does what a page asks, and tells it what happened."""

    def __init__(self, session: DriveSession, send: Callable[[str | bytes], bool], output: Path) -> None:
        self._session, self._send, self._output = session, send, output
        self._name = secrets.token_hex(8)  # a page that comes back after a restart must forget its images

    def do(self, message: dict[str, Any]) -> None:
        """One message; mistakes are told to the page."""
        what = message.get("do")
        try:
            if what == "hello":
                self._tell(hello(self._session, self._name))
            elif what in ("key", "branch"):
                self._move(message)
            elif what == "undo":
                self._session.undo()
                self._tell_head()
            elif what == "rewind":
                self._session.rewind(_whole(message, "step"))
                self._tell_head()
            elif what == "images":
                self._show(self._find(_whole(message, "step")))
            elif what == "save":
                self._save(str(message.get("kind")))
            else:
                raise UsageError("a message that means nothing")
        except PersistWorldError as error:
            self._tell({"type": "error", "text": error.what, "fix": error.fix or ""})
            self._tell_head()

    def _move(self, message: dict[str, Any]) -> None:
        """A key or a branch: a step, whose frames are sent one by one before what is known of it."""
        session, known = self._session, len(self._session.steps)
        self._tell({"type": "working", "key": str(message.get("key", ""))})
        step = session.press(str(message.get("key"))) if message["do"] == "key" else session.branch()
        if len(session.steps) > known:
            self._show(step)
            self._tell({"type": "step", "step": told(step)})
        self._tell_head()

    def _find(self, number: int) -> Step:
        """A step of the tree, wherever the session stands."""
        if not 0 <= number < len(self._session.steps):
            raise UsageError(f"there is no step {number}")
        return self._session.steps[number]

    def _show(self, step: Step) -> None:
        """All frames of a step."""
        for place, images in enumerate(step.images):
            header = {"type": "image", "step": step.number, "frame": place, "frames": len(step.images)}
            self._send(packed(header, png(images)))

    def _save(self, kind: str) -> None:
        """Write the way to where the session stands into the output folder, and send the file."""
        if kind not in SAVES:
            raise UsageError(f"cannot save as {kind!r}", fix=f"known: {', '.join(SAVES)}")
        name, write = SAVES[kind]
        path = self._output / name
        write(self._session, path)
        self._send(packed({"type": "file", "name": name, "path": str(path)}, path.read_bytes()))

    def _tell_head(self) -> None:
        self._tell({"type": "head", "head": self._session.head.number})

    def _tell(self, event: dict[str, Any]) -> None:
        self._send(json.dumps(event, allow_nan=False))


def hello(session: DriveSession, name: str) -> dict[str, Any]:
    """All that a page needs to know when it comes, but the images, which it asks for. ``name``: the session's own."""
    settings, start = session.settings, session.start
    return {
        "type": "hello",
        "session": name,
        "title": title(session).partition(": ")[2],
        "instruction": start.text,
        "cameras": [name.replace("_", " ") for name in settings.world.cameras],
        "height": int(session.head.images.shape[2]),
        "width": int(session.head.images.shape[3]),
        "rate": settings.world.rate_hz,
        "keys": [{"key": k, "action": a, "meaning": ACTIONS[a]} for k, a in settings.drive.keys.items()],
        "session_keys": dict(SESSION_KEYS),
        "low": list(settings.drive.workspace_low),
        "high": list(settings.drive.workspace_high),
        "saves": list(SAVES),
        "steps": [told(step) for step in session.steps],
        "head": session.head.number,
    }


def told(step: Step) -> dict[str, Any]:
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
    """A whole number of a message. Raises UsageError."""
    value = message.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"'{key}' must be a whole number")
    return value
