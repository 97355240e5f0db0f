"""The joint-velocity adapter that build-meta fits: motion = gain x commanded velocity for each joint (method.md 6).

Legend: R raw frames of an episode, J joints. A window is a start frame and the 1..15 raw frames after it that a
policy's chunk covers. Errors are of the joint angle (rad) and, with forward kinematics, of the hand's position (m).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.data.metadata.scan import AnnotationStat

ADAPTER_FILES = ("joint_velocity_adapter.json", "adapter.json")  # in a dataset's meta: as written, as in older ones
HORIZON = 15  # raw frames a policy's chunk moves ahead (openpi's pi0.5-DROID)
FIT_EPISODES = 1000  # at most this many: 300,000 raw frames for seven numbers
BOUND = 0.2  # rad per raw frame that DROID's controller commands at velocity 1
_HAND_STRIDE = 15  # raw frames between the starts of the windows whose hand position is computed
_HANDS = 4096  # hand positions computed at once: about 1 kB each

Float = NDArray[np.float64]
HandPosition = Callable[[Float], Float]  # joints (N, J) rad -> position of the hand (N, 3) m


def chosen(listed: Sequence[AnnotationStat]) -> set[int]:
    """Rows of the annotations used for the fit: the training episodes whose names have the smallest checksums.

    As good as a random choice, and stable: new episodes replace only a few of them, so few must be read again.
    """
    drawn = sorted((crc32(item.name.encode()), row) for row, item in enumerate(listed) if item.split == "train")
    return {row for _, row in drawn[:FIT_EPISODES]}


def fit_adapter(
    motions: Sequence[NDArray[np.floating[Any]]], hand_position: HandPosition | None = None
) -> dict[str, Any] | None:
    """Least squares over all windows of all episodes.

    Args:
        motions: per episode (R, 2, J): joint positions (rad) and commanded velocities at the raw rate.
        hand_position: forward kinematics; with it, the error of the hand is reported too.

    Returns:
        ``gain`` (J,) in rad per raw frame at velocity 1; ``joint_mae``: mean absolute joint error over the windows, of
        four predictions: ``fitted`` (leave-one-out: each episode by a gain fitted on the others), ``fit`` (the gain on
        the episodes it was fitted on), ``scale_0.2`` (the controller's bound) and ``hold`` (no motion);
        ``joint_mae_each``: the same for each joint; ``hand_error``: mean distance of the hand, m, if ``hand_position``
        is given. None without motions.
    """
    moving = [motion for motion in motions if len(motion) > 1]
    if not moving:
        return None
    cross, square, counts = (np.stack(part) for part in zip(*map(_sums, moving), strict=True))
    gain = _divide(cross.sum(0), square.sum(0))
    single = len(moving) == 1
    gains = {
        "fitted": gain[None] if single else _divide(cross.sum(0) - cross, square.sum(0) - square),
        "fit": gain[None],
        "scale_0.2": np.full((1, gain.size), BOUND),
        "hold": np.zeros((1, gain.size)),
    }
    tables = {name: np.broadcast_to(value, (len(moving), gain.size)) for name, value in gains.items()}
    each = {
        name: np.sum([_absolute(m, g) for m, g in zip(moving, table, strict=True)], axis=0) / counts.sum()
        for name, table in tables.items()
    }
    out: dict[str, Any] = {
        "gain": gain.tolist(),
        "gain_pooled": float(cross.sum() / max(float(square.sum()), 1e-12)),
        "horizon": HORIZON,
        "episodes": len(moving),
        "raw_frames": int(sum(len(m) for m in moving)),
        "held_out": not single,
        "joint_mae": {name: float(values.mean()) for name, values in each.items()},
        "joint_mae_each": {name: values.tolist() for name, values in each.items()},
        "unit": "gain: rad per raw frame at velocity 1; joint_mae: rad, and hand_error: m, over 1..15 raw frames",
    }
    if hand_position is not None:
        out["hand_error"] = {name: _hand_error(moving, table, hand_position) for name, table in tables.items()}
    return out


def _sums(motion: NDArray[np.floating[Any]]) -> tuple[Float, Float, int]:
    """Over all windows of one episode: motion x velocity (J,), velocity squared (J,), and their number."""
    windows = _windows(motion)
    cross = np.sum([np.einsum("rj,rj->j", moved, commanded) for moved, commanded in windows], axis=0)
    square = np.sum([np.einsum("rj,rj->j", commanded, commanded) for _, commanded in windows], axis=0)
    return cross, square, sum(len(moved) for moved, _ in windows)


def _windows(motion: NDArray[np.floating[Any]]) -> list[tuple[Float, Float]]:
    """For k = 1..15: motion over k raw frames and the sum of the velocities commanded in them, both (R - k, J)."""
    q, v = motion[:, 0].astype(np.float64), motion[:, 1].astype(np.float64)
    total = np.concatenate([np.zeros((1, v.shape[1])), np.cumsum(v, axis=0)])
    return [(q[k:] - q[:-k], total[k:-1] - total[: -k - 1]) for k in range(1, min(HORIZON, len(q) - 1) + 1)]


def _absolute(motion: NDArray[np.floating[Any]], gain: Float) -> Float:
    """(J,) sum of the absolute errors over all windows."""
    return np.sum([np.abs(moved - gain * commanded).sum(axis=0) for moved, commanded in _windows(motion)], axis=0)


def _hand_error(motions: Sequence[NDArray[np.floating[Any]]], gains: Float, hand_position: HandPosition) -> float:
    """Mean distance (m) between the recorded and the predicted hand position 1, 3, ... 15 raw frames ahead."""
    predicted, came = [], []
    for motion, gain in zip(motions, gains, strict=True):
        start = motion[:, 0].astype(np.float64)
        for moved, commanded in _windows(motion)[::2]:
            rows = slice(0, len(moved), _HAND_STRIDE)
            predicted.append(start[rows] + gain * commanded[rows])
            came.append(start[rows] + moved[rows])
    points, truth = np.concatenate(predicted), np.concatenate(came)
    total = 0.0
    for at in range(0, len(points), _HANDS):
        gap = hand_position(points[at : at + _HANDS]) - hand_position(truth[at : at + _HANDS])
        total += float(np.linalg.norm(gap, axis=1).sum())
    return total / len(points)


def _divide(a: Float, b: Float) -> Float:
    """a / b, 0 where a joint was never commanded to move."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 1e-12)
