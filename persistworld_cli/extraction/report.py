"""What an extraction tells of its episodes: while it runs, and in ``extract_report.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from persistworld_cli.data.clips.store import write_json
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.read_files import read_json, reading

_NAME = "extract_report.json"


@dataclass
class ExtractReport:
    """What became of the episodes, and how the time went."""

    done: list[str] = field(default_factory=list)  # ids, as all of these
    skipped: list[str] = field(default_factory=list)  # already there
    failed: list[dict[str, str]] = field(default_factory=list)  # {episode, reason}
    untold: list[str] = field(default_factory=list)  # done, but no instruction is recorded
    absent: int = 0  # named by the raw metadata but not on disk: normal for a part of a dataset
    absent_ids: str = ""  # which, as 12:95,99
    wall_s: float = 0.0  # from when the encoder was ready until the last episode was in place
    waited_s: float = 0.0  # of which the encoder stood still
    frames: int = 0  # encoded, of all cameras at once

    def fail(self, index: int, error: PersistWorldError) -> None:
        """Name a bad episode with its reason."""
        where = f" ({error.where})" if error.where else ""
        self.failed.append({"episode": str(index), "reason": f"{error.what}{where}"})

    @classmethod
    def read(cls, out: Path, rank: int = 0, world_size: int = 1) -> ExtractReport:
        """What `write` wrote. Raises PersistWorldError where it is damaged."""
        path, what = path_of(out, rank, world_size), "unreadable report of an extraction"
        with reading(what, path):
            return cls(**read_json(path, what))

    def write(self, out: Path, rank: int = 0, world_size: int = 1) -> None:
        """As ``<out>/extract_report.json``; of several processes, each writes one of its own."""
        for ids in (self.done, self.skipped, self.untold):
            ids.sort(key=int)
        self.failed.sort(key=lambda failure: int(failure["episode"]))
        write_json(path_of(out, rank, world_size), asdict(self))


@dataclass(frozen=True)
class Progress:
    """Sent after every episode: how many of this process's episodes are settled, of how many, and the last one."""

    settled: int
    total: int
    episode: str
    outcome: str  # done | failed
    waited: float  # share of the time so far in which the encoder stood still


def path_of(out: Path, rank: int = 0, world_size: int = 1) -> Path:
    """Where a process writes its report."""
    return out / (_NAME if world_size == 1 else f"extract_report.{rank}.json")


def merge_reports(out: Path, world_size: int) -> ExtractReport:
    """Join the reports of ``world_size`` finished processes into ``<out>/extract_report.json``; times are means."""
    merged = ExtractReport()
    for rank in range(world_size):
        part = ExtractReport.read(out, rank, world_size)
        for name in ("done", "skipped", "failed", "untold"):
            getattr(merged, name).extend(getattr(part, name))
        merged.absent, merged.absent_ids = part.absent, part.absent_ids
        merged.wall_s += part.wall_s / world_size
        merged.waited_s += part.waited_s / world_size
        merged.frames += part.frames
    merged.write(out)
    for rank in range(world_size if world_size > 1 else 0):
        path_of(out, rank, world_size).unlink()
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
