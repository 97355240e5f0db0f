"""Which weights are compared, and how a result proves it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from persistworld_cli.checkpoints.loading import load_for_sampling
from persistworld_cli.checkpoints.sources import locate
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.settings import ModelSettings, Settings
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.models.world_model import WorldModel

_BLOCK = 1 << 22


@dataclass(frozen=True)
class ModelRef:
    """One model of a comparison.

    Attributes:
        label: its name in tables.
        ckpt: weights: a file, a folder, a hub id, ``bundled:NAME``.
        adapter: PEFT folder on top, or "".
    """

    label: str
    ckpt: str
    adapter: str = ""

    def fingerprint(self) -> dict[str, str]:
        """``{"ckpt": sha256, "adapter": sha256}`` of the files that are loaded; "" for none."""
        return {"ckpt": sha256_of(self.ckpt), "adapter": sha256_of(self.adapter)}


def adapter_folder(path: str) -> str:
    """The PEFT folder that a path means: itself, or ``adapter`` in a run's ``weights``; "" where neither is one."""
    for folder in (path, f"{path.rstrip('/')}/adapter") if path and _on_disk(path) else ():
        if _on_disk(f"{folder}/adapter_config.json"):
            return folder
    return ""


def _on_disk(path: str) -> bool:
    """Whether a path, ``bundled:NAME`` among them, is there."""
    try:
        return resolve_path(path).exists()
    except PersistWorldError:  # a bundled name that is not shipped
        return False


NO_ADAPTER = ("base", "none")  # words for "the checkpoint as it is" where an adapter or a baseline is named


def model_ref(label: str, weights: str, model: ModelSettings) -> ModelRef:
    """A model from one path: a PEFT folder goes on top of the settings' checkpoint, anything else replaces it."""
    adapter = adapter_folder(weights)
    return ModelRef(label, model.ckpt, adapter) if adapter else ModelRef(label, weights)


def refs_of_eval(model: ModelSettings, job: Mapping[str, Any]) -> list[ModelRef]:
    """The baseline, then the model that is judged; the latter alone where there is nothing to compare it with.

    Judged: ``job["ckpt"]`` (weights, or a PEFT folder), else the settings' checkpoint and adapter. Baseline:
    ``job["baseline"]`` ("base": the judged checkpoint without adapter; weights; a PEFT folder) and
    ``job["baseline_adapter"]``; with neither, the judged checkpoint without its adapter.

    Raises:
        UsageError: no weights at all, or a model compared with itself.
    """
    adapter = "" if model.adapter in NO_ADAPTER else adapter_folder(model.adapter) or model.adapter
    judged = model_ref("", job["ckpt"], model) if job.get("ckpt") else ModelRef("", model.ckpt, adapter)
    if not judged.ckpt:
        raise UsageError("no weights to evaluate", where="model.ckpt", fix="take a preset, or give --ckpt")
    named, overlay = job.get("baseline") or "", job.get("baseline_adapter") or ""
    overlay = adapter_folder(overlay) or overlay
    if named and named not in NO_ADAPTER:
        baseline = model_ref("", named, replace(model, ckpt=judged.ckpt))
        if overlay:
            baseline = replace(baseline, adapter=overlay)
    elif named or overlay or judged.adapter:
        baseline = ModelRef("", judged.ckpt, overlay)
    else:
        return [replace(judged, label=(job.get("labels") or ["base"])[0])]
    if baseline == judged:
        raise UsageError(
            "the model would be compared with itself",
            where="--baseline",
            fix="give an adapter (--adapter), other weights (--ckpt), or leave --baseline out",
        )
    labels = job.get("labels") or _labels(baseline, judged)
    return [replace(baseline, label=labels[0]), replace(judged, label=labels[1])]


def refs_of_replay(model: ModelSettings, job: Mapping[str, Any]) -> list[ModelRef]:
    """The models of a replay, one for each of ``job["ckpts"]`` and ``job["adapters"]``.

    Several of one go with the single one of the other (or the settings'); equal numbers pair up in order.
    An adapter ``base`` is none. A ckpt may be a PEFT folder.

    Raises:
        UsageError: numbers that do not pair up, or no weights.
    """
    ckpts = list(job.get("ckpts") or []) or [model.ckpt]
    adapters = list(job.get("adapters") or [])
    count = max(len(ckpts), len(adapters))
    if len(ckpts) not in (1, count) or len(adapters) not in (0, 1, count):
        raise UsageError(
            f"{len(ckpts)} checkpoints and {len(adapters)} adapters do not pair up",
            where="--ckpt, --adapter",
            fix="give one of one kind, or as many of both",
        )
    ckpts = ckpts * count if len(ckpts) == 1 else ckpts
    adapters = (adapters or [model.adapter]) * (count if len(adapters) <= 1 else 1)
    refs = []
    for ckpt, overlay in zip(ckpts, adapters, strict=True):
        if not ckpt:
            raise UsageError("no weights to replay in", where="model.ckpt", fix="take a preset, or give --ckpt")
        ref = model_ref("", ckpt, model)
        named = "" if overlay in NO_ADAPTER else adapter_folder(overlay) or overlay
        refs.append(ref if ref.adapter else replace(ref, adapter=named))
    kinds = ["post-trained" if ref.adapter else "base" for ref in refs]
    if len(set(kinds)) < len(kinds):
        kinds = _names([ref.adapter or ref.ckpt for ref in refs])
    return [replace(ref, label=label) for ref, label in zip(refs, kinds, strict=True)]


def _labels(baseline: ModelRef, judged: ModelRef) -> list[str]:
    """``base`` and ``post-trained`` where that is the difference, else the names of what differs."""
    if baseline.ckpt == judged.ckpt and not baseline.adapter:
        return ["base", "post-trained"]
    if baseline.ckpt == judged.ckpt:
        return _names([baseline.adapter, judged.adapter or "base"])
    return _names([baseline.ckpt, judged.ckpt])


def _names(paths: list[str]) -> list[str]:
    """Short, different names for paths: the last parts that tell them apart."""
    parts = [path.replace("bundled:", "").rstrip("/").split("/") for path in paths]
    for depth in range(1, max(len(part) for part in parts) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} #{index + 1}" for index, name in enumerate(names)]


def sha256_of(path: str) -> str:
    """SHA-256 of a file, of a folder's files and names in order, or of a hub id's files as fetched; "" for "".

    Raises:
        PersistWorldError: not on disk, and the hub cannot give it.
    """
    if not path:
        return ""
    root = resolve_path(path)
    if root.is_file():
        return _digest([(root, "")])
    if root.is_dir():
        files = sorted(file for file in root.rglob("*") if file.is_file())
        return _digest([(file, str(file.relative_to(root))) for file in files])
    source = locate(path)
    return _digest([(file, file.name if len(source.files) > 1 else "") for file, _ in source.files])


def _digest(files: Sequence[tuple[Path, str]]) -> str:
    """SHA-256 of files, each after its name and size where it has a name."""
    whole = hashlib.sha256()
    for file, name in files:
        if name:
            whole.update(f"{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as handle:
            while block := handle.read(_BLOCK):
                whole.update(block)
    return whole.hexdigest()


def load_model(settings: Settings, job: Mapping[str, Any]) -> WorldModel:
    """The world model of a job, on the device of the settings.

    Args:
        settings: the default weights, and the device.
        job: optional ``ckpt`` (weights, which then go without the settings' adapter, or a PEFT folder on the settings'
            checkpoint) and ``adapter`` (a PEFT folder; "base" for none).

    Raises:
        PersistWorldError: weights that are absent, damaged, or of another model; no such device.
    """
    own = settings.model
    ref = model_ref("", job["ckpt"], own) if job.get("ckpt") else ModelRef("", own.ckpt, own.adapter)
    adapter = ref.adapter if job.get("adapter") is None else str(job["adapter"])
    adapter = "" if adapter in NO_ADAPTER else adapter
    device = pick_device(settings.launch.device)
    return load_for_sampling(settings, ckpt=ref.ckpt, adapter=adapter, device=device)


def pick_device(name: str) -> torch.device:
    """``auto`` (cuda if there is one), ``cpu`` or ``cuda``. Raises PersistWorldError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise PersistWorldError("no CUDA device is available", where="launch.device", fix="--device cpu, or auto")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
