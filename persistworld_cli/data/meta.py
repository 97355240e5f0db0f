"""Metadata of a processed dataset: episode index, percentiles of the states, velocity-to-motion gains, health report.

Written to ``<dataset>/meta``: index.npz, stat.json, adapter.json, health.json; `export_ctrl_world` writes Ctrl-World's.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.data.store import ActionStat, Annotation, EpisodeStore, write_json
from persistworld_cli.errors import PersistWorldError

_VELOCITY = "action.joint_velocity"
_JOINTS = "observation.state.joint_position"
_HORIZON = 15  # raw frames a policy's chunk moves ahead (openpi's pi0.5-DROID)
_FIT_EPISODES = 2000  # at most this many, evenly spread, are held in memory for the fit
_DROID_SCALE = 0.2  # rad a raw frame that DROID's controller asks for at velocity 1


@dataclass
class MetaReport:
    """What `build_meta` wrote and found."""

    meta: Path
    episodes: dict[str, int]
    frames: dict[str, int]
    samples: dict[str, int]
    stat: ActionStat
    adapter: dict[str, Any] | None
    health: dict[str, Any]


@dataclass
class _Rows:
    """The index while it grows."""

    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    states: list[NDArray[np.float64]] = field(default_factory=list)
    motions: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = field(default_factory=list)


def build_meta(
    dataset: Path | str,
    *,
    meta: Path | str | None = None,
    num_frames: int = 5,
    check_latents: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> MetaReport:
    """Read every annotation once and write the metadata.

    Args:
        dataset: processed dataset.
        meta: where to write; ``<dataset>/meta`` by default.
        num_frames: frames a clip predicts (start frames leave num_frames - 1 after them).
        check_latents: also open every latent file and compare its length.
        progress: called with (episodes read, episodes in all).

    Raises:
        PersistWorldError: no processed dataset, no training episode, or state rows of differing width.
    """
    store = EpisodeStore(dataset, meta)
    names = [(split, episode) for split in store.splits for episode in store.episodes(split)]
    rows, problems = _Rows(), dict[str, list[str]]()
    every = -(-len(names) // _FIT_EPISODES) if names else 1
    successes: Counter[str] = Counter()
    for done, (split, episode) in enumerate(names, 1):
        try:
            annotation = store.annotation(split, episode)
            _check_episode(store, split, annotation, check_latents)
        except PersistWorldError as error:
            problems.setdefault(error.what, []).append(f"{split}/{episode}")
            continue
        finally:
            if progress:
                progress(done, len(names))
        rows.ids.append(episode)
        rows.texts.append(annotation.text)
        rows.splits.append(split)
        rows.states.append(annotation.states[: annotation.num_frames])
        successes[f"{split}: {_SUCCESS[annotation.success]}"] += 1
        wanted = split == "train" and done % every == 0
        motion = _motion(annotation) if wanted else None
        if motion is not None:
            rows.motions.append(motion)
    latents = "none" if not (store.root / "latent_videos").is_dir() else "checked" if check_latents else "unchecked"
    return _write(store, rows, problems, successes, num_frames, latents)


_SUCCESS = {True: "succeeded", False: "failed", None: "unknown"}


def start_states(states: Sequence[NDArray[np.float64]], num_frames: int = 5) -> NDArray[np.float64]:
    """States of every start frame ``0 <= start < max(1, T - (num_frames - 1))`` of all episodes: (samples, D)."""
    return np.concatenate([s[: max(1, len(s) - (num_frames - 1))] for s in states])


def fit_adapter(motions: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> dict[str, Any] | None:
    """Fit joint motion = gain x velocity per joint, least squares over the sums of 1..15 raw frames.

    Args:
        motions: per episode joint positions (R, J) in rad and joint velocities (R, J), both at the raw rate.

    Returns:
        gain per joint (rad a raw frame at velocity 1), and the mean absolute joint error (rad) over the 15 frames, each
        episode predicted by a gain fitted without it; the same for 0.2 v (what DROID's controller asks for) and for no
        motion. None if no episode has velocities.
    """
    pieces = [_moments(q, v) for q, v in motions if len(q) > 1]
    if not pieces:
        return None
    cross, square = (np.stack([p[i] for p in pieces]) for i in (0, 1))
    gain = _divide(cross.sum(0), square.sum(0))
    frames = sum(p[2] for p in pieces)
    errors: dict[str, float] = {"fitted": 0.0, "scale_0.2": 0.0, "hold": 0.0}
    for number, (q, v) in enumerate((q, v) for q, v in motions if len(q) > 1):
        others = gain
        if len(pieces) > 1:
            others = _divide(cross.sum(0) - cross[number], square.sum(0) - square[number])
        for name, used in (("fitted", others), ("scale_0.2", np.full_like(gain, _DROID_SCALE)), ("hold", 0 * gain)):
            errors[name] += _absolute_error(q, v, used)
    mean = {name: value / (frames * gain.size) for name, value in errors.items()}
    return {
        "gain": gain.tolist(),
        "gain_pooled": float(cross.sum() / max(float(square.sum()), 1e-12)),
        "horizon": _HORIZON,
        "episodes": len(pieces),
        "held_out": len(pieces) > 1,
        "joint_mae": mean,
        "unit": "rad per raw frame at velocity 1; errors: mean absolute joint error over the horizon, rad",
    }


def export_ctrl_world(store: EpisodeStore, name: str, *, num_frames: int = 5, seed: int = 0) -> Path:
    """Write Ctrl-World's lists: ``<dataset>/meta_info/<name>/{train,val}_sample.json`` (shuffled) and stat.json.

    Streamed entry by entry, so that ten million entries need no more memory than their numbers.
    """
    folder = store.root / "meta_info" / name
    folder.mkdir(parents=True, exist_ok=True)
    for split in store.splits:
        if not store.episodes(split):
            continue
        index = store.index(split)
        starts = np.maximum(1, index.lengths - (num_frames - 1))
        row = np.repeat(np.arange(len(starts)), starts)
        first = np.arange(len(row)) - np.repeat(np.cumsum(starts) - starts, starts)
        order = np.random.default_rng(seed).permutation(len(row))
        partial = folder / f".{split}_sample.json.{os.getpid()}"
        with partial.open("w") as out:
            for position, k in enumerate(order):
                entry = {"episode_id": _as_number(index.ids[row[k]]), "frame_ids": [int(first[k])]}
                out.write(("[" if position == 0 else ", ") + json.dumps(entry))
            out.write("]")
        partial.replace(folder / f"{split}_sample.json")
    stat = store.stat()
    write_json(folder / "stat.json", {"state_01": stat.p01.tolist(), "state_99": stat.p99.tolist()})
    return folder


def _write(
    store: EpisodeStore,
    rows: _Rows,
    problems: dict[str, list[str]],
    successes: Counter[str],
    num_frames: int,
    latents: str,
) -> MetaReport:
    """Check what was gathered and write the four files."""
    train = [s for s, split in zip(rows.states, rows.splits, strict=True) if split == "train"]
    if not train:
        found = dict(Counter(rows.splits)) or "no readable episode"
        raise PersistWorldError(
            f"no training episode ({found}; problems: { {k: len(v) for k, v in problems.items()} or 'none' })",
            where=str(store.root / "annotation" / "train"),
            fix="extract more episodes, or choose another val_rule so that some are for training",
        )
    widths = {s.shape[1] for s in rows.states}
    if len(widths) > 1:
        raise PersistWorldError(f"states have widths {sorted(widths)}", where=str(store.root), fix="extract all alike")
    starts = start_states(train, num_frames)
    stat = ActionStat(np.percentile(starts, 1, axis=0), np.percentile(starts, 99, axis=0))
    adapter = fit_adapter(rows.motions)
    splits = sorted(set(rows.splits))
    frames = {s: sum(len(x) for x, k in zip(rows.states, rows.splits, strict=True) if k == s) for s in splits}
    samples = {
        s: sum(max(1, len(x) - num_frames + 1) for x, k in zip(rows.states, rows.splits, strict=True) if k == s)
        for s in splits
    }
    report = MetaReport(
        meta=store.meta,
        episodes=dict(Counter(rows.splits)),
        frames=frames,
        samples=samples,
        stat=stat,
        adapter=adapter,
        health=_health(rows, stat, problems, successes, latents),
    )
    _write_index(store.meta / "index.npz", rows)
    write_json(store.meta / "stat.json", {"state_01": stat.p01.tolist(), "state_99": stat.p99.tolist()})
    if adapter is not None:
        write_json(store.meta / "adapter.json", adapter)
    else:
        (store.meta / "adapter.json").unlink(missing_ok=True)  # one of an earlier state of the dataset would mislead
    write_json(store.meta / "health.json", report.health)
    return report


def _write_index(path: Path, rows: _Rows) -> None:
    """The compact index: texts as JSON bytes, states in float32 where that loses nothing."""
    states = np.concatenate(rows.states)
    single = states.astype(np.float32)
    lengths = np.asarray([len(s) for s in rows.states], dtype=np.int64)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        ids=_as_bytes(rows.ids),
        texts=_as_bytes(rows.texts),
        splits=_as_bytes(rows.splits),
        lengths=lengths,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        states=single if np.array_equal(single.astype(np.float64), states) else states,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(buffer.getvalue())
    partial.replace(path)


def _as_bytes(names: list[str]) -> NDArray[np.uint8]:
    """Texts as the bytes of a JSON list: numpy's own text arrays take the longest one's room for each."""
    return np.frombuffer(json.dumps(names).encode(), dtype=np.uint8)


def _check_episode(store: EpisodeStore, split: str, annotation: Annotation, check_latents: bool) -> None:
    """Raise for an episode that training could not use."""
    if not np.isfinite(annotation.states).all():
        raise PersistWorldError("states hold values that are no numbers")
    length = int(annotation.raw.get("video_length", len(annotation.states)))
    if length != len(annotation.states):
        raise PersistWorldError(f"video_length {length} but {len(annotation.states)} states")
    store.num_cameras(split, annotation.episode_id)
    if check_latents and (store.root / "latent_videos").is_dir():
        counts = store.num_latents(split, annotation.episode_id)
        if any(n < annotation.num_frames for n in counts):
            raise PersistWorldError("latents are shorter than the video")


def _health(
    rows: _Rows, stat: ActionStat, problems: dict[str, list[str]], successes: Counter[str], latents: str
) -> dict[str, Any]:
    """What a person should know of the data before training on it."""
    lengths = np.asarray([len(s) for s in rows.states])
    states = np.concatenate(rows.states)
    still = [i for i, s in zip(rows.ids, rows.states, strict=True) if np.ptp(s[:, :3], axis=0).max() < 0.01]
    outside = ((states < stat.p01) | (states > stat.p99)).mean(axis=0)
    return {
        "unusable": {reason: {"count": len(names), "first": names[:20]} for reason, names in problems.items()},
        "latents": latents,
        "length": {"min": int(lengths.min()), "median": float(np.median(lengths)), "max": int(lengths.max())},
        "shorter_than_clip": int((lengths < 5).sum()),
        "without_instruction": sum(not t.strip() for t in rows.texts),
        "success": dict(successes),
        "arm_never_moves_1cm": still[:20],
        "states_outside_percentiles": outside.round(4).tolist(),
        "state_min": states.min(axis=0).tolist(),
        "state_max": states.max(axis=0).tolist(),
        "episodes_in_adapter_fit": len(rows.motions),
    }


def _motion(annotation: Annotation) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Joint positions and velocities (R, J) at the raw rate, where the annotation has them."""
    if _VELOCITY not in annotation.raw or _JOINTS not in annotation.raw:
        return None
    q = np.asarray(annotation.raw[_JOINTS], dtype=np.float64)
    v = np.asarray(annotation.raw[_VELOCITY], dtype=np.float64)
    usable = q.shape == v.shape and q.ndim == 2 and np.isfinite(q).all() and np.isfinite(v).all()
    return (q, v) if usable else None


def _ahead(q: NDArray[np.float64], v: NDArray[np.float64], k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Motion over k raw frames and the sum of the velocities commanded in them: both (R - k, J)."""
    total = np.concatenate([np.zeros((1, v.shape[1])), np.cumsum(v, axis=0)])
    return q[k:] - q[:-k], total[k:-1] - total[: -k - 1]


def _moments(q: NDArray[np.float64], v: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any], int]:
    """Sums for least squares over all windows of 1..15 frames: cross (J,), square (J,), number of windows."""
    cross, square, count = np.zeros(q.shape[1]), np.zeros(q.shape[1]), 0
    for k in range(1, min(_HORIZON, len(q) - 1) + 1):
        motion, velocity = _ahead(q, v, k)
        cross += (motion * velocity).sum(axis=0)
        square += (velocity**2).sum(axis=0)
        count += len(motion)
    return cross, square, count


def _absolute_error(q: NDArray[np.float64], v: NDArray[np.float64], gain: NDArray[np.float64]) -> float:
    """Sum of absolute joint errors over all windows of 1..15 frames."""
    total = 0.0
    for k in range(1, min(_HORIZON, len(q) - 1) + 1):
        motion, velocity = _ahead(q, v, k)
        total += float(np.abs(motion - gain * velocity).sum())
    return total


def _divide(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """a / b, 0 where a joint was never commanded to move."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 1e-12)


def _as_number(name: str) -> int | str:
    """Ctrl-World writes numeric ids as numbers; '0011' must stay text."""
    return int(name) if name.isdecimal() and str(int(name)) == name else name
