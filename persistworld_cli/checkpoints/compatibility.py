"""Whether tensors fit a model, told in one message; and what they are, if not what was wanted.

Shapes alone are compared. Presets are built on the meta device, which takes no memory and a fraction of a second.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from persistworld_cli.checkpoints.sources import PARTS
from persistworld_cli.config.presets import from_json, load_settings, preset_names, to_json
from persistworld_cli.config.settings import Settings
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models.world_model import CARRIED, build_world_model

Shapes = Mapping[str, tuple[int, ...]]
_LORA = (".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_magnitude_vector")
# Keys by which a part under its own names, without the part's prefix, is known.
_BARE = {"vae": "decoder.conv_in.weight", "unet": "time_embedding.linear_1.weight"}


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's state dict, in its order."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def misfit(expected: Shapes, given: Shapes) -> str:
    """Counts and first of the missing, unexpected and differently shaped keys; "" where there are none."""
    missing = [k for k in expected if k not in given]
    unexpected = [k for k in given if k not in expected]
    shape = [k for k in expected if k in given and expected[k] != given[k]]
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(expected)} keys missing (first: {missing[0]})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected (first: {unexpected[0]})")
    if shape:
        k = shape[0]
        parts.append(f"{len(shape)} of another shape (first: {k} {given[k]}, not {expected[k]})")
    return "; ".join(parts)


def require_fit(
    expected: Shapes, given: Shapes, where: str, *, wanted: str = "model", whose: str = "this preset"
) -> None:
    """Raise one PersistWorldError where `given` is not exactly `expected`, with what it is instead.

    Args:
        expected, given: names and shapes.
        where: the checkpoint as it was named.
        wanted: ``model`` or ``VAE``.
        whose: the preset that `expected` is of.
    """
    if text := misfit(expected, given):
        raise PersistWorldError(
            f"the checkpoint does not fit {whose}'s {wanted}: {text}", where=where, fix=advice(given, wanted)
        )


def require_known(shapes: Shapes, where: str) -> str:
    """`kind_of` these tensors; raises PersistWorldError where they belong to nothing of this program."""
    kind = kind_of(shapes)
    if kind == "unknown":
        first, shape = next(iter(shapes.items()))
        raise PersistWorldError(
            f"no world model, VAE or adapter: {len(shapes)} tensors (first: {first} {shape})",
            where=where,
            fix="give a checkpoint of Ctrl-World's, a diffusers folder, or an adapter",
        )
    return kind


def nearest_preset(shapes: Shapes) -> str:
    """The bundled preset with the most of these names and shapes."""
    return max(preset_names(), key=lambda name: len(preset_shapes(name).items() & shapes.items()))


def parts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Part -> its keys, in the model's order of parts; "" for keys of no part."""
    parts: dict[str, list[str]] = {part: [] for part in (*PARTS, "")}
    for name in names:
        head = name.partition(".")[0]
        parts[head if head in parts else ""].append(name)
    return {part: keys for part, keys in parts.items() if keys}


def kind_of(names: Iterable[str]) -> str:
    """What tensors of these names are: ``world model``, ``adapter``, ``VAE``, ``UNet``, ``unmerged world model``,
    ``parts of a world model``, or ``unknown``.
    """
    names = list(names)
    lora = sum(any(mark in name for mark in _LORA) for name in names)
    parts = parts_of(names)
    if lora:
        return "unmerged world model" if any(".base_layer." in name for name in names) else "adapter"
    if set(parts) == {"vae"} or _BARE["vae"] in names:
        return "VAE"
    if set(parts) == {"unet"} or _BARE["unet"] in names:
        return "UNet"
    if {"unet", "vae", "text_encoder", "action_encoder"} <= set(parts):
        return "world model"
    return "parts of a world model" if set(parts) - {""} else "unknown"


def with_prefix(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """A part under its own names (``decoder.conv_in.weight``) under the world model's (``vae.decoder...``)."""
    for part, mark in _BARE.items():
        if mark in shapes:
            return {f"{part}.{name}": shape for name, shape in shapes.items()}
    return dict(shapes)


def bundled_settings(name: str) -> Settings:
    """A bundled preset as it is shipped: no environment, no overrides."""
    return load_settings(name, (), {}, env={}).settings


@functools.cache
def preset_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a bundled preset's state dict; one dict for presets of the same architecture."""
    settings = bundled_settings(name)
    model = replace(settings.model, ckpt="", adapter="", inference="", stat="")
    return _architecture_shapes(json.dumps(to_json(replace(settings, model=model)), sort_keys=True))


@functools.cache
def _architecture_shapes(settings: str) -> dict[str, tuple[int, ...]]:
    return settings_shapes(from_json(json.loads(settings)))


def settings_shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state dict of a preset's model, which is built without memory."""
    with torch.device("meta"):
        return shapes_of(build_world_model(settings.model, settings.world))


def needed_shapes(name: str, given: Shapes) -> dict[str, tuple[int, ...]]:
    """A bundled preset's shapes, without the part that nothing computes with where `given` has none of it."""
    whole, own = preset_shapes(name), parts_of(given)
    return {k: shape for k, shape in whole.items() if CARRIED in own or k.partition(".")[0] != CARRIED}


def fitting_presets(shapes: Shapes) -> list[str]:
    """Bundled presets whose whole model these shapes are."""
    return [name for name in preset_names() if not misfit(needed_shapes(name, shapes), shapes)]


def partly_fitting(shapes: Shapes) -> dict[str, list[str]]:
    """Bundled preset -> the parts in `shapes`, where each of them is that preset's."""
    own = parts_of(with_prefix(shapes))
    fits = {}
    for name in preset_names() if own and "" not in own else ():
        whole = parts_of(preset_shapes(name))
        pairs = [({k: preset_shapes(name)[k] for k in whole.get(part, ())}, keys) for part, keys in own.items()]
        if not any(misfit(want, {k: with_prefix(shapes)[k] for k in keys}) for want, keys in pairs):
            fits[name] = list(own)
    return fits


def advice(given: Shapes, wanted: str = "model") -> str:
    """What to do with a checkpoint that does not fit where a ``model`` or ``VAE`` was wanted."""
    kind, whole, part = kind_of(given), fitting_presets(given), partly_fitting(given)
    if kind == "adapter":
        return "this is an adapter: give it with --adapter, and the weights it belongs on with --ckpt"
    if kind == "unmerged world model":
        return "its LoRA layers are not merged: merge them where it was made (peft: merge_and_unload), and save again"
    if kind == "VAE" and wanted == "model":
        known = f" (preset {' or '.join(part)})" if part else ""
        return f"this is a VAE alone{known}: give it with --vae (extract-latents, or pretrain --scratch)"
    if whole or (part and wanted == kind):
        names = whole or list(part)
        return f"it fits preset {' or '.join(names)}: --preset {names[0]}"
    if part:
        name, held = next(iter(part.items()))
        absent = [p for p in parts_of(preset_shapes(name)) if p not in held]
        return f"it holds the {_list(held)} of preset {' or '.join(part)}, without {_list(absent)}"
    return (
        f"it fits none of the bundled presets ({', '.join(preset_names())}): give the one it was trained with, "
        "--preset FILE.toml"
    )


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
