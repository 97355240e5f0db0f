"""Record the driving page in a browser, in real time, as a looped animation.

`python -m benchmarks.driving_page docs/driving.webp [--keys llluuff] [OPTIONS OF persistworld drive]`

Starts `persistworld drive --web`, opens its page in a headless chromium, presses a key whenever the last step has been
played, and keeps what is to be seen with the time it was seen. Prints the seconds from a key to its last frame.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from persistworld_cli.reports.animation import HOLD_MS, save_animation
from tests.helpers.browser import Page, chromium

LAST = "(d => d.state === 'ready' && d.shown.startsWith(d.head + '.') && d.head === '%d' && d.shown.endsWith('.%d'))"
SHOWN = "[document.body.dataset.state, document.body.dataset.shown]"
PAUSE = 0.02  # s between two looks
SIZE = (900, 620)  # of the window
WIDTH = 720  # of the animation


def address(process: subprocess.Popen[str]) -> str:
    """The page's address, from the command's messages; they are read on in the background.

    Raises:
        SystemExit: the command ended without one.
    """
    assert process.stderr
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+/\S*", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return found[0]
    raise SystemExit("".join([*said, "persistworld drive ended without an address"]))


def drive(page: Page, keys: str, fresh: int) -> tuple[list[np.ndarray], list[float], list[float]]:
    """Press keys; what was seen, when (seconds), and how long each step took from the key to its last frame.

    An image is taken when the page changes: more of them would take the processor from the model.
    """
    seen, when, steps = [page.image()], [time.monotonic()], []
    shown = page.js(SHOWN)
    for number, key in enumerate(keys, 1):
        began = time.monotonic()
        page.key(key)
        done = False
        while not done:
            time.sleep(PAUSE)
            done = bool(page.js(f"{LAST % (number, fresh - 1)}(document.body.dataset)"))
            if (now := page.js(SHOWN)) != shown:
                seen.append(page.image())
                when.append(time.monotonic())
                shown = now
        steps.append(time.monotonic() - began)
    return seen, when, steps


def smaller(image: np.ndarray) -> np.ndarray:
    """An image at the animation's width."""
    height = round(image.shape[0] * WIDTH / image.shape[1])
    return np.asarray(Image.fromarray(image).resize((WIDTH, height), Image.Resampling.LANCZOS))


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a .webp or .gif")
    parser.add_argument("--keys", default="lllfffuu")
    parser.add_argument("--frames", type=int, default=4, help="new frames of a step")
    options, more = parser.parse_known_args()
    command = [sys.executable, "-m", "persistworld_cli", "drive", "--web", *more]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--output", f"{folder}/out"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            url = address(process)
            with chromium(Path(folder)) as new_page:
                page = new_page()
                page.size(*SIZE)
                page.call("Page.navigate", url=url)
                page.wait("document.body?.dataset.state === 'ready' && document.body.dataset.shown !== undefined")
                seen, when, steps = drive(page, options.keys, options.frames)
        finally:
            process.terminate()
            process.wait()
    shown = [*np.diff(when), HOLD_MS / 1000]
    save_animation(options.out, [smaller(image) for image in seen], [max(20, round(1000 * one)) for one in shown])
    print(f"{len(steps)} steps, seconds from key to last frame: median {statistics.median(steps):.2f}", end=", ")
    print(f"{min(steps):.2f} to {max(steps):.2f}; {options.out}: {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
