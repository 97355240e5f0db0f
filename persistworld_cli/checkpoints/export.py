"""Export weights as one file under Ctrl-World's names, or an adapter as a PEFT folder, atomically."""

from __future__ import annotations

import logging
from typing import Any

import torch

from persistworld_cli.checkpoints.action_scale import scale_note, stored_scale
from persistworld_cli.checkpoints.adapters import adapter_misfit, adapter_presets, read_adapter, write_adapter
from persistworld_cli.checkpoints.compatibility import (
    bundled_settings,
    kind_of,
    nearest_preset,
    preset_shapes,
    require_fit,
    require_known,
)
from persistworld_cli.checkpoints.inspection import MERGED
from persistworld_cli.checkpoints.loading import load_world_model
from persistworld_cli.checkpoints.references import sha256_of, weights_ref
from persistworld_cli.checkpoints.saving import save_safetensors, save_torch
from persistworld_cli.checkpoints.sources import adapter_at, locate
from persistworld_cli.checkpoints.tensor_files import WeightFiles
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.presets import preset_names
from persistworld_cli.config.requests import ExportRequest
from persistworld_cli.config.settings import Settings
from persistworld_cli.config.weight_names import ADAPTER_CONFIG, PASSTHROUGH, READINGS, adapter_name, adapter_on_disk
from persistworld_cli.data.metadata.index import ActionStat
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.files import require_free

logger = logging.getLogger(__name__)

_Exported = tuple[dict[str, torch.Tensor], str | None, ActionStat | None]  # tensors, merged adapter, action scale
# Format -> how the file's name ends ("": a folder)
FORMATS = {"ctrl-world": (".pt", ".pth"), "safetensors": (".safetensors",), "peft": ("",)}


def export(request: ExportRequest, settings: Settings | None) -> dict[str, Any]:
    """Write whole weights as one file, or an adapter as a PEFT folder; each records the action scale.

    ``ctrl-world`` is what `torch.save` writes and Ctrl-World loads with strict=True. An adapter is merged in float32.

    Args:
        request: if CKPT is an adapter, it is merged into its preset's checkpoint, or with ``peft`` written by itself.
        settings: of the model; None: those of the bundled preset that it fits.

    Returns:
        What was written, as JSON values.

    Raises:
        PersistWorldError: weights that are absent, damaged or of another model; the output cannot be written.
        UsageError: the output has the wrong suffix or exists; CKPT is an adapter that fits several base weights, or not
            an adapter although ``peft`` is requested.
    """
    to, output, force = request.to, request.output, request.force
    if output.suffix not in FORMATS[to]:
        what = f"a file ending in {FORMATS[to][0]}" if FORMATS[to][0] else "a folder, without an ending"
        raise UsageError(f"--to {to} writes {what}, not '{output.name}'", where="--output", fix="give such a name")
    require_free(output, force=force, marker=ADAPTER_CONFIG if to == "peft" else "")
    tensors, merged, stat = (_export_adapter if to == "peft" else _export_model)(request, settings)
    files = [output] if output.is_file() else list(output.iterdir())
    return {
        "output": str(output),
        "format": to,
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values()),
        "dtype": request.dtype,
        "bytes": sum(file.stat().st_size for file in files),
        "merged": merged,
        "action_scale": None if stat is None else {"p01": stat.p01.tolist(), "p99": stat.p99.tolist()},
        "sha256": sha256_of(str(output)),
        **({"weights_read": READINGS} if READINGS else {}),
    }


def _export_model(request: ExportRequest, settings: Settings | None) -> _Exported:
    """One file; returns the adapter that was merged too."""
    ckpt, adapter, output = request.ckpt, request.adapter, request.output
    sha256 = sha256_of(adapter_name(adapter) or adapter_on_disk(ckpt))
    if adapter_at(ckpt):
        ckpt, adapter = _base_of(ckpt, adapter, settings)
    named, settings = settings, settings or _settings_of(ckpt)
    dtype = getattr(torch, request.dtype)
    model = load_world_model(settings.model, settings.world, ckpt=ckpt, adapter=adapter, dtype=dtype, passthrough=True)
    if request.to == "ctrl-world" and settings.model.image and not hasattr(model, PASSTHROUGH):
        raise PersistWorldError(
            f"Ctrl-World loads with strict=True and needs an {PASSTHROUGH.replace('_', ' ')}; this checkpoint has none",
            where=ckpt,
            fix="write --to safetensors, which this program loads, or name the checkpoint that has it",
        )
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    _require_finite(tensors, request.dtype)
    require_free(output, force=request.force)
    stat = export_scale(named, ckpt, adapter)
    notes = scale_note(stat) | ({MERGED: sha256} if sha256 else {})
    (save_safetensors if request.to == "safetensors" else save_torch)(output, tensors, notes)
    return tensors, adapter or None, stat


def _export_adapter(request: ExportRequest, settings: Settings | None) -> _Exported:
    """A PEFT folder of CKPT, or of the adapter that is named on top of it."""
    ckpt, adapter, dtype = request.ckpt, request.adapter, getattr(torch, request.dtype)
    source = locate(adapter or ckpt)
    if source.kind not in ("adapter", "state") and kind_of(WeightFiles(source).info) != "adapter":
        raise UsageError(
            f"'{source.name}' holds whole weights: an adapter that was merged cannot be taken out again",
            where="--to peft",
            fix="name the adapter itself (a run's weights/adapter), or write --to safetensors",
        )
    found = read_adapter(source)
    stat = export_scale(settings, *((ckpt, adapter) if adapter else ("", ckpt)))
    if adapter and settings is None:
        settings = _settings_of(ckpt)
    why = adapter_misfit(found, settings.model) if settings else ""
    if why or (settings is None and not adapter_presets(found)):
        raise PersistWorldError(
            f"the adapter does not fit {'this model: ' + why if why else 'any bundled preset'}",
            where=str(found.root),
            fix="name the preset (--preset) and the weights it was trained on",
        )
    lora, encoder = ({name: t.to(dtype) for name, t in part.items()} for part in (found.lora, found.encoder))
    _require_finite({**lora, **encoder}, request.dtype)
    write_adapter(request.output, found.config, lora, encoder, force=request.force, stat=stat, base=found.base)
    return {**lora, **encoder}, None, stat


def export_scale(settings: Settings | None, ckpt: str, adapter: str) -> ActionStat | None:
    """The action scale for exported weights: the adapter's or the weights' own, else ``model.stat`` of the preset
    that the user names (``settings``) or whose weights these are; None, with a warning, if none is known.

    Raises:
        PersistWorldError: absent weights, damaged or missing percentiles.
    """
    if settings is not None and settings.model.stat_given:
        return ActionStat.load(resolve_path(settings.model.stat))
    for source in filter(None, (adapter, ckpt)):
        if (stat := stored_scale(source)) is not None:
            return stat
    if settings is None and not adapter:
        shipped = (bundled_settings(name) for name in preset_names())
        known = (own for own in shipped if own.model.stat and ckpt in (own.model.ckpt, own.model.inference))
        settings = next(known, None)
    if settings is None or not settings.model.stat:
        logger.warning(
            "%s has no action scale, so the exported file has none either: give --preset, or --set model.stat=FILE",
            adapter or ckpt,
        )
        return None
    return ActionStat.load(resolve_path(settings.model.stat))


def _base_of(ckpt: str, adapter: str, settings: Settings | None) -> tuple[str, str]:
    """Weights and adapter where CKPT is an adapter: its settings' weights, or those of a preset that it fits."""
    fits = [settings] if settings else map(bundled_settings, adapter_presets(read_adapter(locate(ckpt))))
    bases = list(dict.fromkeys(fit.model.ckpt for fit in fits))
    if len(bases) != 1:
        raise UsageError(
            f"'{ckpt}' is an adapter, " + (f"on any of {', '.join(bases)}" if bases else "of no bundled preset"),
            where="CKPT",
            fix=f"name the weights it belongs on: persistworld export WEIGHTS --adapter {ckpt}, or its --preset",
        )
    ref = weights_ref(ckpt, bases[0], adapter)
    return ref.ckpt, ref.adapter


def _settings_of(ckpt: str) -> Settings:
    """Settings of the bundled preset that a checkpoint fits. Raises PersistWorldError if there is none."""
    shapes = WeightFiles(locate(ckpt)).shapes
    require_known(shapes, ckpt)
    name = nearest_preset(shapes)
    require_fit(preset_shapes(name), shapes, ckpt, whose=f"preset {name}")
    return bundled_settings(name)


def _require_finite(tensors: dict[str, torch.Tensor], dtype: str) -> None:
    """Raise PersistWorldError if values are too large for the type."""
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise PersistWorldError(
            f"{len(broken)} tensors are not finite in {dtype} (first: {broken[0]})",
            where="--dtype",
            fix="choose a type with more range: bfloat16 or float32",
        )
