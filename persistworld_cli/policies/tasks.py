"""Tasks for policies as data: which episodes, from which frame, what is asked (presets/tasks/*.toml).

To add one: write a TOML file there, or give the path of your own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from persistworld_cli.config.bundled import bundled_root
from persistworld_cli.errors import UsageError, nearest
from persistworld_cli.read_files import read_toml

_CHANGE = "write another value there"


@dataclass(frozen=True, kw_only=True)
class TaskStart:
    """Where one rollout begins. No episode stands for every episode of the split, no instruction for its own."""

    episode: str = ""
    start: int = 0
    instruction: str = ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: its starts, and how the policy's answer is read in it."""

    name: str
    description: str = ""
    skip: int = 2  # every skip-th row of the policy's chunk is taken
    gripper_cap: float = 1.0  # the most that the gripper may close
    steps: int = 12  # interactions
    starts: tuple[TaskStart, ...] = (TaskStart(),)


def task_names() -> list[str]:
    """Names of the bundled tasks."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def load_task(name: str) -> Task:
    """A bundled task by its name, or one's own by its path.

    Raises:
        UsageError: no such task, not TOML, an unknown key, a value of the wrong kind.
    """
    path = Path(name).expanduser() if name.endswith(".toml") else _folder() / f"{name}.toml"
    if not path.is_file():
        if name.endswith(".toml"):
            raise UsageError(f"no task file '{name}'", where=str(path.absolute()), fix="give the path of a TOML file")
        raise UsageError(f"unknown task '{name}'", where="policy.task", fix=nearest(name, task_names()))
    _, data = read_toml(path)
    starts = data.pop("starts", [{}])
    if not isinstance(starts, list) or not starts or not all(isinstance(entry, dict) for entry in starts):
        raise UsageError("'starts' must be one or more tables", where=str(path), fix="write [[starts]]")
    task = Task(
        name=path.stem,
        starts=tuple(TaskStart(**_checked(TaskStart, entry, path)) for entry in starts),
        **_checked(Task, data, path),
    )
    if task.skip < 1 or task.steps < 1 or not 0 < task.gripper_cap <= 1 or any(s.start < 0 for s in task.starts):
        raise UsageError(
            "skip and steps from 1, gripper_cap in (0, 1], start from 0",
            where=str(path),
            fix=_CHANGE,
        )
    return task


def _checked(cls: type[Any], data: dict[str, Any], path: Path) -> dict[str, Any]:
    """The table's entries as the fields of ``cls``: unknown keys and wrong kinds are refused."""
    known: dict[str, Any] = {f.name: f.default for f in fields(cls) if f.name not in ("name", "starts")}
    out: dict[str, Any] = {}
    for key, value in data.items():
        if key not in known:
            raise UsageError(f"unknown key '{key}'", where=str(path), fix=nearest(key, known))
        kind = type(known[key])
        fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
        if not fits or isinstance(value, bool):
            raise UsageError(f"{key} = {value!r} must be of type {kind.__name__}", where=str(path), fix=_CHANGE)
        out[key] = kind(value)
    return out


def _folder() -> Path:
    """Where the bundled tasks lie."""
    return bundled_root() / "presets" / "tasks"
