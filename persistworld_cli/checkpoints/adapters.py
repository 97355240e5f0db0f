"""Adapters on disk: PEFT folders with an action encoder, and saved states of post-training."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from persistworld_cli.checkpoints.action_scale import scale_note
from persistworld_cli.checkpoints.compatibility import Shapes, bundled_settings, misfit, preset_shapes, shapes_of
from persistworld_cli.checkpoints.saving import save_safetensors
from persistworld_cli.checkpoints.sources import ENCODER, WeightSource, locate
from persistworld_cli.checkpoints.tensor_files import WeightFiles
from persistworld_cli.config.presets import from_json, preset_names
from persistworld_cli.config.settings import ModelSettings, PostTrainSettings
from persistworld_cli.config.weight_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from persistworld_cli.data.metadata.index import ActionStat
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import require_free, whole_folder
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
        encoder: the action encoder's tensors; empty if the adapter does not change it.
        root: its folder, or its file.
    """

    config: PeftConfig
    lora: dict[str, torch.Tensor]
    encoder: dict[str, torch.Tensor]
    root: Path


def read_adapter(source: WeightSource) -> Adapter:
    """A PEFT folder, or the sampling policy in a post-training's saved state. Raises PersistWorldError for others."""
    if source.kind not in ("adapter", "state"):
        raise PersistWorldError(
            "these are a model's weights, not an adapter",
            where=source.name,
            fix="give them with --ckpt; an adapter is a folder with adapter_config.json",
        )
    config = _state_config(source.root) if source.kind == "state" else _peft_config(source.root)
    tensors = WeightFiles(source).load()
    own = [name for name in tensors if name.startswith(_ENCODER)]
    encoder = {name.removeprefix(_ENCODER): tensors.pop(name) for name in own}
    return Adapter(config, tensors, encoder, source.root)


def _peft_config(folder: Path) -> PeftConfig:
    """``adapter_config.json``. Raises PersistWorldError if it is damaged or of another kind."""
    path, what = folder / ADAPTER_CONFIG, "not an adapter's settings"
    with reading(what, path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unexpected keyword arguments")  # of a newer peft
        _check_config(read_json(path, what))
        config = PeftConfig.from_pretrained(str(folder))
        if not getattr(config, "target_modules", None):
            raise ValueError("no target_modules: no layers of the network are named")
        return config


def _check_config(config: dict[str, Any]) -> None:
    """Raise ValueError for settings that peft accepts and fails on later."""
    for key in ("rank_pattern", "alpha_pattern"):
        for name, value in as_object(config.get(key) or {}).items():
            re.compile(name)
            whole_number(value, f"{key} of '{name}'", 1, _MOST_RANK)
    whole_number(config.get("r", 8), "r", 1, _MOST_RANK)
    positive_number(config.get("lora_alpha", 8), "lora_alpha")
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        names = config.get(key) or []
        if isinstance(names, str):
            re.compile(names)
        elif not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{key} is not a list of names")


def lora_config(options: PostTrainSettings) -> LoraConfig:
    """Rank, alpha and target modules of a post-training."""
    targets = list(options.lora_targets)
    return LoraConfig(r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=targets, bias="none")


def _state_config(root: Path) -> PeftConfig:
    """The adapter config of a saved state, from the settings in its run's folder."""
    step = root if root.is_dir() else root.parent
    path = step.parent.parent / "config.json"
    try:
        saved = as_object(parse_json(path.read_text(encoding="utf-8"))["settings"])
        return lora_config(from_json({"post_train": saved["post_train"]}, where=str(path)).post_train)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PersistWorldError(
            "a saved state without its run's config.json", where=str(path), fix="leave the state in its run's folder"
        ) from error


def require_adapter(source: str | Path, settings: ModelSettings) -> None:
    """Raise PersistWorldError if an adapter does not fit this model; the model's weights are not read."""
    adapter = read_adapter(locate(source))
    if why := adapter_misfit(adapter, settings):
        raise _other_model(adapter, why)


def _other_model(adapter: Adapter, why: str) -> PersistWorldError:
    fits = adapter_presets(adapter)
    known = f"it fits preset {' or '.join(fits)}" if fits else "it fits none of the bundled presets"
    return PersistWorldError(
        f"the adapter does not fit this model: {why}",
        where=str(adapter.root),
        fix=f"{known}: use the preset and the weights it was trained on",
    )


def adapter_presets(adapter: Adapter) -> list[str]:
    """Bundled presets whose model the adapter fits."""
    return [name for name, why in preset_misfits(adapter) if not why]


def preset_misfits(adapter: Adapter) -> Iterator[tuple[str, str]]:
    """Bundled presets with the layers that the adapter changes, and why it does not fit ("" if it does)."""
    for name in preset_names():
        if _has_layers(preset_shapes(name), adapter):
            yield name, adapter_misfit(adapter, bundled_settings(name).model)


def _has_layers(shapes: Shapes, adapter: Adapter) -> bool:
    """Whether every layer that the adapter changes exists and has its input size; fast, without peft."""
    for name, tensor in adapter.lora.items():
        layer, found, _ = name.removeprefix(_LORA_PREFIX).partition(".lora_A.")
        if found and shapes.get(f"unet.{layer}.weight", ())[1:] != tuple(tensor.shape[1:]):
            return False
    return True


def adapter_misfit(adapter: Adapter, settings: ModelSettings) -> str:
    """Why an adapter does not fit a model of these settings ("" if it does), tested on the meta device."""
    with torch.device("meta"):
        unet, encoder = FrameLevelUNet(**settings.unet), ActionEncoder(settings.action_dim, settings.token_dim)
    return _wrap(adapter, unet, encoder)[1]


def _wrap(adapter: Adapter, unet: FrameLevelUNet, encoder: ActionEncoder) -> tuple[Any, str]:
    """A network with the adapter's layers, not yet filled; and why the adapter does not fit ("" if it does)."""
    try:
        wrapped = PeftModel(unet, adapter.config, low_cpu_mem_usage=True)
    except _NO_FIT as error:
        return None, str(error).splitlines()[0]
    why = misfit(shapes_of(get_peft_model_state_dict(wrapped)), shapes_of(adapter.lora))
    if not why and adapter.encoder:
        why = misfit(shapes_of(encoder.state_dict()), shapes_of(adapter.encoder))
    return wrapped, why


def merge_adapter(model: WorldModel, source: str | Path) -> None:
    """Merge an adapter into the model's weights, and take its action encoder; the model keeps its type and device.

    Args:
        model: a model with weights; unusable after an error.
        source: PEFT folder, a run's ``weights``, a post-training's saved state, or a hub id.

    Raises:
        PersistWorldError: not an adapter, or an adapter of another model.
    """
    adapter = read_adapter(locate(source))
    wrapped, why = _wrap(adapter, model.unet, model.action_encoder)
    if why:
        raise _other_model(adapter, why)
    dtype = model.unet.conv_in.weight.dtype  # peft casts to it too; one by one, so that two full copies never exist
    lora = {name: adapter.lora.pop(name).to(dtype) for name in list(adapter.lora)}
    set_peft_model_state_dict(wrapped, lora, low_cpu_mem_usage=True)
    del lora
    model.unet = wrapped.merge_and_unload()
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
    """Write a PEFT folder atomically, with the action encoder if there is one.

    ``stat``, the percentiles that actions are scaled by, is saved in every file of it.

    Raises:
        PersistWorldError: the folder exists (without `force`), or it cannot be written.
    """
    require_free(folder, force=force, marker=ADAPTER_CONFIG)
    with whole_folder(folder) as partial:
        for name, part in ((f"{ADAPTER_WEIGHTS}.safetensors", lora), (f"{ENCODER}.safetensors", encoder)):
            if part:
                plain = {key: t.detach().cpu().contiguous() for key, t in part.items()}
                save_safetensors(partial / name, plain, scale_note(stat))
        config = copy.copy(config)
        for name, value in vars(config).items():  # peft writes sets in an order that changes from run to run
            setattr(config, name, sorted(value) if isinstance(value, set) else value)
        config.save_pretrained(str(partial))
