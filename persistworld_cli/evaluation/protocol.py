"""The protocol: what two results must share to be comparable. Result files also hold the provenance."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from persistworld_cli import __version__
from persistworld_cli.command_line import commit
from persistworld_cli.config.settings import ModelSettings, SamplingSettings, Settings
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.files import flat, hash_of
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.models.cpu.hook import kernels_in_use
from persistworld_cli.models.precision import product_type
from persistworld_cli.rollout.recording import Item
from persistworld_cli.rollout.scoring import ScoringOptions

PROTOCOL = 2  # raise it when the same settings give other numbers
_LIBRARIES = ("torch", "diffusers", "lpips", "scikit-image", "numpy", "scipy", "av")
_HASHED = {"ckpt", "adapter", "inference", "stat"}  # settings of the model whose files' hashes are kept beside
_OF_ALL = {"items", "record", "hash", "fvd", "subset"}  # what no single rollout depends on


def make_protocol(
    settings: Settings,
    store: EpisodeStore,
    items: Sequence[Item],
    scorer: Scorer,
    scoring: ScoringOptions,
    fvd: Mapping[str, Any] | None = None,
    stamp: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that the numbers depend on, except weights and machine; ``hash`` covers all of it.

    A subset of a benchmark (`Benchmark.subset` in ``stamp``) has another protocol than the whole.
    """
    ev, world, model = settings.eval, settings.world, settings.model
    protocol = {
        "protocol": PROTOCOL,
        "split": ev.split,
        "steps": ev.steps,
        "frames_per_step": model.num_frames - 1,
        "rate_hz": world.rate_hz,
        "size": [world.height, world.width],
        "cameras": list(world.cameras),
        "groups": {"exterior": list(world.exterior), "wrist": list(world.wrist)},
        "sampling": describe_sampling(settings.sampling),
        "metrics": {**scorer.describe(), **scoring.describe()},
        "crop": list(ev.crop),
        "colour_range": ev.colour_range,
        "pixel_rounding": world.pixel_rounding if ev.colour_range == "8bit" else "none",
        "reward": {"weights": scorer.weights, "cameras": scorer.camera_weights.tolist()},
        "record": record_hash(store, ev.split, items),
        "items": [[item.episode, item.start, item.seed] for item in items],
    }
    if fvd:
        protocol["fvd"] = dict(fvd)
    if stamp and (part := stamp["subset"]):
        protocol["subset"] = f"{part['episodes']} of the {part['of']} episodes of benchmark {stamp['name']}"
    return {**protocol, "hash": hash_of(protocol)}


def describe_sampling(sampling: SamplingSettings) -> dict[str, Any]:
    """The sampling settings that rollouts depend on; only policies read ``history_policy``."""
    return {key: value for key, value in asdict(sampling).items() if key != "history_policy"}


def rollout_identity(protocol: Mapping[str, Any], store: EpisodeStore, model: ModelSettings) -> dict[str, Any]:
    """What a finished rollout depends on besides the weights. Other rollouts do not matter: more can be added later.

    ``store`` has the percentiles of the weights (`action_scale.weights_stores`).
    """
    stat = store.stat()
    same = {key: value for key, value in protocol.items() if key not in _OF_ALL}
    network = {key: value for key, value in asdict(model).items() if key not in _HASHED}
    return same | {"dataset": str(store.root), "percentiles": [stat.p01, stat.p99], "model": network}


def record_hash(store: EpisodeStore, split: str, items: Sequence[Item]) -> str:
    """SHA-256 of the episodes' instructions, poses and lengths.

    Images are left out: another release of a video encoder writes other bytes for the same recording.
    """
    whole = hashlib.sha256()
    for episode in dict.fromkeys(item.episode for item in items):
        annotation = store.annotation(split, episode)
        states = np.ascontiguousarray(annotation.states)
        whole.update(f"{episode}\0{annotation.text}\0{annotation.num_frames}\0".encode() + states.tobytes())
    return whole.hexdigest()


def check_metrics(wanted: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Any], where: str) -> None:
    """Refuse a benchmark that asks for other metric parameters than this version has. Raises UsageError."""
    for name, parameters in wanted.items():
        for key, value in parameters.items():
            own = metrics.get(name, {}).get(key)
            if own != value:
                raise UsageError(
                    f"the benchmark wants {name} with {key} = {value}, this version computes it with {own}",
                    where=where,
                    fix="use the program version that the benchmark was made with, or another benchmark",
                )


def provenance(settings: Settings, store: EpisodeStore, device: torch.device) -> dict[str, Any]:
    """Date, commit, dataset, device, number type of the network's matrix products, and versions, for result files."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    wanted: torch.dtype = getattr(torch, settings.sampling.dtype)
    used = wanted if settings.sampling.cast == "model" else product_type(device, wanted)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": commit(),
        "dataset": str(store.root),
        "device": str(device),
        "device_name": name,
        "dtype": str(used).removeprefix("torch."),
        "versions": {library: version(library) for library in _LIBRARIES}
        | {"persistworld": __version__, "python": platform.python_version()}
        | {"kernels": "persistworld" if device.type == "cpu" and kernels_in_use() else "torch"},
    }


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value, value) wherever two protocols differ; the hash itself left out."""
    a, b = flat(first), flat(second)
    keys = [key for key in dict.fromkeys([*a, *b]) if key != "hash"]
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def require_same(first: Mapping[str, Any], second: Mapping[str, Any], where: str) -> None:
    """Refuse to compare results of different protocols.

    Raises:
        PersistWorldError: the protocols differ; the message names the keys.
    """
    if apart := differences(first, second):
        lines = [f"{key}: {_words(key, a, b)}" for key, (a, b) in apart.items()]
        raise PersistWorldError(
            "the results cannot be compared because their protocols differ:\n    " + "\n    ".join(lines),
            where=where,
            fix="run both under one benchmark (persistworld eval --benchmark NAME)",
        )


def _words(key: str, a: Any, b: Any) -> str:
    """One difference in words; rollouts are counted, not listed."""
    if key == "items":
        one, two = ({tuple(item) for item in part or ()} for part in (a, b))
        return f"{len(one)} rollouts and {len(two)}, {len(one & two)} of them the same"
    return f"{_short(a)} and {_short(b)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
