"""How many CPUs Linux control groups grant this process: the tightest limit of its group and all groups above it.

A container sees its own group as the root; the group of a SLURM job, a systemd slice or a pod without its own namespace
is some levels down, and each level may set a limit: in ``cpu.max`` (version 2), or in ``cpu.cfs_quota_us`` and
``cpu.cfs_period_us`` of the ``cpu`` controller (version 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_V2, _V1 = "cgroup2", "cgroup"


def cpu_limit(process: Path = Path("/proc/self")) -> float | None:
    """CPUs that the control groups grant (1.5: three half CPUs); None without a limit or control groups.

    Args:
        process: folder with ``cgroup`` (groups of the process) and ``mountinfo`` (where they are mounted).
    """
    limits = [limit for folder in _folders(process) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def _folders(process: Path) -> Iterator[Path]:
    """The folders of the process's groups that may limit its CPUs, from its own up to where they are mounted."""
    for kind, root, mounted in _mounts(process):
        group = Path(_group(process, kind))
        # without a cgroup namespace the path counts from the machine's root, of which only a part may be mounted
        below = group.relative_to(root) if group.is_relative_to(root) else Path()
        folder = mounted / below
        yield folder
        for level in range(len(below.parts)):
            yield folder.parents[level]


def _mounts(process: Path) -> list[tuple[str, Path, Path]]:
    """(kind, root within the hierarchy, mount point) of every mounted hierarchy that may hold the cpu controller."""
    found = []
    for line in _lines(process / "mountinfo"):
        left, _, right = line.partition(" - ")
        fields, (kind, *rest) = left.split(), right.split() or [""]
        if kind == _V2 or (kind == _V1 and "cpu" in rest[-1].split(",")):
            found.append((kind, Path(fields[3]), Path(fields[4])))
    return found


def _group(process: Path, kind: str) -> str:
    """The process's group in the hierarchy of a kind; the root if it is not listed."""
    for line in _lines(process / "cgroup"):
        number, controllers, path = line.split(":", 2)
        if (number == "0" and not controllers) if kind == _V2 else "cpu" in controllers.split(","):
            return path
    return "/"


def _limit(folder: Path) -> float | None:
    """The limit that one group sets, in CPUs."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _lines(path: Path) -> list[str]:
    """A file's lines; none if it cannot be read (no Linux)."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
