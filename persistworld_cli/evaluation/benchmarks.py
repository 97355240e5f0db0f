"""Benchmarks: files that pin what two results must share to be compared (presets/benchmarks/*.toml).

A file holds ``version`` (raised whenever the benchmark changes), ``description``, tables of settings with the names
that presets use, and ``[metrics.NAME]`` with the exact parameters of each metric. It overrides the preset; environment
and flags override the file, and the result then names what they changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persistworld_cli.config.bundled import bundled_root, resolve_path
from persistworld_cli.config.presets import Pinned, flatten
from persistworld_cli.config.settings import Settings
from persistworld_cli.errors import UsageError, nearest
from persistworld_cli.files import jsonable
from persistworld_cli.read_files import read_toml

NONE = "none"
FOLDER = "presets/benchmarks"
# What a benchmark must set, so that it depends on no preset and no default.
REQUIRED = (
    *("world.cameras", "world.exterior", "world.wrist", "world.height", "world.width", "world.rate_hz"),
    *("sampling.sampler", "sampling.steps", "sampling.guidance", "sampling.sigma_min", "sampling.sigma_max"),
    *("sampling.rho", "sampling.noise_aug", "sampling.history", "sampling.buffer_fill", "sampling.decode_chunk"),
    *("sampling.decode_dtype", "sampling.dtype", "sampling.cast", "rewards.weights", "rewards.lpips_net"),
    *("eval.split", "eval.episodes", "eval.starts", "eval.steps", "eval.seeds", "eval.crop", "eval.colour_range"),
    "eval.moving_threshold",
)
OPTIONAL = ("world.pixel_rounding", "rewards.camera_weights", "eval.following", "eval.following_steps")
METRICS = ("ssim", "psnr", "lpips", "psnr_moving")
_META = ("version", "description", "source", "metrics")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark file.

    Attributes:
        name: the file's name without suffix.
        version: the benchmark's version.
        sha256: hash of the file.
        pinned: the settings that the file sets, in the form that `load_settings` takes.
        metrics: metric -> its parameters.
        path: the file.
        source: hub id of the raw LeRobot dataset (v2.x) with its episodes; "" if the file names none.
    """

    name: str
    version: int
    sha256: str
    pinned: Pinned
    metrics: dict[str, dict[str, Any]]
    path: Path
    source: str = ""

    def subset(self, settings: Settings, there: Collection[str]) -> dict[str, Any] | None:
        """The label of a run on some of the benchmark's episodes; None for all of them, or for other episodes.

        Args:
            settings: the run's settings; episodes that the user names are not a subset of the benchmark.
            there: episodes that can be run.

        Returns:
            ``episodes`` and ``of`` (numbers), ``absent`` (ids) and ``fetch``: the command for the rest ("" unknown).
        """
        own = dict(self.pinned.values)["eval.episodes"]
        absent = [episode for episode in own if episode not in there]
        if not absent or list(settings.eval.episodes) != own:
            return None
        return {"episodes": len(own) - len(absent), "of": len(own), "absent": absent, "fetch": self.fetch(absent)}

    def fetch(self, episodes: Sequence[str]) -> str:
        """The command that downloads the raw recordings of these episodes; "" if `source` is not known."""
        if not self.source or not all(episode.isdecimal() for episode in episodes):
            return ""
        files = " ".join(f"--include '*/episode_{int(episode):06d}.*'" for episode in episodes)
        folder = self.source.rpartition("/")[2]
        return f"hf download {self.source} --repo-type dataset --local-dir data/{folder} --include 'meta/*' {files}"

    def stamp(self, settings: Settings, there: Collection[str]) -> dict[str, Any]:
        """The benchmark's entry in a result: name, version, hash, changes (key -> [pinned, used]), `subset`."""
        used = jsonable(flatten(settings))
        changed = {key: [value, used[key]] for key, value in self.pinned.values if value != used[key]}
        own = {"name": self.name, "version": self.version, "sha256": self.sha256}
        return {**own, "changed": changed, "subset": self.subset(settings, there)}


def benchmark_names() -> list[str]:
    """Names of the shipped benchmarks."""
    return sorted(path.stem for path in (bundled_root() / FOLDER).glob("*.toml"))


def load_benchmark(name: str) -> Benchmark | None:
    """A shipped benchmark by name, or your own by the path of its file; None for "" and "none".

    Raises:
        UsageError: no such benchmark, not TOML, a missing key, or a key that a benchmark cannot have.
    """
    if name in ("", NONE):
        return None
    path = _path(name)
    text, data = read_toml(path)
    version, metrics = data.get("version"), data.get("metrics", {})
    if type(version) is not int or version < 1:
        raise UsageError(
            f"version = {version!r} is not a whole number from 1", where=str(path), fix="write version = 1 at the top"
        )
    source = data.get("source", "")
    if not isinstance(source, str):
        raise UsageError(f"source = {source!r} is not a hub id", where=str(path), fix="write source = 'owner/name'")
    _check_metrics(metrics, path)
    tables = {key: value for key, value in data.items() if key not in _META}
    if strays := [key for key, value in tables.items() if not isinstance(value, dict)]:
        raise UsageError(f"unknown key '{strays[0]}'", where=str(path), fix=nearest(strays[0], _META))
    values = tuple((f"{table}.{key}", value) for table, entries in tables.items() for key, value in entries.items())
    _check_keys([key for key, _ in values], path)
    pinned = Pinned(values, f"benchmark {path.stem}", path, text)
    return Benchmark(path.stem, version, hashlib.sha256(text.encode()).hexdigest(), pinned, metrics, path, source)


def _path(name: str) -> Path:
    """The file for a name or path. Raises UsageError if there is none."""
    if name.endswith(".toml") or "/" in name or name.startswith("bundled:"):
        path, fix = resolve_path(name), "give the path of a TOML file"
        if not path.is_file():
            raise UsageError(f"no benchmark file '{name}'", where=str(path.absolute()), fix=fix)
        return path
    path = bundled_root() / FOLDER / f"{name}.toml"
    if not path.is_file():
        fix = nearest(name, [*benchmark_names(), NONE])
        raise UsageError(f"unknown benchmark '{name}'", where="--benchmark", fix=fix)
    return path


def _check_keys(keys: list[str], path: Path) -> None:
    """Refuse keys that a benchmark may not set (weights, processes), and a file that leaves a required key out."""
    allowed = (*REQUIRED, *OPTIONAL)
    for key in keys:
        if key not in allowed:
            raise UsageError(f"a benchmark cannot set '{key}'", where=str(path), fix=nearest(key, allowed))
    if missing := [key for key in REQUIRED if key not in keys]:
        raise UsageError(
            f"the benchmark does not set {', '.join(missing[:6])}{' and more' if len(missing) > 6 else ''}",
            where=str(path),
            fix="set these keys: a benchmark depends on no preset and no default",
        )


def _check_metrics(metrics: Any, path: Path) -> None:
    if not isinstance(metrics, dict) or not all(isinstance(entry, dict) for entry in metrics.values()):
        what, fix = "[metrics] must hold a table for each metric", f"write [metrics.{METRICS[0]}] and its parameters"
        raise UsageError(what, where=str(path), fix=fix)
    for name in METRICS:
        if name not in metrics:
            raise UsageError(f"[metrics.{name}] is missing", where=str(path), fix="state the parameters of all metrics")
    for name in metrics:
        if name not in METRICS:
            raise UsageError(f"unknown metric '{name}'", where=str(path), fix=nearest(name, METRICS))
