"""The ledger of measurements: rows in a JSON file, and the same rows as a Markdown table beside it.

A row holds the measurement, its spread over the repeats, the command, the commit, the machine, and the load at the
start (numbers measured beside other work are unreliable). Machines are identified only by their processors and their
number.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from persistworld_cli.command_line import commit
from persistworld_cli.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
LEDGER = ROOT / "benchmarks" / "ledger.json"
NOT_MEASURED = "not measured"
_LIBRARIES = ("torch", "diffusers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number.

    Attributes:
        what: is measured, in words.
        value: the middle of the repeats; None: not measured, and ``why``.
        low, high: the smallest and the largest of them; None where there was one.
        unit: ``ratio``, ``s``, ...
        n: repeats.
        why: it was not measured.
        limit: the largest value of a check that passes.
        detail: what belongs to the number, in words.
    """

    what: str
    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    n: int = 0
    why: str = ""
    limit: float | None = None
    detail: str = ""

    @property
    def fails(self) -> bool:
        """Whether it is a check that does not pass, or was not made."""
        return self.limit is not None and not (self.value is not None and self.value <= self.limit)


def entry(row: Row, benchmark: str, command: str, load: float, accelerator: str = "") -> dict[str, Any]:
    """A row as the ledger keeps it."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "benchmark": benchmark,
        **asdict(row),
        "command": command,
        "commit": commit("benchmarks/ledger.*") or "unknown",
        "machine": machine() | ({"accelerator": accelerator} if accelerator else {}),
        "load": round(load, 2),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
    }


def machine() -> dict[str, Any]:
    """The processor's name and how many of its cores there are for this process."""
    names = [line for line in _cpuinfo().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": name, "cores": cores}


def append(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Add to the ledger and render it again; why something was not measured is replaced by what comes next."""
    kept = load(path)
    for new in entries:
        key = new["benchmark"], new["what"]
        kept = [old for old in kept if (old["benchmark"], old["what"]) != key or old["value"] is not None]
        kept.append(dict(new))
    write_json(path, kept)
    write_text(path.with_suffix(".md"), render(kept))


def load(path: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """The ledger as Markdown: newest last, the commands below."""
    lines = [
        "# Ledger",
        "",
        "Written by `python -m benchmarks`, not by hand. A number is the median of n repeats (smallest .. largest).",
        "Load is that of the minute before: well above 0, it was measured beside other work, and says little.",
        "",
        "| date | benchmark | what | number | n | machine | load | commit | torch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        on = f"{row['machine']['cores']} x {row['machine']['cpu']}"
        on += f", {row['machine']['accelerator']}" if "accelerator" in row["machine"] else ""
        cells = (row["date"], row["benchmark"], row["what"], shown(row), row["n"] or "-", on, row["load"])
        lines.append("| " + " | ".join(map(str, (*cells, row["commit"], row["versions"]["torch"]))) + " |")
    commands = {row["benchmark"]: row["command"] for row in rows}
    return "\n".join([*lines, "", *(f"- {name}: `{command}`" for name, command in commands.items()), ""])


def shown(row: Mapping[str, Any]) -> str:
    """``0.52 (0.50 .. 0.55)`` with the unit, whether a check passes, and details; or why there is no number."""
    if row["value"] is None:
        return f"{NOT_MEASURED}: {row['why']}"
    text = f"{row['value']:.4g}"
    if row["low"] is not None:
        text += f" ({row['low']:.4g} .. {row['high']:.4g})"
    if row["unit"] not in ("ratio", ""):
        text += f" {row['unit']}"
    if (limit := row.get("limit")) is not None:
        text += f", passes (at most {limit:.2g})" if row["value"] <= limit else f", FAILS (more than {limit:.2g})"
    return text + (f"; {row['detail']}" if row.get("detail") else "")


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""
