"""Small things of files: natural order of names, JSON written whole or not at all. No torch: workers import it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key under which digits count as numbers: '9' < '10', '0008' < '0011'; any two names compare."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts], name


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, renamed onto it at the end: a reader finds the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON beside and rename."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(data))
