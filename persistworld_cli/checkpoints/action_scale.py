"""The action scale belongs to the weights: saved in every weights file, loaded with it, compared with the data.

Weights expect poses scaled by the 1st and 99th percentiles of the states that they were trained on (method.md 1).
`scale_of` alone decides which percentiles a command uses:

1. ``model.stat``, if the user sets it (environment, ``--set``, a preset of their own);
2. those in the weights: a post-training's saved state before its adapter, an adapter before the weights below it;
3. ``model.stat`` of a shipped preset;
4. the dataset's own percentiles.

Legend: N states, D numbers of a state.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.checkpoints.saving import read_notes
from persistworld_cli.checkpoints.sources import locate
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.keys import FRANKA_POSE, state_names
from persistworld_cli.config.settings import Settings
from persistworld_cli.config.weight_names import USED_PARTS
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.data.metadata.index import INDEX_FILE, ActionStat, IndexFile
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.read_files import as_object, parse_json, reading

NOTE = "action_scale"  # in a weights file's notes: the JSON of a stat.json
CLIPPED = 0.05  # share of a dimension's values that may lie outside the weights' percentiles
NARROW, WIDE = 0.3, 1.5  # a dimension's p01..p99 range in the data, as a share of the weights'
# A few episodes seldom cover the range of a whole dataset: each of nine real DROID episodes has a dimension below
# 0.3. With so few, a narrow range is reported only for a position that hardly moves, and a value counts as clipped only
# if it is outside by more than a tenth of the weights' range.
FEW, STILL, OUTSIDE = 10, 0.05, 0.1
_ANGLES = ("roll", "pitch", "yaw")
_POSITION = ("x", "y", "z")
_TURN = 2 * math.pi
_WHOLE_TURN = 0.95 * _TURN  # percentiles of an angle that wraps at +-pi
_SLACK = 1e-3  # rad: recorded angles reach pi to rounding
_BLOCKS, _BLOCK = 256, 64  # states sampled from an index: this many runs of this many rows, evenly spread
_EPISODES = 200  # annotations that are read if there is no index

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scale:
    """Percentiles that actions are scaled by, where they come from, and whether they are the dataset's own."""

    stat: ActionStat
    origin: str
    of_data: bool = False


@dataclass(frozen=True)
class Poses:
    """States (N, D) of a dataset, their number of episodes, and the place where they were found."""

    states: NDArray[np.float64]
    episodes: int
    where: str


# -- written and read ---------------------------------------------------------------------------------------------


def scale_note(stat: ActionStat | None) -> dict[str, str]:
    """Percentiles as a weights file's note; {} for none."""
    if stat is None:
        return {}
    return {NOTE: json.dumps({"state_01": stat.p01.tolist(), "state_99": stat.p99.tolist()})}


def noted_scale(notes: Mapping[str, str], where: str) -> ActionStat | None:
    """The percentiles in a weights file's notes; None if there are none. Raises PersistWorldError if damaged."""
    text = notes.get(NOTE)
    if text is None:
        return None
    with reading("the weights have a damaged action scale", where, "write or fetch them again"):
        return ActionStat.of(as_object(parse_json(text)))


def stored_scale(source: str | Path) -> ActionStat | None:
    """The percentiles saved in weights or an adapter; None if there are none. No tensor is read.

    Raises:
        PersistWorldError: nothing there, or damaged.
    """
    notes: dict[str, str] = {}
    for path, _ in locate(source, USED_PARTS).files:
        notes |= read_notes(path)
    return noted_scale(notes, str(source))


# -- which one ----------------------------------------------------------------------------------------------------


def scale_of(settings: Settings, store: EpisodeStore, weights: Sequence[str | Path], *, quiet: bool = False) -> Scale:
    """The percentiles that poses are scaled by for these weights, with a warning if the settings name others.

    Args:
        settings: ``model.stat``, and whether the user named it.
        store: the dataset, with the settings' percentiles (`open_store`).
        weights: the parts of the model, last trained first: a saved state, an adapter, the weights below it.
        quiet: no warning (ranks other than 0).

    Raises:
        PersistWorldError: absent weights, damaged or missing percentiles.
    """
    named = settings.model.stat
    origin = f"model.stat = {named}" if named else f"the dataset's own ({store.root})"
    of_data = not named or resolve_path(named).absolute() == (store.meta / "stat.json").absolute()
    found = ((source, stored_scale(source)) for source in weights if str(source))
    source, stored = next(((source, stat) for source, stat in found if stat is not None), ("", None))
    if stored is None:
        return Scale(store.stat(), origin, of_data)
    own = Scale(stored, f"carried by {source}")
    if not named:
        return own
    stat = store.stat()
    used = Scale(stat, origin, of_data) if settings.model.stat_given else own
    rows = scale_differences(stat, stored, settings)
    if rows and not quiet:
        lines = "".join(
            f"\n  {name:7} {by_settings}, the weights' {by_weights}" for name, by_settings, by_weights in rows
        )
        what = "warning: the action scale of the weights differs from %s; used: %s%s"
        logger.warning(what, origin, used.origin, lines)
    return used


def scale_differences(
    one: ActionStat, other: ActionStat, settings: Settings | None = None
) -> list[tuple[str, str, str]]:
    """(dimension, range, other range) wherever two scales differ by more than rounding."""
    if one.p01.shape != other.p01.shape:
        return [("numbers", str(len(one.p01)), str(len(other.p01)))]
    span = np.maximum(np.abs(one.p99 - one.p01), 1e-8)
    apart = np.maximum(np.abs(one.p01 - other.p01), np.abs(one.p99 - other.p99)) > 1e-5 * span
    names = state_names(len(apart), settings)
    return [(names[i], _range(one, i), _range(other, i)) for i in np.flatnonzero(apart).tolist()]


def _range(stat: ActionStat, i: int) -> str:
    return f"{stat.p01[i]:.4g} .. {stat.p99[i]:.4g}"


# -- compared with the data ---------------------------------------------------------------------------------------


def weights_stores(
    settings: Settings,
    store: EpisodeStore,
    models: Sequence[Sequence[str | Path]],
    *,
    split: str = "",
    episodes: Iterable[str] = (),
    quiet: bool = False,
) -> list[EpisodeStore]:
    """The dataset with each model's percentiles; every command that feeds poses to weights opens its data with this.

    Args:
        settings, store, quiet: as for `scale_of`.
        models: the weights of each, as for `scale_of`; each scale is compared with the poses once (`check_poses`).
        split, episodes: what will be read; compared if the dataset has no index.

    Raises:
        PersistWorldError: as `scale_of`; with ``model.strict_actions``, poses that do not look like the weights'.
    """
    names, stores, checked = list(episodes), [], list[ActionStat]()
    for weights in models:
        scale = scale_of(settings, store, weights, quiet=quiet)
        if all(scale_differences(scale.stat, other) for other in checked):
            check_poses(settings, store, scale, split=split, episodes=names, quiet=quiet)
            checked.append(scale.stat)
        stores.append(store.scaled_by(replace(scale.stat, names=state_names(len(scale.stat.p01), settings))))
    return stores


def check_poses(
    settings: Settings,
    store: EpisodeStore,
    scale: Scale,
    *,
    split: str = "",
    episodes: Iterable[str] = (),
    quiet: bool = False,
) -> list[str]:
    """Warn, by dimension, if a dataset's poses do not look like those that the weights were trained on.

    Returns:
        The warning's lines (`pose_findings`); [] if the scale is the dataset's own, which says nothing about weights.

    Raises:
        PersistWorldError: there are such lines, and ``model.strict_actions`` is set.
    """
    poses = None if scale.of_data else sample_poses(store, split or settings.eval.split, episodes)
    lines = pose_findings(scale.stat, poses, settings) if poses else []
    if not poses or not lines:
        return lines
    what = "the poses do not look like those that the weights were trained on:\n" + "\n".join(lines)
    where = f"poses: {poses.where}; scale: {scale.origin}"
    fix = (
        "check units (m, rad) and order of the states; to train on this data from scratch, use its own percentiles: "
        f"--set model.stat={store.meta / 'stat.json'}"
    )
    if settings.model.strict_actions:
        raise PersistWorldError(what, where=where, fix=fix)
    if not quiet:
        logger.warning("warning: %s\n  %s\n  to do: %s; --strict-actions refuses this", what, where, fix)
    return lines


def sample_poses(store: EpisodeStore, split: str, episodes: Iterable[str]) -> Poses | None:
    """A few thousand states of a dataset: spread over its index, or from the named episodes (or the split).

    Raises:
        PersistWorldError: a damaged index or annotation.
    """
    path = store.meta / INDEX_FILE
    if path.is_file():
        index = IndexFile(path)
        rows, count = index.states(), int((np.asarray(index.array("lengths")) > 0).sum())
        if rows.shape[0]:
            begins = np.unique(np.linspace(0, max(0, rows.shape[0] - _BLOCK), _BLOCKS).astype(int)).tolist()
            parts = [rows.read(begin, min(begin + _BLOCK, rows.shape[0])) for begin in begins]
            return Poses(np.concatenate(parts).astype(np.float64), count, f"{path} ({count} episodes)")
    names = list(dict.fromkeys(episodes)) or store.episodes(split)
    names = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(len(names), _EPISODES)).astype(int))]
    states = [store.annotation(split, name) for name in names]
    if not states:
        return None
    return Poses(
        np.concatenate([note.states[: note.num_frames] for note in states]),
        len(names),
        f"{store.root}, {len(names)} episode{'s' if len(names) > 1 else ''} of split {split}",
    )


def pose_findings(stat: ActionStat, poses: Poses, settings: Settings | None = None) -> list[str]:
    """One line for each dimension with too many clipped values or another range; [] if all is well.

    The percentiles of an angle that wraps at +-pi span a whole turn: its range is not compared, and nothing between -pi
    and +pi counts as clipped. The range of data that wrap is measured around the circle.
    """
    states, width = poses.states, poses.states.shape[1]
    if width != len(stat.p01):
        return [f"  states have {width} numbers, the scale {len(stat.p01)}"]
    names = state_names(width, settings)
    angles = _ANGLES if names == state_names(len(FRANKA_POSE)) else ()  # in rad
    ranges = np.array([_spread(states[:, i], name in angles) for i, name in enumerate(names)])
    spans = np.maximum(stat.p99 - stat.p01, 1e-8)
    ratios = ranges / spans
    position = [i for i, name in enumerate(names) if name in _POSITION] or list(range(width))
    margin = OUTSIDE * spans if poses.episodes < FEW else np.zeros(width)
    still = poses.episodes < FEW and float(ratios[position].max()) < STILL
    lines = []
    for i, name in enumerate(names):
        turning = name in angles and spans[i] >= _WHOLE_TURN
        low, high = stat.p01[i] - margin[i], stat.p99[i] + margin[i]
        if turning:
            low, high = -math.pi - _SLACK, math.pi + _SLACK
        clipped = float(((states[:, i] < low) | (states[:, i] > high)).mean())
        narrow = ratios[i] < NARROW if poses.episodes >= FEW else still and i in position
        faults = []
        if clipped > CLIPPED:
            faults.append(f"{clipped:.0%} of the values are clipped")
        if not turning and (narrow or ratios[i] > WIDE):
            faults.append(f"the range is {ratios[i]:.2g} times the weights'")
        if faults:
            p01, p99 = np.percentile(states[:, i], [1, 99])
            lines.append(f"  {name:7} data {p01:.4g} .. {p99:.4g}, weights {_range(stat, i)}: {'; '.join(faults)}")
    return lines


def _spread(values: NDArray[np.float64], angle: bool) -> float:
    """p99 - p01; for an angle, the smaller of the linear and the circular range (cut at the widest gap)."""
    low, high = np.percentile(values, [1, 99])
    if not angle:
        return float(high - low)
    around = np.sort(np.mod(values, _TURN))
    gaps = np.diff(np.append(around, around[0] + _TURN))
    cut = around[(int(gaps.argmax()) + 1) % len(around)]
    low2, high2 = np.percentile(np.mod(values - cut, _TURN), [1, 99])
    return float(min(high - low, high2 - low2))
