"""A headless chromium driven by its DevTools protocol over a websocket: pages are tested by clicking through them."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60.0  # seconds; machines that run tests are busy
_KEYS = {"1": 49, "2": 50, "0": 48, " ": 32, "ArrowLeft": 37, "ArrowRight": 39, "Backspace": 8, "Enter": 13}


class Page:
    """One tab."""

    def __init__(self, socket: ClientConnection, folder: Path) -> None:
        self._socket, self._count, self._session = socket, 0, ""
        self.downloads = folder / "downloads"
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        self.size(1280, 800)

    def call(self, method: str, **params: Any) -> Any:
        """Send a command and wait for its answer; exceptions and errors of the page are kept in `errors`."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            got = json.loads(self._socket.recv(timeout=PATIENCE))
            if got.get("id") == self._count:
                assert "error" not in got, (method, got)
                return got["result"]
            if got.get("sessionId") != self._session:
                continue  # of a tab of an earlier test, whose server is gone
            if got.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(got["params"]["exceptionDetails"]))
            if got.get("method") == "Log.entryAdded" and got["params"]["entry"]["level"] == "error":
                self.errors.append(got["params"]["entry"]["text"])

    def size(self, width: int, height: int) -> None:
        """Bring the window to a size in pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, path: Path) -> None:
        """Load a file from disk and wait until it is there."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait(f"document.readyState === 'complete' && location.href.endsWith('{path.name}')")

    def js(self, expression: str) -> Any:
        """Value of a JavaScript expression."""
        got = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        wait_for(lambda: self.js(expression), expression)

    def key(self, key: str) -> None:
        """Press and release a key."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        code = {"key": key, "windowsVirtualKeyCode": _KEYS.get(key, 0)}
        self.call("Input.dispatchKeyEvent", type="keyDown", **code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def box(self, selector: str) -> dict[str, float]:
        """Where an element is: x, y, width, height."""
        found: dict[str, float] = self.js(
            f"(r => ({{x: r.x, y: r.y, width: r.width, height: r.height}}))"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        return found

    def click(self, selector: str) -> None:
        """Click the middle of an element with the mouse."""
        box = self.box(selector)
        assert box["width"] > 0, f"{selector} is not to be seen"
        where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **where)

    def image(self, path: Path | None = None) -> np.ndarray:
        """What is to be seen, uint8 (H, W, 3); also as a PNG file where a path is given."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        if path is not None:
            path.write_bytes(data)
        return np.asarray(Image.open(BytesIO(data)).convert("RGB"))

    def colour(self, selector: str) -> tuple[int, int, int]:
        """Mean colour that is to be seen in the middle of an element."""
        box, shown = self.box(selector), self.image()
        x, y = int(box["x"] + box["width"] / 2), int(box["y"] + box["height"] / 2)
        red, green, blue = shown[y - 4 : y + 4, x - 4 : x + 4].reshape(-1, 3).mean(axis=0)
        return int(red), int(green), int(blue)


def wait_for(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Wait until something is so, at most so many seconds."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited in vain: {what}")


def _address(profile: Path) -> str | None:
    """Where a browser listens, once it has written it down."""
    place = profile / "DevToolsActivePort"
    lines = place.read_text().split() if place.exists() else []
    return f"ws://127.0.0.1:{lines[0]}{lines[1]}" if len(lines) == 2 else None


@contextmanager
def chromium(folder: Path) -> Iterator[Callable[[], Page]]:
    """Start a browser with a profile under ``folder``; gives a function that opens a tab. Skips where there is none."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser here ({', '.join(NAMES)}): the page is not clicked through")
    profile = folder / "profile"
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--mute-audio",
    ]
    process = subprocess.Popen(
        [program, *flags, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = wait_for(lambda: _address(profile), "the browser's port")
        # Between tests nobody reads the browser's events: the queue fills, no pong is seen, and pings would give up.
        with connect(address, max_size=None, ping_interval=None) as socket:
            yield lambda: Page(socket, folder)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
