"""Progress and report (``extract_report.json``) of an extraction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from persistworld_cli.files import write_json
from persistworld_cli.read_files import read_json, reading

_NAME = "extract_report.json"


@dataclass
class ExtractReport:
    """Result of every episode, and times."""

    done: list[str] = field(default_factory=list)  # ids, as in the other lists
    skipped: list[str] = field(default_factory=list)  # already there
    failed: list[dict[str, str]] = field(default_factory=list)  # {episode, reason}
    without_instruction: list[str] = field(default_factory=list)  # done, but none is recorded
    other_fps: dict[str, float] = field(default_factory=dict)  # done, by timestamps that give another rate
    absent: int = 0  # named by the raw metadata but not on disk: normal for a part of a dataset
    absent_ids: str = ""  # their ids, as 12:95,99
    wall_s: float = 0.0  # from when the encoder was ready until the last episode was in place
    waited_s: float = 0.0  # of which the encoder was idle
    frames: int = 0  # encoded, of all cameras at once

    @classmethod
    def read(cls, path: Path) -> ExtractReport:
        """Read what `write` wrote. Raises PersistWorldError if it is damaged."""
        what = "unreadable report of an extraction"
        with reading(what, path):
            return cls(**read_json(path, what))

    def write(self, path: Path) -> None:
        """Write to a file of `path_of`."""
        for ids in (self.done, self.skipped, self.without_instruction):
            ids.sort(key=int)
        self.failed.sort(key=lambda failure: int(failure["episode"]))
        write_json(path, self)


def path_of(out: Path, rank: int | None = None, run: str = "") -> Path:
    """``<out>/extract_report.json``; with a rank, where that process of the run writes its part."""
    return out / (_NAME if rank is None else f".extract_report.{run}.{rank}.json")


def merge_reports(out: Path, world_size: int, run: str) -> ExtractReport:
    """The reports of a run's ``world_size`` finished processes as one; times are means."""
    merged = ExtractReport()
    for rank in range(world_size):
        part = ExtractReport.read(path_of(out, rank, run))
        for name in ("done", "skipped", "failed", "without_instruction"):
            getattr(merged, name).extend(getattr(part, name))
        merged.other_fps |= part.other_fps
        merged.absent, merged.absent_ids = part.absent, part.absent_ids
        merged.wall_s += part.wall_s / world_size
        merged.waited_s += part.waited_s / world_size
        merged.frames += part.frames
    return merged


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as ``--episodes`` takes them: 1, 2, 3, 7 is ``1:4,7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1]:
            parts[-1][1] += 1
        else:
            parts.append([number, number + 1])
    return ",".join(str(first) if end == first + 1 else f"{first}:{end}" for first, end in parts)
