"""Adapters on disk: PEFT folders with an action encoder, saved states of post-training, and other tools' LoRA files.

A LoRA file of diffusers (``unet.mid_block...lora.down.weight``) or kohya (``lora_unet_mid_block...lora_down.weight``)
has no settings beside it: rank and layers are those of its tensors; alpha is in the file or, as in these tools, the
rank. peft's own weights without ``adapter_config.json`` are refused, since nothing says their alpha.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from persistworld_cli.checkpoints.action_scale import scale_note
from persistworld_cli.checkpoints.base_sample import SAME, BaseSample, base_note, difference, noted_base
from persistworld_cli.checkpoints.compatibility import (
    Shapes,
    bundled_settings,
    kind_of,
    misfit,
    preset_shapes,
    shapes_of,
)
from persistworld_cli.checkpoints.names import read_names, split_joined
from persistworld_cli.checkpoints.saving import save_safetensors
from persistworld_cli.checkpoints.sources import ENCODER, WeightSource, locate
from persistworld_cli.checkpoints.tensor_files import WeightFiles
from persistworld_cli.config.presets import from_json, preset_names
from persistworld_cli.config.settings import ModelSettings, PostTrainSettings
from persistworld_cli.config.weight_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, report_reading
from persistworld_cli.data.metadata.index import ActionStat
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import require_free, whole_folder
from persistworld_cli.models.tokens import ActionEncoder
from persistworld_cli.models.unet import FrameLevelUNet
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.read_files import as_object, parse_json, positive_number, read_json, reading, whole_number

logger = logging.getLogger(__name__)
_ENCODER, _LORA_PREFIX = f"{ENCODER}.", "base_model.model."
_MOST_RANK = 2**20
# How a LoRA tensor's name ends: peft's (with the adapter's name), diffusers', the oldest diffusers', kohya's.
_LORA_END = re.compile(r"(?:\.lora_|\.lora\.|\.lora_linear_layer\.|_lora\.)(A|B|down|up)(?:\.\w+)?\.weight$")
_MATRIX = {"A": "A", "down": "A", "B": "B", "up": "B"}
_ALPHA, _JOINED = ".alpha", "lora_unet_"  # kohya's
_DIFFUSERS = "lora_adapter_metadata"  # in the header of diffusers' files: JSON of peft's settings, ``unet.r``, ...
_NO_FIT = (ValueError, RuntimeError, KeyError, TypeError, AttributeError)  # what peft raises for another model's layers


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        config: rank, alpha and target modules.
        lora: tensors under PEFT's names (``base_model.model.<module>.lora_A.weight``).
        encoder: the action encoder's tensors; empty if the adapter does not change it.
        root: its folder, or its file.
        base: numbers of the weights that it was trained on; {} if it does not say.
    """

    config: PeftConfig
    lora: dict[str, torch.Tensor]
    encoder: dict[str, torch.Tensor]
    root: Path
    base: BaseSample = field(default_factory=dict)


def read_adapter(source: WeightSource) -> Adapter:
    """A PEFT folder, the sampling policy in a post-training's saved state, or another tool's LoRA file.

    Raises:
        PersistWorldError: not an adapter; one with unknown settings, or of another kind or model.
    """
    files = WeightFiles(source)
    given = source.kind in ("adapter", "state")
    if not given and kind_of(files.info) != "adapter":
        raise PersistWorldError(
            "these are a model's weights, not an adapter",
            where=source.name,
            fix="give them with --ckpt; an adapter is a folder with adapter_config.json, or a LoRA file",
        )
    tensors = files.load()
    own = [name for name in tensors if name.startswith(_ENCODER)]
    encoder = {name.removeprefix(_ENCODER): tensors.pop(name) for name in own}
    alphas = {} if given else {name: tensors.pop(name) for name in list(tensors) if name.endswith(_ALPHA)}
    names = _peft_names(source.name, tensors, strict=not given)
    lora = {new: tensors[name] for name, new in names.items()}
    if given:
        config = _state_config(source.root) if source.kind == "state" else _peft_config(source.root)
    with reading("the adapter is damaged", source.root, "fetch it again"):
        if not given:
            config = _config_of_file(source, files.metadata, names, lora, alphas)
        elif lora.keys() != tensors.keys():
            config = _config_of_layers(config, names, lora)
    return Adapter(config, lora, encoder, source.root, noted_base(files.metadata, source.name))


def _peft_names(source: str, names: Iterable[str], *, strict: bool) -> dict[str, str]:
    """Name of a LoRA tensor in a file -> peft's name on the UNet.

    Args:
        source: the file, for messages.
        names: of the tensors.
        strict: refuse names of no layer; otherwise all names then stay as they are, for peft to judge.

    Raises:
        PersistWorldError: such names, or layers of another part.
    """
    plain: dict[str, str] = {}  # name -> the name that the layer's own weight would have
    ends: dict[str, str] = {}
    for name in names:
        found = _LORA_END.search(name)
        layer = name[: found.start()] if found else name.removesuffix(".weight")
        ends[name] = f".lora_{_MATRIX[found[1]]}.weight" if found else ".weight" if name.endswith(".weight") else ""
        if layer.startswith(_JOINED):
            layers = split_joined(layer.removeprefix(_JOINED), "unet")
            layer = f"unet.{layers[0]}" if len(layers) == 1 else layer
        layer = layer + ".0" if layer.endswith(".to_out") else layer  # a Sequential, which the oldest files leave out
        plain[name] = f"{layer}.weight" if ends[name] else layer
    naming = read_names(dict.fromkeys(plain.values()))
    odd = [name for name, layer in plain.items() if layer in naming.unknown or (strict and not _LORA_END.search(name))]
    other = [name for name, layer in plain.items() if not naming.names[layer].startswith("unet.")]
    if (strict and odd) or (other and not odd):
        raise PersistWorldError(
            f"{len(odd or other)} of the adapter's {len(plain)} tensors change no layer of the UNet by LoRA "
            f"(first: {(odd or other)[0]})",
            where=source,
            fix="merge the adapter with the tool that made it (peft: merge_and_unload), and give the merged weights "
            "with --ckpt",
        )
    if odd:
        return {name: name for name in plain}
    own = {name: naming.names[layer].removeprefix("unet.").removesuffix(".weight") for name, layer in plain.items()}
    peft = {name: _LORA_PREFIX + own[name] + ends[name] for name in plain}
    if len(set(peft.values())) < len(peft):
        twice = Counter(peft.values()).most_common(1)[0][0]
        raise PersistWorldError(f"several of the adapter's tensors are '{twice}'", where=source, fix="fetch it again")
    if changed := next((name for name, new in peft.items() if name != new), ""):
        report_reading(f"{source}: {len(peft)} names, such as '{changed}', are read as peft's '{peft[changed]}'")
    return peft


def _layer_of(name: str) -> str:
    """``base_model.model.mid_block.x.lora_A.weight`` -> ``mid_block.x``."""
    return name.removeprefix(_LORA_PREFIX).partition(".lora_")[0]


def _ranks(lora: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Layer -> rank."""
    return {_layer_of(name): tensor.shape[0] for name, tensor in lora.items() if ".lora_A." in name}


def _config_of_layers(config: Any, names: Mapping[str, str], lora: Mapping[str, torch.Tensor]) -> PeftConfig:
    """LoRA settings for layers that have other names in the adapter's files than in the UNet."""
    config = copy.copy(config)
    own = {_LORA_END.sub("", name).removeprefix(_LORA_PREFIX): _layer_of(new) for name, new in names.items()}
    ranks, patterns = _ranks(lora), dict(getattr(config, "alpha_pattern", None) or {})
    alphas = {}
    for name, layer in own.items():
        pattern = next((one for one in patterns if re.match(rf"(.*\.)?({one})$", name)), None)
        if pattern is not None:
            alphas[layer] = patterns[pattern]
    config.target_modules = sorted(ranks)
    config.rank_pattern = {layer: rank for layer, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = alphas
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None  # the layers are named above
    return config


def _config_of_file(
    source: WeightSource,
    notes: Mapping[str, str],
    names: Mapping[str, str],
    lora: Mapping[str, torch.Tensor],
    alphas: Mapping[str, torch.Tensor],
) -> PeftConfig:
    """The settings of a LoRA file that has none beside it: diffusers' in its header, else those of its tensors.

    Raises:
        PersistWorldError: alpha is unknown. Exception: damaged settings or tensors.
    """
    ranks = _ranks(lora)
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    if _DIFFUSERS in notes:
        header = as_object(parse_json(notes[_DIFFUSERS]))
        header = {key.removeprefix("unet."): value for key, value in header.items()}
        _check_config(header)
        known = {key: value for key, value in header.items() if key in LoraConfig.__dataclass_fields__}
        return _config_of_layers(LoraConfig(**known), names, lora)
    if any(name.startswith(_LORA_PREFIX.partition(".")[0]) for name in names):
        ends = sorted({re.search(r"[^.]*(\.\d+)?$", layer)[0] for layer in ranks})  # type: ignore[index]
        known = {"peft_type": "LORA", "r": rank, "lora_alpha": "ALPHA", "target_modules": ends}
        settings = json.dumps(known).replace('"ALPHA"', "ALPHA")
        raise PersistWorldError(
            f"peft's weights without {ADAPTER_CONFIG}: nothing says their alpha (rank {rank})",
            where=str(source.root),
            fix="fetch that file too, or write it, with the alpha of the training for ALPHA: "
            f"echo '{settings}' > {source.files[0][0].with_name(ADAPTER_CONFIG)}",
        )
    by_layer = {_layer_of(new): name for name, new in names.items()}
    stems = {layer: _LORA_END.sub("", name) for layer, name in by_layer.items()}
    named = {layer: stem + _ALPHA for layer, stem in stems.items() if stem + _ALPHA in alphas}
    scales = {layer: positive_number(alphas[name].item(), name) for layer, name in named.items()}
    if strays := alphas.keys() - set(named.values()):
        what = f"the adapter has an alpha without its layer (first: {min(strays)})"
        raise PersistWorldError(what, where=source.name, fix="fetch it again")
    known_by = "alpha is in the file" if scales else "alpha is the rank, as diffusers takes it"
    report_reading(f"{source.name}: LoRA of rank {rank} on {len(ranks)} layers, without settings; {known_by}")
    every = {layer: scales.get(layer, float(own)) for layer, own in ranks.items()}
    alpha = Counter(every.values()).most_common(1)[0][0] if every else 8.0
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]
        target_modules=sorted(ranks),
        rank_pattern={layer: own for layer, own in ranks.items() if own != rank},
        alpha_pattern={layer: own for layer, own in every.items() if own != alpha},
        bias="none",
    )


def _peft_config(folder: Path) -> PeftConfig:
    """``adapter_config.json``. Raises PersistWorldError if it is damaged or of another kind."""
    path, what = folder / ADAPTER_CONFIG, "not an adapter's settings"
    with reading(what, path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unexpected keyword arguments")  # of a newer peft
        _check_config(read_json(path, what))
        config = PeftConfig.from_pretrained(str(folder))
        config.base_model_name_or_path = None  # peft would look for it on the hub
        if not getattr(config, "target_modules", None):
            raise ValueError("no target_modules: no layers of the network are named")
        return config


def _check_config(config: dict[str, Any]) -> None:
    """Raise ValueError for settings that peft accepts and fails on later."""
    for key in ("rank_pattern", "alpha_pattern"):
        for name, value in as_object(config.get(key) or {}).items():
            re.compile(name)
            what = f"{key} of '{name}'"
            positive_number(value, what) if key == "alpha_pattern" else whole_number(value, what, 1, _MOST_RANK)
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
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    why = misfit(shapes_of(expected), shapes_of(adapter.lora))
    if not why and adapter.encoder:
        why = misfit(shapes_of(encoder.state_dict()), shapes_of(adapter.encoder))
    return wrapped, why


def merge_adapter(model: WorldModel, source: str | Path) -> None:
    """Merge an adapter into the model's weights, and take its action encoder; the model keeps its type and device.

    An adapter that was trained on other weights of the same shapes is merged with a warning.

    Args:
        model: a model with weights; unusable after an error.
        source: PEFT folder, a run's ``weights``, a post-training's saved state, or a hub id.

    Raises:
        PersistWorldError: not an adapter, or an adapter of another model.
    """
    adapter = read_adapter(locate(source))
    apart = difference(model.unet, adapter.base)
    wrapped, why = _wrap(adapter, model.unet, model.action_encoder)
    if why:
        raise _other_model(adapter, why)
    if apart > SAME:
        logger.warning(
            "the adapter %s was trained on other weights than these (they differ by %.0f%%): its predictions mean "
            "little here. Give --ckpt the weights that it was trained on",
            source,
            100 * apart,
        )
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
    base: BaseSample | None = None,
) -> None:
    """Write a PEFT folder atomically, with the action encoder if there is one.

    ``stat``, the percentiles that actions are scaled by, is saved in every file of it; ``base``, numbers of the weights
    that the adapter was trained on, beside the LoRA.

    Raises:
        PersistWorldError: the folder exists (without `force`), or it cannot be written.
    """
    require_free(folder, force=force, marker=ADAPTER_CONFIG)
    with whole_folder(folder) as partial:
        for name, part in ((f"{ADAPTER_WEIGHTS}.safetensors", lora), (f"{ENCODER}.safetensors", encoder)):
            if part:
                plain = {key: t.detach().cpu().contiguous() for key, t in part.items()}
                notes = scale_note(stat) | (base_note(base or {}) if part is lora else {})
                save_safetensors(partial / name, plain, notes)
        config = copy.copy(config)
        for name, value in vars(config).items():  # peft writes sets in an order that changes from run to run
            setattr(config, name, sorted(value) if isinstance(value, set) else value)
        config.save_pretrained(str(partial))
