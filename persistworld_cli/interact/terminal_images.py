"""Images in a terminal: Kitty's and iTerm2's protocols, sixels, or half-blocks in 24-bit or 256 colours.

Shape legend: H, W pixels of the image (H, W, 3) uint8; a terminal cell is about twice as high as wide.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

CELL = (20, 10)  # assumed pixels (height, width) of a cell; only sixels need them
_KITTY_CHUNK = 4096  # bytes of base64 that Kitty's protocol allows in one sequence
_SIXEL_COLOURS = 128


def find_protocol(setting: str, env: Mapping[str, str]) -> str:
    """``drive.display``, or for ``auto`` from the environment (tmux and screen pass on no images)."""
    if setting != "auto":
        return setting
    term, program = env.get("TERM", ""), env.get("TERM_PROGRAM", "")
    inside = "TMUX" in env or term.startswith(("screen", "tmux"))
    if not inside:
        if term == "xterm-kitty" or "KITTY_WINDOW_ID" in env or program == "ghostty":
            return "kitty"
        if program in ("iTerm.app", "WezTerm") or env.get("LC_TERMINAL") == "iTerm2":
            return "iterm"
        if term.startswith(("foot", "mlterm", "yaft")) or "sixel" in term:
            return "sixel"
    if term in ("", "dumb"):
        return "none"
    return "blocks" if env.get("COLORTERM", "") in ("truecolor", "24bit") else "blocks-256"


def fit(height: int, width: int, lines: int, columns: int) -> tuple[int, int]:
    """Lines and columns of the largest image of that shape that fits in the given lines and columns."""
    scale = min(columns / width, 2 * lines / height)
    return max(1, int(height * scale / 2)), max(1, int(width * scale))


def draw(protocol: str, image: Pixels, lines: int, columns: int) -> str:
    """The text that shows an image (H, W, 3) in the given lines and columns at the cursor; "" for ``none``."""
    if protocol == "none":
        return ""
    return _DRAWERS[protocol](image, lines, columns)


def _resized(image: Pixels, height: int, width: int) -> Image.Image:
    return Image.fromarray(image).resize((width, height), Image.Resampling.BOX)


def _png(image: Pixels) -> str:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _kitty(image: Pixels, lines: int, columns: int) -> str:
    """Image 1, replaced each time. q=2 asks for no reply, since it would mix with typed keys."""
    data = _png(image)
    parts = [data[i : i + _KITTY_CHUNK] for i in range(0, len(data), _KITTY_CHUNK)]
    head = f"a=T,f=100,i=1,p=1,q=2,C=1,c={columns},r={lines},"
    return "".join(
        f"\x1b_G{head if i == 0 else ''}m={int(i < len(parts) - 1)};{part}\x1b\\" for i, part in enumerate(parts)
    )


def _iterm(image: Pixels, lines: int, columns: int) -> str:
    options = f"inline=1;width={columns};height={lines};preserveAspectRatio=1;doNotMoveCursor=1"
    return f"\x1b]1337;File={options}:{_png(image)}\x07"


def _sixel(image: Pixels, lines: int, columns: int) -> str:
    """Bands of six rows; each band has a line of run lengths per colour."""
    h, w = lines * CELL[0] // 6 * 6, columns * CELL[1]
    reduced = _resized(image, max(6, h), w).quantize(_SIXEL_COLOURS)
    palette = np.asarray(reduced.getpalette(), dtype=int).reshape(-1, 3)
    index = np.asarray(reduced)
    out = [f'\x1bPq"1;1;{w};{len(index)}']
    out += [f"#{i};2;{r * 100 // 255};{g * 100 // 255};{b * 100 // 255}" for i, (r, g, b) in enumerate(palette)]
    weights = (1 << np.arange(6))[:, None]
    for top in range(0, len(index), 6):
        band = index[top : top + 6]
        rows = [
            f"#{colour}" + _runs("".join(map(chr, 63 + ((band == colour) * weights).sum(axis=0))))
            for colour in np.unique(band)
        ]
        out.append("$".join(rows) + "-")
    return "".join(out) + "\x1b\\"


def _runs(text: str) -> str:
    """Sixel's run lengths: four or more equal characters become ``!4?``."""
    return re.sub(r"(.)\1{3,}", lambda run: f"!{len(run[0])}{run[1]}", text, flags=re.DOTALL)


def _blocks(paint: Callable[[NDArray[np.int64], int], str]) -> Callable[[Pixels, int, int], str]:
    """Half-blocks: a cell shows two pixels, the upper in its foreground and the lower in its background colour."""

    def drawn(image: Pixels, lines: int, columns: int) -> str:
        pixels = np.asarray(_resized(image, 2 * lines, columns)).astype(int)
        rows = []
        for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
            cells, last = [], ""
            for ink, paper in zip(upper, lower, strict=True):
                colours = paint(ink, 38) + paint(paper, 48)
                cells.append(("" if colours == last else colours) + "▀")
                last = colours
            rows.append("".join(cells) + "\x1b[0m")
        return "\r\n".join(rows)

    return drawn


def _true_colour(rgb: NDArray[np.int64], ground: int) -> str:
    return f"\x1b[{ground};2;{rgb[0]};{rgb[1]};{rgb[2]}m"


def _colour_256(rgb: NDArray[np.int64], ground: int) -> str:
    """xterm's 6x6x6 cube, whose levels are 0, 95, 135, ... 255; its 24 greys where the colour is nearly grey."""
    if rgb.max() - rgb.min() < 12:
        code = 232 + min(23, max(0, round((int(rgb.mean()) - 8) / 10)))
    else:
        red, green, blue = (0 if c < 48 else 1 if c < 115 else (int(c) - 35) // 40 for c in rgb)
        code = 16 + 36 * red + 6 * green + blue
    return f"\x1b[{ground};5;{code}m"


_DRAWERS: Mapping[str, Callable[[Pixels, int, int], str]] = {
    "kitty": _kitty,
    "iterm": _iterm,
    "sixel": _sixel,
    "blocks": _blocks(_true_colour),
    "blocks-256": _blocks(_colour_256),
}
