"""Tasks for policies as data: episodes, start frames, instruction (presets/tasks/*.toml).

To add one: write a TOML file there, or give the path of your own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from persistworld_cli.config.bundled import bundled_root
from persistworld_cli.config.fields import Bounds, Count, Whole, check_fields, coerce, field_types
from persistworld_cli.errors import UsageError, nearest
from persistworld_cli.read_files import read_toml

Grip = Annotated[float, Bounds(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class TaskStart:
    """The start of one rollout; without episode: every episode of the split; without instruction: the episode's."""

    episode: str = ""
    start: Whole = 0
    instruction: str = ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: its starts, and how it reads the policy's answer."""

    name: str
    description: str = ""
    skip: Count = 2  # every skip-th row of the policy's chunk is taken
    gripper_cap: Grip = 1.0  # largest gripper position
    # how an instruction begins = where the gripper stops when it closes, since it then holds something
    gripper_stops: dict[str, Grip] = field(default_factory=dict)
    steps: Count = 12  # interactions
    starts: tuple[TaskStart, ...] = (TaskStart(),)


def stop_under(instruction: str, stops: Mapping[str, float]) -> float:
    """Where a closing gripper stops, by the longest of the `gripper_stops` that begin an instruction; 1 without one."""
    words = instruction.casefold().split()
    fitting = [key for key in stops if words[: len(key.split())] == key.casefold().split()]
    return stops[max(fitting, key=len)] if fitting else 1.0


def task_names() -> list[str]:
    """Names of the bundled tasks."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def load_task(name: str) -> Task:
    """A bundled task by its name, or your own by its path.

    Raises:
        UsageError: no such task, not TOML, an unknown key, a value of the wrong type or out of bounds.
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
    own = tuple(_build(TaskStart, entry, path) for entry in starts)
    task: Task = _build(Task, data, path, name=path.stem, starts=own)
    if any(not key.strip() for key in task.gripper_stops):
        raise UsageError("an empty beginning of an instruction", where=f"{path}: gripper_stops", fix="name its words")
    return task


def _build(cls: type, data: dict[str, Any], path: Path, **given: Any) -> Any:
    """A table of the file as a checked dataclass; ``given`` are fields that the file does not set."""
    types = {key: hint for key, hint in field_types(cls).items() if key not in given}
    for key in data:
        if key not in types:
            raise UsageError(f"unknown key '{key}'", where=str(path), fix=nearest(key, types))
    built = cls(**{key: coerce(value, types[key], key=key, where=str(path)) for key, value in data.items()}, **given)
    check_fields(built, "", lambda _: str(path))
    return built


def _folder() -> Path:
    """The folder of the bundled tasks."""
    return bundled_root() / "presets" / "tasks"
