"""The rules of the bundled world: its objects, cameras and instructions, and when an instruction has succeeded.

Recorder (`dataset_example/recorder`), judge and simulator import them from here; nothing here needs MuJoCo.

Shape legend: F frames, N objects; positions are centres in m in the robot's base frame (x forward, y left, z up from
the table), NaN where unknown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

Float = NDArray[np.float64]

# Saturated object colours, far from each other, from every table and from the robot.
OBJECT_COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.08, 0.06),
    "green": (0.08, 0.68, 0.12),
    "blue": (0.08, 0.20, 0.90),
    "yellow": (0.98, 0.82, 0.05),
    "magenta": (0.90, 0.10, 0.68),
    "cyan": (0.05, 0.78, 0.85),
}
SMALL_SHAPES = ("cube", "cylinder")  # the gripper can hold them
LARGE_SHAPES = ("box", "drum")  # it can only push them
ROUND_SHAPES = ("cylinder", "drum")

# Exterior camera -> azimuth, elevation (degrees) and distance (m) from `LOOK_AT`, before an episode varies them.
EXTERIOR_VIEWS = {"exterior_1_left": (-42.0, 30.0, 1.0), "exterior_2_left": (58.0, 33.0, 1.02)}
LOOK_AT = (0.51, 0.0, 0.07)  # m
FIELD_OF_VIEW = 23.5  # degrees, vertical
IMAGE_HEIGHT, IMAGE_WIDTH = 180, 320  # as recorded

FLANGE_TO_PADS = 0.15  # m along the flange's z to between the finger pads
MOVED = 0.05  # m along the instruction's direction
NEAR = 0.05  # m over the table, from the gripper or the object below
RESTING = 0.02  # m between an object and its resting place on top of another
ON_TABLE = 1.5  # of an object's largest half size: with its centre below, it is on the table
KEPT_S = 0.6  # s for which a condition must hold, so that an object that only passes by does not count

# -- instructions -----------------------------------------------------------------------------------------------------

DIRECTIONS = {  # the robot's: left is +y, forward is +x
    "to the left": np.array([0.0, 1.0]),
    "to the right": np.array([0.0, -1.0]),
    "forward": np.array([1.0, 0.0]),
    "back": np.array([-1.0, 0.0]),
}
_TEMPLATES = {
    "pick": "pick up the {target} and place it further {direction}",
    "push": "push the {target} {direction}",
    "reach": "move the gripper above the {target}",
    "stack": "put the {target} on top of the {onto}",
}
_FIELDS = {"target": "(?P<target>.+)", "direction": f"(?P<direction>{'|'.join(DIRECTIONS)})", "onto": "(?P<onto>.+)"}
_PATTERNS = {kind: re.compile(template.format(**_FIELDS)) for kind, template in _TEMPLATES.items()}


@dataclass(frozen=True)
class Task:
    """An instruction as data; objects by their number.

    `kind` is a key of the templates above; a pick or push has a `direction`, a stack an object `onto` which to put it.
    """

    kind: str
    target: int
    direction: str = ""
    onto: int | None = None

    @property
    def objects(self) -> tuple[int, ...]:
        """The objects that it names."""
        return (self.target,) if self.onto is None else (self.target, self.onto)


def instruction(task: Task, names: Sequence[str]) -> str:
    """A task in words, given the objects' names."""
    onto = "" if task.onto is None else names[task.onto]
    return _TEMPLATES[task.kind].format(target=names[task.target], direction=task.direction, onto=onto)


def read_instruction(text: str, names: Sequence[str]) -> Task | str:
    """The task of an instruction with these object names; or the reason why it is invalid, as text."""
    for kind, pattern in _PATTERNS.items():
        found = pattern.fullmatch(text.strip().lower().rstrip("."))
        if not found:
            continue
        parts = found.groupdict()
        for name in (parts["target"], parts.get("onto")):
            if name is not None and name not in names:
                return f"there is no '{name}' in the scene ({', '.join(names)})"
        onto = names.index(parts["onto"]) if "onto" in parts else None
        return Task(kind, names.index(parts["target"]), parts.get("direction", ""), onto)
    return f"the bundled world has no instruction '{text}'"


def all_instructions() -> list[str]:
    """Every instruction of the recorder, in the fixed order that a recording's `task_index` refers to."""
    small = [f"{colour} {shape}" for colour in OBJECT_COLOURS for shape in SMALL_SHAPES]
    large = [f"{colour} {shape}" for colour in OBJECT_COLOURS for shape in LARGE_SHAPES]
    texts = [instruction(Task("pick", 0, way), [name]) for name in small for way in DIRECTIONS]
    texts += [instruction(Task("push", 0, way), [name]) for name in small + large for way in DIRECTIONS]
    texts += [instruction(Task("reach", 0), [name]) for name in small + large]
    pairs = [(top, below) for top in small for below in large if top.split()[0] != below.split()[0]]
    return texts + [instruction(Task("stack", 0, onto=1), pair) for pair in pairs]


# -- success ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Whether a condition held for `KEPT_S` at any time, and the largest progress (0 .. 1) over such a time."""

    success: bool
    progress: float


@dataclass(frozen=True, eq=False)
class Condition:
    """The success condition of a task in one scene.

    Attributes:
        task: the task.
        half: (N, 3) half sizes of the objects along their own axes, m.
        start: (N, 3) positions of the objects at the task's start.
    """

    task: Task
    half: Float
    start: Float

    def holds(self, positions: Float, pads: Float) -> Float:
        """(F,) 1 where the condition holds, 0 where not, NaN where a position that matters is unknown.

        Args:
            positions: (F, N, 3).
            pads: (F, 3) the point between the finger pads.
        """
        task, target = self.task, positions[:, self.task.target]
        if task.kind == "reach":
            true = _over_table(pads - target) < NEAR
        elif task.onto is not None:
            gap = target - self._on_top(positions)
            true = (_over_table(gap) < NEAR) & (np.abs(gap[:, 2]) < RESTING)
        else:
            true = (target[:, 2] < ON_TABLE * self.half[task.target].max()) & (self._moved(target) > MOVED)
        known = np.isfinite(positions[:, list(task.objects)]).all(axis=(1, 2))
        return np.where(known, true.astype(np.float64), np.nan)

    def progress(self, positions: Float, pads: Float) -> Float:
        """(F,) fraction of the distance covered, 0 .. 1; NaN where unknown. Arguments as for `holds`."""
        task, target, start = self.task, positions[:, self.task.target], self.start[self.task.target]
        if task.kind == "reach":
            left, whole = _over_table(pads - target), float(_over_table(pads[0] - start))
            share = 1 - (left - NEAR) / max(whole - NEAR, 1e-6)
        elif task.onto is not None:
            left = np.linalg.norm(self._on_top(positions) - target, axis=1)
            share = 1 - left / float(np.linalg.norm(self._on_top(self.start[None])[0] - start))
        else:
            share = self._moved(target) / MOVED
        true = self.holds(positions, pads)
        return np.where(np.isnan(true), np.nan, np.where(true == 1, 1.0, np.clip(share, 0, 1)))

    def outcome(self, positions: Float, pads: Float, rate_hz: float) -> Outcome | None:
        """The outcome of frames at a rate (arguments as for `holds`); None if too few of them are known."""
        true, share = self.holds(positions, pads), self.progress(positions, pads)
        known, window = ~np.isnan(true), frames_kept(rate_hz)
        if known.sum() < window:
            return None
        success, progress = (
            np.lib.stride_tricks.sliding_window_view(values[known], window).min(axis=1).max()
            for values in (true, share)
        )
        return Outcome(bool(success == 1), float(progress))

    def _moved(self, target: Float) -> Float:
        """(F,) how far the target (F, 3) is along the task's direction from its start, m."""
        moved: Float = (target - self.start[self.task.target])[:, :2] @ DIRECTIONS[self.task.direction]
        return moved

    def _on_top(self, positions: Float) -> Float:
        """(F, 3): the target's centre if it rested on the object below."""
        below, target = self.task.onto, self.task.target
        assert below is not None
        place: Float = positions[:, below] + [0, 0, self.half[below, 2] + self.half[target, 2]]
        return place


def frames_kept(rate_hz: float) -> int:
    """`KEPT_S` in frames."""
    return max(1, round(KEPT_S * rate_hz))


def pad_positions(poses: Float) -> Float:
    """(F, 7) poses of the flange -> (F, 3): the point between the finger pads."""
    away = Rotation.from_euler("xyz", poses[:, 3:6]).as_matrix()[:, :, 2]
    points: Float = poses[:, :3] + FLANGE_TO_PADS * away
    return points


def _over_table(gap: Float) -> Float:
    """(..., 3) -> (...): horizontal length of a difference."""
    length: Float = np.linalg.norm(gap[..., :2], axis=-1)
    return length
