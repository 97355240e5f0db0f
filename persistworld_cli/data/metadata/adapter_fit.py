"""The action adapter that build-meta fits: joint motion = gain x commanded velocity, one gain a joint (method.md 6).

Legend: R raw frames of an episode, J joints, K episodes. A window is a start frame and 1..15 raw frames from there,
which is what a policy's chunk covers. Errors are of the joint angle (rad) and, with a forward kinematics, of the hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.data.metadata.scan import Listed

HORIZON = 15  # raw frames a policy's chunk moves ahead (openpi's pi0.5-DROID)
FIT_EPISODES = 1000  # at most this many: 300,000 raw frames for seven numbers
BOUND = 0.2  # rad a raw frame that DROID's controller asks for at velocity 1
_HAND_STRIDE = 15  # raw frames between the starts of the windows whose hand position is computed
_HANDS = 4096  # hand positions worked out at once: a kilobyte each

Float = NDArray[np.float64]
Reach = Callable[[Float], Float]  # joints (N, J) rad -> place of the hand (N, 3) m


def chosen(listed: Sequence[Listed]) -> set[int]:
    """Which annotations are read for the fit: the training episodes whose names have the smallest checksums.

    As good as drawn by lot, and a few more episodes change few of them: the others need not be read again.
    """
    drawn = sorted((crc32(item.name.encode()), row) for row, item in enumerate(listed) if item.split == "train")
    return {row for _, row in drawn[:FIT_EPISODES]}


def fit_adapter(motions: Sequence[NDArray[np.floating[Any]]], reach: Reach | None = None) -> dict[str, Any] | None:
    """Least squares over all windows of all episodes.

    Args:
        motions: per episode (R, 2, J): joint positions (rad) and commanded velocities at the raw rate.
        reach: forward kinematics, to tell the error of the hand too.

    Returns:
        ``gain`` (J,) in rad a raw frame at velocity 1; ``joint_mae``: mean absolute joint error over the windows of the
        ``fitted`` gain where every episode is predicted by a gain fitted without it, of ``fit`` (the gain on what it
        was fitted on), of the controller's bound ``scale_0.2``, and of ``hold`` (no motion); ``joint_mae_each``: the
        same for each joint; ``hand_error``: mean distance of the hand, m, with ``reach``. None without motions.
    """
    pieces = [_Windows.of(m) for m in motions if len(m) > 1]
    if not pieces:
        return None
    cross, square = (np.stack([getattr(p, name) for p in pieces]) for name in ("cross", "square"))
    gain = _divide(cross.sum(0), square.sum(0))
    single = len(pieces) == 1
    without = gain[None] if single else _divide(cross.sum(0) - cross, square.sum(0) - square)
    gains = {
        "fitted": without,
        "fit": gain[None],
        "scale_0.2": np.full((1, gain.size), BOUND),
        "hold": np.zeros((1, gain.size)),
    }
    tables = {name: np.broadcast_to(value, (len(pieces), gain.size)) for name, value in gains.items()}
    frames = sum(p.count for p in pieces)
    moving = [m for m in motions if len(m) > 1]
    each = {
        name: np.sum([_absolute(m, g) for m, g in zip(moving, table, strict=True)], axis=0) / frames
        for name, table in tables.items()
    }
    out: dict[str, Any] = {
        "gain": gain.tolist(),
        "gain_pooled": float(cross.sum() / max(float(square.sum()), 1e-12)),
        "horizon": HORIZON,
        "episodes": len(pieces),
        "raw_frames": int(sum(len(m) for m in moving)),
        "held_out": not single,
        "joint_mae": {name: float(values.mean()) for name, values in each.items()},
        "joint_mae_each": {name: values.tolist() for name, values in each.items()},
        "unit": "gain: rad per raw frame at velocity 1; joint_mae: rad, and hand_error: m, over 1..15 raw frames",
    }
    if reach is not None:
        out["hand_error"] = {name: _hand_error(moving, table, reach) for name, table in tables.items()}
    return out


@dataclass(frozen=True)
class _Windows:
    """Sums over all windows of one episode: motion x velocity (J,), velocity squared (J,), and their number."""

    cross: Float
    square: Float
    count: int

    @classmethod
    def of(cls, motion: NDArray[np.floating[Any]]) -> _Windows:
        joints = motion.shape[2]
        cross, square, count = np.zeros(joints), np.zeros(joints), 0
        for moved, commanded in _windows(motion):
            cross += np.einsum("rj,rj->j", moved, commanded)
            square += np.einsum("rj,rj->j", commanded, commanded)
            count += len(moved)
        return cls(cross, square, count)


def _windows(motion: NDArray[np.floating[Any]]) -> list[tuple[Float, Float]]:
    """For k = 1..15: motion over k raw frames and the sum of the velocities commanded in them, both (R - k, J)."""
    q, v = motion[:, 0].astype(np.float64), motion[:, 1].astype(np.float64)
    total = np.concatenate([np.zeros((1, v.shape[1])), np.cumsum(v, axis=0)])
    return [(q[k:] - q[:-k], total[k:-1] - total[: -k - 1]) for k in range(1, min(HORIZON, len(q) - 1) + 1)]


def _absolute(motion: NDArray[np.floating[Any]], gain: Float) -> Float:
    """(J,) sum of the absolute errors over all windows."""
    out = np.zeros(motion.shape[2])
    for moved, commanded in _windows(motion):
        out += np.abs(moved - gain * commanded).sum(axis=0)
    return out


def _hand_error(motions: Sequence[NDArray[np.floating[Any]]], gains: Float, reach: Reach) -> float:
    """Mean distance (m) between where the hand was 1, 3, ... 15 raw frames ahead and where the gains put it."""
    meant, came = [], []
    for motion, gain in zip(motions, gains, strict=True):
        start = motion[:, 0].astype(np.float64)
        for moved, commanded in _windows(motion)[::2]:
            rows = slice(0, len(moved), _HAND_STRIDE)
            meant.append(start[rows] + gain * commanded[rows])
            came.append(start[rows] + moved[rows])
    points, truth = np.concatenate(meant), np.concatenate(came)
    total = 0.0
    for at in range(0, len(points), _HANDS):
        gap = reach(points[at : at + _HANDS]) - reach(truth[at : at + _HANDS])
        total += float(np.linalg.norm(gap, axis=1).sum())
    return total / len(points)


def _divide(a: Float, b: Float) -> Float:
    """a / b, 0 where a joint was never commanded to move."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 1e-12)
