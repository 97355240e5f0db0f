"""Percentiles of the training states, and the health report of a dataset.

Legend: E episodes, N frames of all of them, D numbers of a state. States are read block by block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.data.metadata.index import ActionStat, StateRows, running
from persistworld_cli.data.metadata.scan import Facts

STILL_M = 0.01  # an arm that stays within this did nothing
JUMP_M_S = 1.5  # faster than DROID's arms are driven: a lost or swapped frame
TURN_RAD_S = 6.0
GRIP_SLACK = 0.01  # beyond 0..1
NAMED = 20  # episodes named in a finding


def count_starts(lengths: NDArray[np.int64], num_frames: int) -> NDArray[np.int64]:
    """Number of start frames of each episode: ``0 <= start < max(1, length - (num_frames - 1))``."""
    return np.maximum(1, lengths - (num_frames - 1))


def start_percentiles(
    states: StateRows,
    lengths: NDArray[np.int64],
    training: NDArray[np.bool_],
    num_frames: int,
) -> ActionStat:
    """1st and 99th percentile of the states (N, D) at all start frames of the training episodes."""
    chosen = _start_frames(lengths, training, num_frames)
    p01, p99 = np.empty(states.shape[1]), np.empty(states.shape[1])
    column = np.empty(int(chosen.sum()), dtype=np.float64)
    for number in range(states.shape[1]):  # one after another: all at once would take D times the memory
        at = 0
        for begin, end in states.blocks():
            part = states.read(begin, end)[chosen[begin:end], number]
            column[at : at + len(part)] = part
            at += len(part)
        p01[number], p99[number] = np.percentile(column, [1, 99], overwrite_input=True)
    return ActionStat(p01, p99)


def _start_frames(lengths: NDArray[np.int64], training: NDArray[np.bool_], num_frames: int) -> NDArray[np.bool_]:
    """(N,) whether a frame is a start frame of a training episode."""
    chosen, ends = np.repeat(training, lengths), running(lengths)[1:]
    for back in range(1, num_frames):  # too few frames follow the last ones; a short episode keeps its first frame
        chosen[ends[lengths > back] - back] = False
    return chosen


def state_table(
    states: StateRows, lengths: NDArray[np.int64], training: NDArray[np.bool_], stat: ActionStat, names: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each number of a state: percentiles, range, and the share of training frames that will be clipped."""
    width = states.shape[1]
    low, high = np.full(width, np.inf), np.full(width, -np.inf)
    clipped, frames = np.zeros(width, dtype=np.int64), np.repeat(training, lengths)
    for begin, end in states.blocks():
        block = states.read(begin, end).astype(np.float64)
        low, high = np.minimum(low, block.min(axis=0)), np.maximum(high, block.max(axis=0))
        block = block[frames[begin:end]]
        clipped += ((block < stat.p01) | (block > stat.p99)).sum(axis=0)
    total = max(1, int(frames.sum()))
    return [
        {
            "number": name,
            "p01": float(stat.p01[i]),
            "p99": float(stat.p99[i]),
            "min": float(low[i]),
            "max": float(high[i]),
            "clipped": round(float(clipped[i]) / total, 6),
        }
        for i, name in enumerate(names)
    ]


def findings(
    names: Sequence[str],
    lengths: NDArray[np.int64],
    texts: Sequence[str],
    facts: NDArray[np.float64],
    rate_hz: float,
    num_frames: int,
) -> list[dict[str, Any]]:
    """Oddities of usable episodes (E,), by their `scan.Facts` (E, 6); only those that occur."""
    column = dict(zip(Facts._fields, facts.T, strict=True))
    still = column["extent"] < STILL_M
    if np.isnan(column["jump"]).all():  # numbers without a known unit: only those that never change are surely still
        still = column["extent"] == 0
    outside = (column["grip_low"] < -GRIP_SLACK) | (column["grip_high"] > 1 + GRIP_SLACK)
    wrapped = column["wraps"] > 0
    found = (
        ("arm never moves 1 cm", still, "nothing to learn but a still image; the recording may have failed"),
        (
            f"position jumps (over {JUMP_M_S:g} m/s)",
            column["jump"] * rate_hz > JUMP_M_S,
            "frames are lost or two recordings are joined: the images will not follow the poses",
        ),
        (
            f"orientation jumps (over {TURN_RAD_S:g} rad/s)",
            column["turn"] * rate_hz > TURN_RAD_S,
            "as above, or the angles are not roll, pitch, yaw in rad (extrinsic xyz)",
        ),
        (
            "gripper outside 0..1",
            outside,
            "another unit, or another order of the numbers: 0 is open, 1 closed, last of seven",
        ),
        (
            "gripper never moves",
            column["grip_high"] - column["grip_low"] < GRIP_SLACK,
            "fine for pushing; otherwise the gripper was not recorded",
        ),
        (
            "roll wraps around at pi",
            wrapped,
            "usual with DROID (a gripper that points down); the action jumps between -1 and 1 there",
        ),
        ("shorter than a clip", lengths < num_frames, "the last frame is repeated"),
        ("without an instruction", np.array([not t.strip() for t in texts], bool), "the model gets an empty text"),
    )
    return [_finding(what, np.flatnonzero(mask), names, means) for what, mask, means in found if mask.any()]


def unusable(names: Sequence[str], problems: Sequence[str]) -> list[dict[str, Any]]:
    """Episodes that are left out, by reason, in the form of `findings`."""
    counted = Counter(p for p in problems if p)
    return [
        _finding(what, np.flatnonzero([p == what for p in problems]), names, "left out of training: repair or delete")
        for what, _ in counted.most_common()
    ]


def _finding(what: str, rows: NDArray[np.int64], names: Sequence[str], means: str) -> dict[str, Any]:
    first = [names[int(row)] for row in rows[:NAMED]]
    return {
        "finding": what,
        "episodes": len(rows),
        "share": round(len(rows) / max(1, len(names)), 6),
        "first": first,
        "means": means,
    }
