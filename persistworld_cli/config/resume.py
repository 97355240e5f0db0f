"""Which settings of a saved run may change when it is resumed, by task, and how two sets of settings differ.

Whether a setting may change is declared with it (`free` in config/settings.py). This module lists the settings and
request fields that each task uses; only these are compared.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persistworld_cli.config.fields import FREE
from persistworld_cli.config.settings import ClipSettings, Settings, setting_types

_EXTRACTION = ("world.raw", "world.state_fields", "world.joint_fields", "world.val_rule")
_STARTS = ("eval.split", "eval.starts", "eval.seeds")  # of the held-out rollouts of a training
_LAUNCH = ("launch.num_processes", "launch.device", "launch.compile", "launch.tf32", "launch.trackers")
_CLIPS = tuple(f"clips.{field.name}" for field in dataclasses.fields(ClipSettings))
_POLICY = ("sampling.history_policy",)


@dataclass(frozen=True)
class Uses:
    """What the result of a resumable task depends on.

    Attributes:
        tables: whole tables of settings.
        keys: single settings of other tables; they may not change, even if they are `free`.
        unused: settings of those tables that the task does not read.
        logged: settings of other tables that affect only what is logged; they may change.
        request: fields of the request that change the result.
        follows_weights: results are stored by the content of the weights, so the weights' files may change.
    """

    tables: tuple[str, ...]
    keys: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    logged: tuple[str, ...] = ()
    request: tuple[str, ...] = ()
    follows_weights: bool = False


_ROLLOUTS = Uses(
    tables=("world", "model", "sampling", "rewards", "eval"),
    unused=(*_EXTRACTION, *_POLICY),
    request=("baseline",),
    follows_weights=True,
)
USES: dict[str, Uses] = {
    "pretrain": Uses(
        tables=("world", "model", "sampling", "rewards", "clips", "pretrain"),
        keys=_STARTS,
        unused=(*_EXTRACTION, *_POLICY, "model.inference"),
        request=("scratch", "vae"),
    ),
    "pretrain-vae": Uses(
        tables=("vae",),
        keys=(
            *("world.raw", "world.cameras", "world.height", "world.width", "world.rate_hz"),
            *("model.vae", "model.norm_groups", "model.ckpt"),
        ),
    ),
    "post-train": Uses(
        tables=("world", "model", "sampling", "rewards", "post_train"),
        keys=_STARTS,
        unused=(*_EXTRACTION, *_POLICY, "model.adapter", "model.inference"),
        logged=_CLIPS,  # clips that only measure whether the model uses actions
    ),
    "eval": _ROLLOUTS,
    "frontier": dataclasses.replace(_ROLLOUTS, request=(*_ROLLOUTS.request, "reference")),
}
# Settings that name a file or folder: compared by place and content, not by spelling.
PATHS = (
    *("world.dataset", "world.raw", "model.ckpt", "model.adapter", "model.inference", "model.stat", "model.tokenizer"),
    *("rewards.lpips_backbone", "request.baseline", "request.vae"),
)


@dataclass(frozen=True)
class Change:
    """One difference between a saved run and the requested one."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_text(self.old)} -> {_text(self.new)}"


@dataclass(frozen=True)
class Changes:
    """How the requested run differs from a saved one.

    Attributes:
        refused: changes that would change the result.
        free: changes that are allowed.
        unknown: settings that only one of the two runs has (another version of the program).
    """

    refused: list[Change]
    free: list[Change]
    unknown: list[Change]

    def __bool__(self) -> bool:
        return bool(self.refused or self.free or self.unknown)


def used_keys(task: str) -> list[str]:
    """Dotted names of the settings that are compared for a task, and ``request.NAME`` for fields of its request."""
    uses = USES[task]
    own = [key for key in setting_types() if key.partition(".")[0] in uses.tables and key not in uses.unused]
    return [*own, *uses.keys, *uses.logged, *_LAUNCH, *(f"request.{name}" for name in uses.request)]


def is_free(task: str, key: str) -> bool:
    """Whether a run of the task may be resumed with another value of the setting."""
    table, _, name = key.partition(".")
    if key in USES[task].logged:
        return True
    if table == "request" or key in USES[task].keys:
        return False
    whole = Settings.__dataclass_fields__[table]
    own = getattr(Settings(), table).__dataclass_fields__[name]
    return FREE in (dict(whole.metadata), dict(own.metadata))


def find_changes(task: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """What differs between two records of runs of one task.

    Args:
        task: a key of `USES`.
        before, now: as config.json holds a run: ``settings``, ``request``, ``inputs`` (see config.inputs; older runs
            have none).
    """
    changes = Changes([], [], [])
    for key in used_keys(task):
        old, new = _value(before, key), _value(now, key)
        known = not key.startswith("request.")
        if known and old is _ABSENT:
            changes.unknown.append(Change(key, None, new))
            continue
        change = _difference(key, old, new, before.get("inputs"), now.get("inputs"))
        if change is None:
            continue
        same_place = change.key != key  # only the file's content has changed
        allowed = is_free(task, key) or (same_place and USES[task].follows_weights)
        (changes.free if allowed else changes.refused).append(change)
    known_keys = set(_flat(now.get("settings", {})))
    for key in _flat(before.get("settings", {})):
        if key not in known_keys and key.partition(".")[0] in USES[task].tables:
            changes.unknown.append(Change(key, _value(before, key), None))
    return changes


def with_todays_names(record: Mapping[str, Any]) -> dict[str, Any]:
    """A saved record with today's names; older records call the request ``job``."""
    if "job" not in record:
        return dict(record)
    new = {"request" if key == "job" else key: value for key, value in record.items()}
    if inputs := new.get("inputs"):
        new["inputs"] = {re.sub(r"^job\.", "request.", key): value for key, value in inputs.items()}
    return new


_ABSENT = object()


def _value(record: Mapping[str, Any], key: str) -> Any:
    table, _, name = key.partition(".")
    if table == "request":
        return record.get("request", {}).get(name)
    return record.get("settings", {}).get(table, {}).get(name, _ABSENT)


def _flat(tables: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [f"{table}.{name}" for table, entries in tables.items() for name in entries]


def _difference(
    key: str, old: Any, new: Any, before: Mapping[str, Any] | None, now: Mapping[str, Any] | None
) -> Change | None:
    """The change of one setting, or None; files are compared by content if it is recorded."""
    then, here = (before or {}).get(key), (now or {}).get(key)
    if then is None or here is None:
        same = old == new or (key.startswith("request.") and not old and not new)
        return None if same else Change(key, old, new)
    digests = [side.get("sha256") for side in (then, here)]
    if all(digests):
        same = digests[0] == digests[1]
    else:
        same = all(then.get(name) == here.get(name) for name in ("path", "bytes", "modified"))
    if same:
        return None
    if then["path"] != here["path"]:
        return Change(key, then["path"], here["path"])
    what = [
        digest[:12] if digest else f"{side.get('bytes')} bytes of {side.get('modified')}"
        for digest, side in zip(digests, (then, here), strict=True)
    ]
    return Change(f"{key}, what {here['path']} holds", *what)


def _text(value: Any) -> str:
    """A value in a message."""
    if value is None or value == "" or value == []:
        return "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = ", ".join(map(str, value))
    return str(value)
