"""Presets (TOML) -> validated, frozen `Settings`, with the layer that each value came from.

Precedence, lowest first: default < preset (and what it extends) < environment < ``--set`` < flag.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args, get_origin

from persistworld_cli.config.bundled import bundled_root, resolve_path
from persistworld_cli.config.check import check
from persistworld_cli.config.fields import coerce, field_types, parse_text
from persistworld_cli.config.settings import Settings, setting_types
from persistworld_cli.errors import UsageError, nearest
from persistworld_cli.files import jsonable
from persistworld_cli.read_files import read_toml

DEFAULT_PRESET = "tiny"
ENV_PREFIX = "PERSISTWORLD_"
# settings of older versions -> what replaces them
_RENAMED = {
    "drive.step_m": "drive.step = { x = 0.08, y = 0.08, z = 0.08 }",
    "drive.gripper_open": 'drive.keys.o = "gripper=0 open"',
    "drive.gripper_closed": 'drive.keys.c = "gripper=0.7 close"',
    "drive.workspace_low": "robot.limits = { x = [0.3, 0.8], y = [-0.5, 0.5], z = [0.01, 0.5] }",
    **dict.fromkeys(
        ("policy.camera", "policy.wrist_camera"),
        'policy.images = { "observation/exterior_image_1_left" = "exterior_2_left" }, field of an observation = camera',
    ),
    "drive.workspace_high": "robot.limits = { x = [0.3, 0.8], y = [-0.5, 0.5], z = [0.01, 0.5] }",
    "policy.layout": "no layout: any number of rows is taken, and policy.actions says what they mean",
}
_OLD_NAMES = {"policy.adapter": "policy.joint_velocity_adapter"}  # still read
_META_KEYS = ("extends", "description")  # what a preset may have beside its tables


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Settings, and for every dotted key the layer it came from."""

    settings: Settings
    origin: dict[str, str]
    preset: str  # name or path of the preset
    implied: bool  # no preset was named: the bundled world's is used

    @property
    def label(self) -> str:
        """The preset's name without folder and suffix, for output folders."""
        return Path(self.preset).stem if self.preset.endswith(".toml") else self.preset


@dataclass(frozen=True)
class Pinned:
    """A layer from another file (a benchmark's): (dotted key, value) pairs, its name, the file and its text."""

    values: tuple[tuple[str, Any], ...]
    origin: str
    path: Path
    text: str

    def where(self, key: str) -> str:
        """File and line of a key."""
        table, _, name = key.partition(".")
        return _place(self.path, self.text, table, name)


@dataclass(frozen=True)
class _Value:
    """A value of a layer, the layer's name, and where it was written, for messages."""

    value: Any
    origin: str
    where: str
    shipped: bool = False  # by a preset of this program


def preset_names() -> list[str]:
    """Names of the bundled presets."""
    return sorted(path.stem for path in (bundled_root() / "presets").glob("*.toml"))


def load_settings(
    preset: str | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    env: Mapping[str, str] = os.environ,
) -> Settings:
    """The settings of `resolve_settings`, without their origins: ``load_settings("tiny", ["eval.steps=4"])``."""
    return resolve_settings(preset, sets, flags, env).settings


def resolve_settings(
    preset: str | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    env: Mapping[str, str] = os.environ,
    flag_names: Mapping[str, str] | None = None,
    pinned: Pinned | None = None,
) -> Resolved:
    """Settings of a preset with everything that overrides it, checked.

    Args:
        preset: bundled name or path of a TOML file; None: the bundled world's.
        sets: ``table.key=value`` as given to ``--set``; the value is TOML, or a plain string.
        flags: dotted key -> value; None values are flags that were not given.
        env: environment; ``PERSISTWORLD_POST_TRAIN__BETA`` sets ``post_train.beta``.
        flag_names: dotted key -> the flag's spelling, if it is not ``--<key>``.
        pinned: a layer between preset and environment (a benchmark's).

    Raises:
        UsageError: unknown preset or key, wrong type, value out of range, a cycle of ``extends``.
    """
    name = preset if preset is not None else DEFAULT_PRESET
    layers: dict[str, _Value] = {}
    _read_preset(name, layers)
    with _layer(layers):
        if pinned:
            for key, value in pinned.values:
                layers[key] = _Value(_typed(key, value, pinned.where(key)), pinned.origin, pinned.where(key))
        _add_environment(layers, env)
    with _layer(layers):
        for item in sets:
            _add_set(layers, item)
    with _layer(layers):
        for key, value in (flags or {}).items():
            if value is not None:
                spelling = (flag_names or {}).get(key) or "--" + key.rpartition(".")[2].replace("_", "-")
                layers[key] = _Value(_typed(key, value, spelling), spelling, spelling)
    _note_given_stat(layers)
    origin = dict.fromkeys(flatten(Settings()), "default") | {key: v.origin for key, v in layers.items()}
    settings = _build({key: v.value for key, v in layers.items()})
    check(settings, {key: v.where for key, v in layers.items()})
    return Resolved(settings=settings, origin=origin, preset=name, implied=preset is None)


def _note_given_stat(layers: dict[str, _Value]) -> None:
    """Record that the user set the percentiles: only a shipped preset's give way to the weights' own."""
    stat = layers.get("model.stat")
    said = layers.get("model.stat_given")  # a file with every setting says both
    if stat is not None and stat.value and not stat.shipped and (said is None or said.origin != stat.origin):
        layers["model.stat_given"] = _Value(True, f"model.stat, {stat.origin}", stat.where)


def flatten(settings: Settings) -> dict[str, Any]:
    """``table.key`` -> value, in the order of the classes."""
    return {key: attrgetter(key)(settings) for key in setting_types()}


def to_json(settings: Settings) -> dict[str, dict[str, Any]]:
    """Settings as plain tables that `json` writes (tuples become lists); `from_json` gives the same settings back."""
    tables: dict[str, dict[str, Any]] = {}
    for key, value in flatten(settings).items():
        table, _, name = key.partition(".")
        tables.setdefault(table, {})[name] = jsonable(value)
    return tables


def from_json(tables: Mapping[str, Mapping[str, Any]], where: str = "config.json") -> Settings:
    """The settings that `to_json` wrote, validated as a preset is. Raises UsageError."""
    values = {
        key: _typed(key, value, where)
        for table, entries in tables.items()
        for key, value in _dotted(table, entries, where)
    }
    settings = _build(values)
    check(settings, dict.fromkeys(values, where))
    return settings


def _build(values: Mapping[str, Any]) -> Settings:
    """Settings with the given (already typed) values in place of the defaults."""
    tables = {}
    for table, cls in field_types(Settings).items():
        tables[table] = cls(**{key.partition(".")[2]: v for key, v in values.items() if key.startswith(f"{table}.")})
    return Settings(**tables)


def _typed(key: str, value: Any, where: str) -> Any:
    """``value`` as the type of setting ``key``. Raises UsageError for an unknown key or a wrong type."""
    types = setting_types()
    if key not in types:
        raise _unknown_key(key, where)
    return coerce(value, types[key], key=key, where=where)


def _unknown_key(key: str, where: str) -> UsageError:
    """The error for a key that no table has, naming the nearest one that exists."""
    known = list(setting_types())
    if key in _RENAMED:
        return UsageError(f"'{key}' has been replaced", where=where, fix=f"write {_RENAMED[key]}")
    table, _, name = key.partition(".")
    tables = sorted({k.partition(".")[0] for k in known})
    if table not in tables:
        # Only the table may be missing or misspelt.
        same = [k for k in known if k.endswith("." + (name or table))]
        hint = f"did you mean '{same[0]}'?" if same else nearest(table, tables)
        return UsageError(f"unknown table '{table}'" if name else f"unknown key '{table}'", where=where, fix=hint)
    inside = [k for k in known if k.startswith(table + ".")]
    if not difflib.get_close_matches(key, inside, n=1, cutoff=0.8):
        moved = [k for k in known if k.endswith("." + name)]
        if moved:
            return UsageError(f"unknown key '{key}'", where=where, fix=f"did you mean '{moved[0]}'?")
    return UsageError(f"unknown key '{key}'", where=where, fix=nearest(key, inside))


def _dotted(table: str, entries: Any, where: str) -> list[tuple[str, Any]]:
    """A TOML table as (dotted key, value) pairs."""
    if not isinstance(entries, Mapping):
        raise _unknown_key(table, where)
    return [(_todays(f"{table}.{name}"), value) for name, value in entries.items()]


def _todays(key: str) -> str:
    """A setting's name today."""
    return _OLD_NAMES.get(key, key)


def _preset_path(name: str) -> Path:
    """The file of a bundled preset, or of a path. Raises UsageError."""
    if name.endswith(".toml") or "/" in name or name.startswith("bundled:"):
        path = resolve_path(name)
        if not path.is_file():
            raise UsageError(f"no preset file '{name}'", where=str(path.absolute()), fix="give the path of a TOML file")
        return path
    path = bundled_root() / "presets" / f"{name}.toml"
    if not path.is_file():
        raise UsageError(f"unknown preset '{name}'", where="--preset", fix=nearest(name, preset_names()))
    return path


def _read_preset(name: str, layers: dict[str, _Value], chain: tuple[Path, ...] = ()) -> None:
    """Add a preset's values to ``layers``, after those of the preset it extends."""
    path = _preset_path(name).resolve()
    if path in chain:
        what = "presets extend one another in a circle: " + " -> ".join(p.name for p in (*chain, path))
        raise UsageError(what, where=str(path), fix="remove one 'extends'")
    text, data = read_toml(path)
    for key in _META_KEYS:
        if key in data and not isinstance(data[key], str):
            what = f"'{key}' must be a string, not {data[key]!r}"
            raise UsageError(what, where=_place(path, text, "", key), fix="write it in quotes")
    if "extends" in data:
        parent = data["extends"]
        beside = path.parent / parent
        _read_preset(str(beside) if beside.is_file() else parent, layers, (*chain, path))
    shipped = path.parent == (bundled_root() / "presets").resolve()
    label = f"preset {name if shipped else path}"
    with _layer(layers):
        for table in [table for table in data if table not in _META_KEYS]:
            for key, value in _dotted(table, data[table], _place(path, text, "", table)):
                where = _place(path, text, table, key.partition(".")[2])
                layers[key] = _Value(_typed(key, value, where), label, where, shipped)


# weights -> those of an earlier layer that they replace
_REPLACED = {"model.ckpt": "model.inference", "model.adapter": "model.inference", "model.inference": "model.adapter"}


@contextmanager
def _layer(layers: dict[str, _Value]) -> Iterator[None]:
    """The block writes one layer. The weights it names replace those of earlier layers: ``--set model.ckpt`` replaces a
    preset's ``model.inference``.
    """
    below = dict(layers)
    yield
    written = [key for key in _REPLACED if key in layers and layers[key] is not below.get(key)]
    for key in written:
        other, by = _REPLACED[key], layers[key]
        if other not in written and other in layers and layers[other].value:
            layers[other] = _Value("", f"left out: {key} is set later ({by.origin})", by.where)


def _place(path: Path, text: str, table: str, key: str) -> str:
    """``file:line`` of a key, found by its spelling (inline tables point to their line); else the file."""
    current = ""
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if line.startswith("["):
            current = line.strip("[]").split("]")[0].replace(" ", "")
            if current in (f"{table}.{key}", key if not table else ""):
                return f"{path}:{number}"
            continue
        name = line.partition("=")[0].replace(" ", "").replace('"', "")
        spelled = f"{current}.{name}" if current else name
        if "=" in line and f"{spelled}.".startswith(f"{table}.{key}." if table else f"{key}."):
            return f"{path}:{number}"
    return str(path)


def _add_environment(layers: dict[str, _Value], env: Mapping[str, str]) -> None:
    """Overrides named ``PERSISTWORLD_<TABLE>__<KEY>``; other PERSISTWORLD_ variables are not settings."""
    for variable in sorted(env):
        table, mark, name = variable.removeprefix(ENV_PREFIX).partition("__")
        if not variable.startswith(ENV_PREFIX) or not mark:
            continue
        origin = f"environment {variable}"
        _add_text(layers, f"{table.lower()}.{name.lower()}", env[variable], origin, origin)


def _add_set(layers: dict[str, _Value], item: str) -> None:
    """One ``table.key=value`` of ``--set``."""
    key, mark, text = item.partition("=")
    if not mark or "." not in key:
        raise UsageError(f"'{item}' is not table.key=value", where="--set", fix="write --set post_train.beta=0.5")
    _add_text(layers, key.strip(), text.strip(), "--set", f"--set {item}")


def _add_text(layers: dict[str, _Value], key: str, text: str, origin: str, where: str) -> None:
    """A value written as text; ``table.dict.entry=value`` changes one entry of a setting that is a table itself."""
    types, key = setting_types(), _todays(key)
    table, name, *rest = key.split(".")
    base = f"{table}.{name}"
    if rest and base in types and get_origin(types[base]) is dict:
        before = layers[base].value if base in layers else flatten(Settings())[base]
        entry = get_args(types[base])[1]
        names = rest if entry is Any else [".".join(rest)]  # rewards.weights.package.module:Class
        key, value = base, _merge_entry(before, names, parse_text(text, entry), where)
    elif key in types:
        value = parse_text(text, types[key])
    else:
        raise _unknown_key(key, where)
    layers[key] = _Value(_typed(key, value, where), origin, where)


def _merge_entry(before: Mapping[str, Any], path: Sequence[str], value: Any, where: str) -> dict[str, Any]:
    """A copy of ``before`` with the entry at ``path`` replaced."""
    head, *rest = path
    if not rest:
        return {**before, head: value}
    inner = before.get(head, {})
    if not isinstance(inner, Mapping):
        raise UsageError(f"'{head}' is a value, not a table", where=where, fix="set the value itself")
    return {**before, head: _merge_entry(inner, rest, value, where)}
