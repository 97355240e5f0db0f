"""Describe a checkpoint by its names and shapes: kind, parts, types, and the presets it fits."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from persistworld_cli.checkpoints.action_scale import NOTE, noted_scale
from persistworld_cli.checkpoints.adapters import Adapter, adapter_misfit, preset_misfits, read_adapter
from persistworld_cli.checkpoints.compatibility import (
    fitting_presets,
    kind_of,
    misfit,
    nearest_preset,
    parts_of,
    preset_shapes,
    require_known,
    settings_shapes,
)
from persistworld_cli.checkpoints.sources import locate
from persistworld_cli.checkpoints.tensor_files import Info, WeightFiles
from persistworld_cli.config.settings import Settings

MERGED = "merged_adapter"  # in a weights file's own notes: SHA-256 of the adapter that was merged into it
_LAYERS = {
    "adapter": "LoRA layers, to be merged into a model",
    "unmerged world model": "LoRA layers beside the weights, not merged",
}


def describe(name: str, compare: Settings | None = None) -> dict[str, Any]:
    """Describe the checkpoint at a path or hub id.

    Args:
        name: file, folder or hub id.
        compare: settings to compare with, beside the bundled presets.

    Returns:
        JSON values: ``kind``, ``path``, ``layers``, ``tensors``, ``parameters``, ``dtypes`` (type -> tensors), ``fits``
        (bundled presets), ``nearest`` (if it fits none: the ``preset`` with most in common, ``misfit``), ``lacks``
        (parts of those presets that are not in it), ``adapter`` (rank, alpha, targets), ``merged_adapter``,
        ``removed_from_names`` (segments that wrappers put into names -> number of names), ``action_scale`` (its
        percentiles), ``parts`` and ``files`` (one row each); with `compare`, ``own_preset``: "fits", or why not.

    Raises:
        PersistWorldError: nothing there, damaged, or tensors of something else.
    """
    source = locate(name)
    files = WeightFiles(source)
    files.report()
    kind = require_known(files.shapes, name)
    adapter = read_adapter(source) if kind == "adapter" else None
    shown = {"diffusers": "diffusers folder", "state": "saved state of a post-training"}.get(source.kind, kind)
    return {
        "kind": shown,
        "path": str(source.root),
        "layers": _LAYERS.get(kind, "whole weights"),
        "tensors": len(files.info),
        "parameters": sum(_count(info) for info in files.info.values()),
        "dtypes": _types(list(files.info.values())),
        **(_fit_of_adapter(adapter, compare) if adapter else _fit_of_weights(files, compare)),
        "adapter": _settings_of(adapter),
        "merged_adapter": files.metadata.get(MERGED),
        "removed_from_names": files.naming.removed,
        "action_scale": json.loads(files.metadata[NOTE]) if noted_scale(files.metadata, name) else None,
        "parts": _parts(files),
        "files": [
            {"file": str(path), "bytes": path.stat().st_size} for path in dict.fromkeys(p for p, _ in source.files)
        ],
    }


def _fit_of_weights(files: WeightFiles, compare: Settings | None) -> dict[str, Any]:
    shapes = files.shapes
    fits = fitting_presets(shapes)
    result: dict[str, Any] = {"fits": list(fits), "lacks": next(iter(fits.values()), []), "nearest": None}
    near = nearest_preset(shapes)
    if not fits and preset_shapes(near).items() & shapes.items():
        result["nearest"] = {"preset": near, "misfit": misfit(preset_shapes(near), shapes)}
    if compare:
        result["own_preset"] = misfit(settings_shapes(compare), shapes) or "fits"
    return result


def _fit_of_adapter(adapter: Adapter, compare: Settings | None) -> dict[str, Any]:
    misfits = dict(preset_misfits(adapter))
    fits = [name for name, why in misfits.items() if not why]
    result: dict[str, Any] = {"fits": fits, "lacks": [], "nearest": None}
    if misfits and not fits:
        result["nearest"] = dict(zip(("preset", "misfit"), next(iter(misfits.items())), strict=True))
    if compare:
        result["own_preset"] = adapter_misfit(adapter, compare.model) or "fits"
    return result


def _settings_of(adapter: Adapter | None) -> dict[str, Any] | None:
    """Rank, alpha and target layers of an adapter."""
    if adapter is None:
        return None
    config = adapter.config
    targets = getattr(config, "target_modules", None) or ()
    return {
        "type": str(getattr(config.peft_type, "value", config.peft_type)),
        "rank": getattr(config, "r", None),
        "alpha": getattr(config, "lora_alpha", None),
        "targets": [targets] if isinstance(targets, str) else sorted(targets),
        "modules": sum(".lora_A." in name for name in adapter.lora),
        "action_encoder": bool(adapter.encoder),
    }


def _parts(files: WeightFiles) -> list[dict[str, Any]]:
    """One row per part, in the model's order."""
    rows = []
    rest = "lora" if kind_of(files.info) in ("adapter", "unmerged world model") else "other"
    for part, names in parts_of(files.info).items():
        own = [files.info[name] for name in names]
        types = ", ".join(_types(own))
        rows.append({"part": part or rest, "tensors": len(own), "parameters": sum(map(_count, own)), "dtype": types})
    return rows


def _types(infos: list[Info]) -> dict[str, int]:
    return dict(Counter(str(info.dtype).removeprefix("torch.") for info in infos).most_common())


def _count(info: Info) -> int:
    return math.prod(info.shape)
