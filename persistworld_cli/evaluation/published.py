"""Published figures, which `persistworld verify` compares with its own (presets/published/*.toml).

A file holds ``description``; tables ``[exterior]`` and ``[wrist]`` with means over episodes of ``ssim``, ``psnr`` and
``lpips``; ``[tolerance.GROUP]``, how far a published figure may lie outside the measured interval; ``[widest.GROUP]``,
the largest half width of an interval that still decides. Optional:

- ``stat`` (percentiles that scale actions), ``dtype`` (of the weights in their file), ``weights`` (SHA-256 of their
  files, and of the adapter's after a +), ``lpips_backbone`` (``trained``, the default, or ``untrained``);
- ``[gain.GROUP]``, the gain over the base, rollout by rollout;
- if the same rollouts can be repeated: ``protocol`` (hash), ``items`` (episode, start, seed), ``[rollouts.GROUP]``
  (lists, one per metric) and ``[same.GROUP]``, the largest mean difference at which a rollout counts as the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli

from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.errors import PersistWorldError, UsageError, nearest
from persistworld_cli.files import write_text
from persistworld_cli.read_files import reading

METRICS = ("ssim", "psnr", "lpips")
GROUPS = ("exterior", "wrist")
TRAINED, UNTRAINED = "trained", "untrained"
Figures = dict[str, dict[str, float]]  # group -> metric -> value
Item = tuple[str, int, int]  # episode, start, seed
_TABLES = ("tolerance", "widest", "gain", "same")
_TEXTS = ("stat", "dtype", "weights", "protocol")
_KEYS = ("description", *_TEXTS, "lpips_backbone", "items", "rollouts", *GROUPS, *_TABLES)
# Written into our own files: other hardware and other releases round differently.
_SAME = {"ssim": 0.002, "psnr": 0.05, "lpips": 0.002}
_TOLERANCE = {"ssim": 0.01, "psnr": 0.25, "lpips": 0.01}
_WIDEST = {"ssim": 0.1, "psnr": 3.0, "lpips": 0.1}


@dataclass(frozen=True)
class Published:
    """A file of figures; the module docstring explains each attribute."""

    path: Path
    description: str
    figures: Figures
    tolerance: Figures
    widest: Figures
    gain: Figures = field(default_factory=dict)
    stat: str = ""
    dtype: str = ""
    weights: str = ""
    lpips: str = TRAINED
    protocol: str = ""
    items: tuple[Item, ...] = ()
    rollouts: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    same: Figures = field(default_factory=dict)


def load_published(name: str) -> Published:
    """Read a file of figures.

    Raises:
        UsageError: no file was named, it does not exist, or it is not a file of figures.
    """
    if not name:
        raise UsageError(
            "no figures to compare with",
            where="eval.published",
            fix="--published FILE.toml, or write one from weights that you trust: --write-published FILE.toml",
        )
    path = resolve_path(name)
    with reading("cannot read the figures", path, "give a TOML file of figures", UsageError):
        data = tomli.loads(path.read_text(encoding="utf-8"))
        for key in data:
            if key not in _KEYS:
                raise UsageError(f"unknown key '{key}'", where=str(path), fix=nearest(key, _KEYS))
        figures = _groups({group: data[group] for group in GROUPS if group in data}, path, "")
        if not figures:
            raise UsageError("neither [exterior] nor [wrist]", where=str(path), fix="state the figures of cameras")
        tables = {name: _groups(data.get(name, {}), path, name) for name in _TABLES}
        items = tuple((str(episode), int(start), int(seed)) for episode, start, seed in data.get("items", ()))
        rollouts = data.get("rollouts", {})
        needed = {"tolerance": tables["tolerance"], "widest": tables["widest"]}
        for table, given in (needed | ({"same": tables["same"], "rollouts": rollouts} if items else {})).items():
            for group, own in figures.items():
                if lacking := [metric for metric in own if metric not in given.get(group, {})]:
                    raise UsageError(f"[{table}.{group}] does not state {', '.join(lacking)}", where=str(path))
        own_keys: dict[str, Any] = {key: str(data[key]) for key in _TEXTS if key in data}
        return Published(
            path=path,
            description=str(data.get("description", path.stem)),
            figures=figures,
            lpips=str(data.get("lpips_backbone", TRAINED)),
            items=items,
            rollouts=rollouts,
            **own_keys | tables,
        )


def has_gain(name: str) -> bool:
    """Whether the file states a gain over the base, so that the base is rolled out too; False without a file."""
    try:
        return bool(load_published(name).gain)
    except PersistWorldError:  # reported by the load that precedes the comparison
        return False


def _groups(tables: Any, path: Path, name: str) -> Figures:
    """Tables of numbers, checked. Raises UsageError."""
    out: Figures = {}
    for group, entries in tables.items() if isinstance(tables, Mapping) else ():
        where = f"[{name}.{group}]" if name else f"[{group}]"
        if group not in GROUPS or not isinstance(entries, Mapping):
            raise UsageError(f"unknown table {where}", where=str(path), fix=nearest(group, GROUPS))
        for metric, value in entries.items():
            if metric not in METRICS or not isinstance(value, int | float):
                raise UsageError(f"{where} {metric} = {value!r}", where=str(path), fix=f"numbers: {', '.join(METRICS)}")
        out[group] = {metric: float(value) for metric, value in entries.items()}
    return out


def write_published(
    path: Path,
    *,
    description: str,
    figures: Figures,
    gain: Figures,
    rollouts: Mapping[str, Mapping[str, list[float]]],
    items: list[Item],
    protocol: str,
    dtype: str,
    weights: str,
    lpips: str,
    stat: Path,
) -> None:
    """Write the measured figures as a file of figures, whole or not at all. Raises CannotWrite."""
    texts = {"description": description, "dtype": dtype, "weights": weights, "lpips_backbone": lpips, "stat": str(stat)}
    top = texts | {"protocol": protocol, "items": [list(item) for item in items]}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in top.items()]
    tables: dict[str, Mapping[str, Any]] = dict(figures)
    for name, values in (("tolerance", _TOLERANCE), ("widest", _WIDEST), ("same", _SAME)):
        tables |= {f"{name}.{group}": {metric: values[metric] for metric in own} for group, own in figures.items()}
    tables |= {f"gain.{group}": own for group, own in gain.items()}
    tables |= {f"rollouts.{group}": own for group, own in rollouts.items()}
    for name, entries in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in entries.items())]
    write_text(path, "\n".join(lines) + "\n")
