"""Where the reference's numbers lie, and how `tests/golden` writes names down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SHIPPED = Path(__file__).resolve().parents[1] / "golden"


class GoldenFiles:
    """``golden / "name"``: a reference file, shipped in `tests/golden` or lying beside the checkout; else a skip."""

    def __init__(self, beside: Path) -> None:
        self._beside = beside

    def __truediv__(self, name: str) -> Path:
        for path in (SHIPPED / name, self._beside / name):
            if path.is_file():
                return path
        pytest.skip(f"{name} is too large to ship and not in {self._beside}")


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested dictionaries, in order."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
