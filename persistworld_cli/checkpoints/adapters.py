"""Adapters on disk: PEFT folders with the action encoder beside, and what a post-training saved to resume from.

An adapter is compared with the model it is meant for before anything of the model is touched.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from persistworld_cli.checkpoints.action_scale import scale_note
from persistworld_cli.checkpoints.compatibility import Shapes, bundled_settings, misfit, preset_shapes, shapes_of
from persistworld_cli.checkpoints.sources import ENCODER, WeightSource, locate
from persistworld_cli.checkpoints.tensor_files import WeightFiles
from persistworld_cli.checkpoints.tensor_writing import save_safetensors
from persistworld_cli.config.presets import from_json, preset_names
from persistworld_cli.config.settings import ModelSettings
from persistworld_cli.config.weight_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from persistworld_cli.data.metadata.index import ActionStat
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import require_free, whole_folder, write_json
from persistworld_cli.models.tokens import ActionEncoder
from persistworld_cli.models.unet import FrameLevelUNet
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.read_files import as_object, parse_json, positive_number, read_json, reading, whole_number

_ENCODER, _LORA_PREFIX = f"{ENCODER}.", "base_model.model."
_MOST_RANK = 2**20
_NO_FIT = (ValueError, RuntimeError, KeyError, TypeError, AttributeError)  # what peft raises for another model's layers


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        config: rank, alpha and target modules.
        lora: tensors under PEFT's names (``base_model.model.<module>.lora_A.weight``).
        encoder: the action encoder's tensors; empty where the adapter leaves it alone.
        root: where it lies.
    """

    config: PeftConfig
    lora: dict[str, torch.Tensor]
    encoder: dict[str, torch.Tensor]
    root: Path


def read_adapter(source: WeightSource) -> Adapter:
    """A PEFT folder, or the sampling policy in a post-training's saved state.

    Raises:
        PersistWorldError: neither of them, or damaged.
    """
    if source.kind not in ("adapter", "state"):
        raise PersistWorldError(
            "these are a model's weights, not an adapter",
            where=source.name,
            fix="give them with --ckpt; an adapter is a folder with adapter_config.json",
        )
    config = _state_config(source.root) if source.kind == "state" else _peft_config(source.root)
    tensors = WeightFiles(source).load()
    lora = {name: t for name, t in tensors.items() if not name.startswith(_ENCODER)}
    encoder = {name.removeprefix(_ENCODER): t for name, t in tensors.items() if name.startswith(_ENCODER)}
    return Adapter(config, lora, encoder, source.root)


def _peft_config(folder: Path) -> PeftConfig:
    """``adapter_config.json``. Raises PersistWorldError where it is damaged or of another kind."""
    path, what = folder / ADAPTER_CONFIG, "not an adapter's settings"
    with reading(what, path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unexpected keyword arguments")  # of a newer peft
        _check_config(read_json(path, what))
        config = PeftConfig.from_pretrained(str(folder))
        if not getattr(config, "target_modules", None):
            raise ValueError("no target_modules: it names no layers of the network")
        return config


def _check_config(told: dict[str, Any]) -> None:
    """Raise ValueError for settings that peft takes and fails on later: it compiles names, and counts with ranks."""
    for key in ("rank_pattern", "alpha_pattern"):
        for name, value in as_object(told.get(key) or {}).items():
            re.compile(name)
            whole_number(value, f"{key} of '{name}'", 1, _MOST_RANK)
    whole_number(told.get("r", 8), "r", 1, _MOST_RANK)
    positive_number(told.get("lora_alpha", 8), "lora_alpha")
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        names = told.get(key) or []
        if isinstance(names, str):
            re.compile(names)
        elif not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{key} is no list of names")


def _state_config(root: Path) -> PeftConfig:
    """Rank, alpha and targets of a post-training, from the settings that its run's folder holds."""
    step = root if root.is_dir() else root.parent
    path = step.parent.parent / "config.json"
    try:
        options = from_json(
            as_object(parse_json(path.read_text(encoding="utf-8"))["settings"]), where=str(path)
        ).post_train
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PersistWorldError(
            "a saved state without its run's config.json", where=str(path), fix="leave the state in its run's folder"
        ) from error
    return LoraConfig(
        r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=list(options.lora_targets), bias="none"
    )


def require_adapter_fit(adapter: Adapter, lora_shapes: Shapes, encoder_shapes: Shapes) -> None:
    """Raise one PersistWorldError where the adapter is not this model's, with the presets whose it is.

    Args:
        adapter: what is to be merged.
        lora_shapes: what an adapter of these settings has on this model's UNet, under PEFT's names.
        encoder_shapes: of this model's action encoder.
    """
    text = misfit(lora_shapes, _shapes(adapter.lora))
    if not text and adapter.encoder:
        text = misfit(encoder_shapes, _shapes(adapter.encoder))
    if text:
        raise _other_model(adapter, text)


def require_adapter(source: str | Path, settings: ModelSettings) -> None:
    """Raise PersistWorldError where an adapter is not one of this model's; nothing of the model is built or read."""
    adapter = read_adapter(locate(source))
    if text := adapter_misfit(adapter, settings):
        raise _other_model(adapter, text)


def _other_model(adapter: Adapter, why: str) -> PersistWorldError:
    fits = adapter_presets(adapter)
    known = f"it fits preset {' or '.join(fits)}" if fits else "it fits none of the bundled presets"
    return PersistWorldError(
        f"the adapter does not fit this model: {why}",
        where=str(adapter.root),
        fix=f"{known}: use the preset and the weights it was trained on",
    )


def adapter_presets(adapter: Adapter) -> list[str]:
    """Bundled presets whose model the adapter is made for."""
    candidates = [name for name in preset_names() if _may_fit(adapter, preset_shapes(name))]
    return [name for name in candidates if not adapter_misfit(adapter, bundled_settings(name).model)]


def nearest_misfit(adapter: Adapter) -> tuple[str, str] | None:
    """A bundled preset with the layers that the adapter changes, and why it does not fit; None where there is none."""
    for name in preset_names():
        if _may_fit(adapter, preset_shapes(name)):
            return name, adapter_misfit(adapter, bundled_settings(name).model)
    return None


def _may_fit(adapter: Adapter, shapes: Shapes) -> bool:
    """Whether every layer that the adapter changes is there and takes what the adapter takes; quick, without peft."""
    for name, tensor in adapter.lora.items():
        layer, found, _ = name.removeprefix(_LORA_PREFIX).partition(".lora_A.")
        if found and shapes.get(f"unet.{layer}.weight", ())[1:] != tuple(tensor.shape[1:]):
            return False
    return True


def adapter_misfit(adapter: Adapter, settings: ModelSettings) -> str:
    """Why an adapter does not fit a model of these settings (built without memory); "" where it does."""
    with torch.device("meta"):
        unet, encoder = FrameLevelUNet(**settings.unet), ActionEncoder(settings.action_dim, settings.token_dim)
    try:
        wrapped = PeftModel(unet, adapter.config, low_cpu_mem_usage=True)
    except _NO_FIT as error:
        return str(error).splitlines()[0]
    text = misfit(_shapes(get_peft_model_state_dict(wrapped)), _shapes(adapter.lora))
    return text or (misfit(shapes_of(encoder), _shapes(adapter.encoder)) if adapter.encoder else "")


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors.items()}


def merge_adapter(model: WorldModel, source: str | Path) -> None:
    """Merge an adapter into the model's weights, and take its action encoder; the model keeps its type and device.

    Args:
        model: has its weights; is not to be used after an error.
        source: PEFT folder, a run's ``weights``, a post-training's saved state, or a hub id.

    Raises:
        PersistWorldError: not an adapter, or an adapter of another model.
    """
    adapter = read_adapter(locate(source))
    frame_level = model.unet.frame_level
    try:
        wrapped = PeftModel(model.unet, adapter.config, low_cpu_mem_usage=True)
    except _NO_FIT as error:
        raise _other_model(adapter, str(error).splitlines()[0]) from error
    require_adapter_fit(adapter, _shapes(get_peft_model_state_dict(wrapped)), shapes_of(model.action_encoder))
    dtype = model.unet.conv_in.weight.dtype  # which peft casts to as well; one by one, both copies are never whole
    lora = {name: adapter.lora.pop(name).to(dtype) for name in list(adapter.lora)}
    set_peft_model_state_dict(wrapped, lora, low_cpu_mem_usage=True)
    del lora
    model.unet = wrapped.merge_and_unload()
    model.unet.frame_level = frame_level
    if adapter.encoder:
        model.action_encoder.load_state_dict(adapter.encoder)


def write_adapter(
    folder: Path,
    config: PeftConfig,
    lora: Mapping[str, torch.Tensor],
    encoder: Mapping[str, torch.Tensor],
    *,
    force: bool = False,
    stat: ActionStat | None = None,
) -> None:
    """Write a PEFT folder, and the action encoder beside it if there is one, whole or not at all.

    ``stat``, the percentiles that actions are scaled by, goes into every file of it.

    Raises:
        PersistWorldError: something is there already (without `force`), or it cannot be written.
    """
    require_free(folder, force=force, marker=ADAPTER_CONFIG)
    with whole_folder(folder) as partial:
        for name, part in ((f"{ADAPTER_WEIGHTS}.safetensors", lora), (f"{ENCODER}.safetensors", encoder)):
            if part:
                plain = {key: t.detach().cpu().contiguous() for key, t in part.items()}
                save_safetensors(partial / name, plain, scale_note(stat))
        config.save_pretrained(str(partial))
        _sort_sets(config, partial / ADAPTER_CONFIG)


def _sort_sets(config: PeftConfig, path: Path) -> None:
    """peft writes sets in the order of this process's hashes: sorted, the same adapter is the same file."""
    written = read_json(path, "not an adapter's settings")
    sets = {name for name, value in vars(config).items() if isinstance(value, set)}
    write_json(path, {name: sorted(value) if name in sets else value for name, value in written.items()}, indent=2)
