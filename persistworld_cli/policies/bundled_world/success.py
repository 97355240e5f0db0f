"""When an instruction of the bundled world has come true, and how far it got, from where the objects are.

The conditions are those of the world's recorder (`dataset_example/recorder/tasks.py`), which needs a simulator to be
imported; `tests/policies/test_judge.py` holds the two together.

Shape legend: F frames, N objects; positions are centres in m in the robot's base frame (x forward, y left, z up from
the table), NaN where they are not known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from persistworld_cli.policies.judge import Float, SceneObject

DIRECTIONS = {"to the left": (0.0, 1.0), "to the right": (0.0, -1.0), "forward": (1.0, 0.0), "back": (-1.0, 0.0)}
MOVED = 0.05  # m along the direction that was asked for
NEAR = 0.05  # m over the table, from the gripper or the object below
RESTING = 0.02  # m between an object on top of another and where it would rest
PADS = 0.15  # m from the flange to between the finger pads
KEPT_S = 0.6  # so long a condition must hold: less may be passing by

_WAYS = "|".join(DIRECTIONS)
_PHRASES = {
    "pick": re.compile(rf"pick up the (?P<target>.+) and place it further (?P<way>{_WAYS})"),
    "push": re.compile(rf"push the (?P<target>.+) (?P<way>{_WAYS})"),
    "reach": re.compile(r"move the gripper above the (?P<target>.+)"),
    "stack": re.compile(r"put the (?P<target>.+) on top of the (?P<onto>.+)"),
}


@dataclass(frozen=True)
class Aim:
    """An instruction that was understood: `kind` is pick, push, reach or stack; objects by their number."""

    kind: str
    target: int
    way: tuple[float, float] = (0.0, 0.0)
    onto: int | None = None

    @property
    def watched(self) -> tuple[int, ...]:
        """The objects that matter."""
        return (self.target,) if self.onto is None else (self.target, self.onto)


@dataclass(frozen=True)
class Outcome:
    """Whether the condition was kept for `KEPT_S` at any time, and the most progress (0 .. 1) that was kept so long."""

    success: bool
    progress: float


def read_instruction(text: str, objects: Sequence[SceneObject]) -> Aim | str:
    """An instruction of the bundled world; what is not understood in it otherwise."""
    names = [item.name for item in objects]
    for kind, phrase in _PHRASES.items():
        found = phrase.fullmatch(text.strip().lower().rstrip("."))
        if not found:
            continue
        parts = found.groupdict()
        for name in (parts["target"], parts.get("onto")):
            if name is not None and name not in names:
                return f"there is no '{name}' in the scene ({', '.join(names)})"
        onto = names.index(parts["onto"]) if "onto" in parts else None
        return Aim(kind, names.index(parts["target"]), DIRECTIONS.get(parts.get("way", ""), (0.0, 0.0)), onto)
    return f"the instruction '{text}' is none of the bundled world's"


def pad_positions(poses: Float) -> Float:
    """(F, 7) poses of the flange -> (F, 3): the point between the finger pads."""
    away = Rotation.from_euler("xyz", poses[:, 3:6]).as_matrix()[:, :, 2]
    points: Float = poses[:, :3] + PADS * away
    return points


def held(aim: Aim, objects: Sequence[SceneObject], positions: Float, pads: Float) -> Float:
    """(F,) 1 where the condition holds, 0 where not, NaN where a position is unknown. positions (F, N, 3)."""
    target, item = positions[:, aim.target], objects[aim.target]
    if aim.kind == "reach":
        true = np.hypot(*(pads - target)[:, :2].T) < NEAR
    elif aim.onto is not None:
        gap = _goal(aim, objects, positions) - target
        true = (np.hypot(gap[:, 0], gap[:, 1]) < NEAR) & (np.abs(gap[:, 2]) < RESTING)
    else:
        on_table = target[:, 2] < 1.5 * item.half.max()
        true = on_table & ((target - item.position)[:, :2] @ np.array(aim.way) > MOVED)
    known = np.isfinite(positions[:, list(aim.watched)]).all(axis=(1, 2))
    return np.where(known, true.astype(np.float64), np.nan)


def progress(aim: Aim, objects: Sequence[SceneObject], positions: Float, pads: Float) -> Float:
    """(F,) how far it is, 0 .. 1: the share of the way that the condition asks for; NaN where a position is unknown."""
    target, begun = positions[:, aim.target], objects[aim.target].position
    if aim.kind == "reach":
        left, whole = np.hypot(*(pads - target)[:, :2].T), float(np.hypot(*(pads[0] - begun)[:2]))
        share = 1 - (left - NEAR) / max(whole - NEAR, 1e-6)
    elif aim.onto is not None:
        starts = np.stack([item.position for item in objects])[None]
        left = np.linalg.norm(_goal(aim, objects, positions) - target, axis=1)
        share = 1 - left / float(np.linalg.norm(_goal(aim, objects, starts)[0] - begun))
    else:
        share = (target - begun)[:, :2] @ np.array(aim.way) / MOVED
    true = held(aim, objects, positions, pads)
    return np.where(np.isnan(true), np.nan, np.where(true == 1, 1.0, np.clip(share, 0, 1)))


def outcome(aim: Aim, objects: Sequence[SceneObject], positions: Float, pads: Float, rate_hz: float) -> Outcome | None:
    """What frames (positions (F, N, 3), pads (F, 3)) come to; None where too few of them are known."""
    true = held(aim, objects, positions, pads)
    share = progress(aim, objects, positions, pads)[~np.isnan(true)]
    window = frames_kept(rate_hz)
    if len(share) < window:
        return None
    spans = np.lib.stride_tricks.sliding_window_view
    kept = spans(true[~np.isnan(true)], window).min(axis=1).max()
    return Outcome(bool(kept == 1), float(spans(share, window).min(axis=1).max()))


def frames_kept(rate_hz: float) -> int:
    """`KEPT_S` in frames."""
    return max(1, round(KEPT_S * rate_hz))


def _goal(aim: Aim, objects: Sequence[SceneObject], positions: Float) -> Float:
    """(F, 3): where the target's centre would rest on the object below."""
    below = aim.onto if aim.onto is not None else aim.target
    goal: Float = positions[:, below] + np.array([0, 0, objects[below].half[2] + objects[aim.target].half[2]])
    return goal
