"""Check a state dict against a model in one message, and identify unknown checkpoints.

Only names and shapes are compared. Presets are built on the meta device, without memory, in a fraction of a second.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from persistworld_cli.config.presets import load_settings, preset_names
from persistworld_cli.config.settings import Settings
from persistworld_cli.config.weight_names import PARTS, PASSTHROUGH
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models.world_model import build_world_model

Shapes = Mapping[str, tuple[int, ...]]
# Of peft, diffusers (``.lora.down.``, ``to_q_lora.down.``) and kohya (``.lora_down.``), and other kinds of adapters.
_LORA = re.compile(r"[._]lora[._]|\.lora_(A|B|down|up|mid|embedding_|magnitude)|\.(hada_|lokr_|dora_scale|oft_)")


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of tensors, in their order."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def misfit(expected: Shapes, given: Shapes) -> str:
    """Number and first of the missing, unexpected and differently shaped keys; "" if there are none.

    The unused part (image encoder) may be missing as a whole.
    """
    if PASSTHROUGH not in parts_of(given):
        expected = {k: shape for k, shape in expected.items() if part_of(k) != PASSTHROUGH}
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
    """Raise one PersistWorldError if `given` is not exactly `expected`; it says what the checkpoint is instead.

    Args:
        expected, given: names and shapes.
        where: the checkpoint as it was named.
        wanted: ``model`` or ``VAE``.
        whose: the preset that `expected` is of.
    """
    if text := misfit(expected, given):
        fix = advice(given, wanted)
        if not misfit(expected, {name: shape for name, shape in given.items() if name in expected}):
            fix = f"without the unexpected tensors it fits; to leave them out: {_pruning(where)}"
        raise PersistWorldError(f"the checkpoint does not fit {whose}'s {wanted}: {text}", where=where, fix=fix)


def _pruning(where: str) -> str:
    """The command that copies a checkpoint without the tensors of no model."""
    return (
        'python -c "from safetensors.torch import save_file; from persistworld_cli.checkpoints.sources import locate; '
        "from persistworld_cli.checkpoints.tensor_files import WeightFiles; "
        f"files = WeightFiles(locate({where!r})); "
        "save_file({name: t.contiguous() for name, t in files.load().items() if name not in files.naming.unknown}, "
        "'pruned.safetensors')\""
    )


def require_known(shapes: Shapes, where: str) -> str:
    """`kind_of` these tensors; raises PersistWorldError if they are unknown."""
    kind = kind_of(shapes)
    if kind == "unknown":
        first, shape = next(iter(shapes.items()))
        raise PersistWorldError(
            f"not a world model, VAE or adapter: {len(shapes)} tensors (first: {first} {shape})",
            where=where,
            fix="give a checkpoint of Ctrl-World's, a diffusers folder, or an adapter",
        )
    return kind


def nearest_preset(shapes: Shapes) -> str:
    """The bundled preset with the most of these names and shapes."""
    return max(preset_names(), key=lambda name: len(preset_shapes(name).items() & shapes.items()))


def part_of(name: str) -> str:
    """The part that a key belongs to; "" for none."""
    head = name.partition(".")[0]
    return head if head in PARTS else ""


def parts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Part -> its keys, in the model's order of parts; "" for keys of no part."""
    parts: dict[str, list[str]] = {part: [] for part in (*PARTS, "")}
    for name in names:
        parts[part_of(name)].append(name)
    return {part: keys for part, keys in parts.items() if keys}


def is_lora(names: Iterable[str]) -> bool:
    """Whether names are an adapter's, by itself or beside the layers that it changes."""
    return any(_LORA.search(name) for name in names)


def kind_of(names: Iterable[str]) -> str:
    """What tensors of these names are: ``world model``, ``adapter``, ``VAE``, ``UNet``, ``unmerged world model``,
    ``parts of a world model``, or ``unknown``.
    """
    names = list(names)
    parts = parts_of(names)
    if is_lora(names):
        return "unmerged world model" if any(".base_layer." in name for name in names) else "adapter"
    if set(parts) == {"vae"}:
        return "VAE"
    if set(parts) == {"unet"}:
        return "UNet"
    if {"unet", "vae", "text_encoder", "action_encoder"} <= set(parts):
        return "world model"
    return "parts of a world model" if set(parts) - {""} else "unknown"


@functools.cache
def bundled_settings(name: str) -> Settings:
    """A bundled preset as it is shipped: no environment, no overrides."""
    return load_settings(name, (), {}, env={})


@functools.cache
def preset_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a bundled preset's state dict; one dict for presets of the same architecture."""
    models = {other: bundled_settings(other).model for other in preset_names()}
    bare = {other: replace(own, ckpt="", adapter="", inference="", stat="") for other, own in models.items()}
    first = next(other for other, own in bare.items() if own == bare[name])
    return settings_shapes(bundled_settings(name)) if first == name else preset_shapes(first)


def settings_shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state dict of a preset's model, built on the meta device."""
    with torch.device("meta"):
        return shapes_of(build_world_model(settings.model, settings.world).state_dict())


def fitting_presets(shapes: Shapes) -> dict[str, list[str]]:
    """Bundled presets that these shapes match, as a whole or in whole parts -> the missing parts."""
    held, fits = parts_of(shapes), {}
    for name in preset_names() if held and "" not in held else ():
        whole = preset_shapes(name)
        if not misfit({k: shape for k, shape in whole.items() if part_of(k) in held}, shapes):
            fits[name] = [part for part in parts_of(whole) if part not in held]
    return fits


def advice(given: Shapes, wanted: str = "model") -> str:
    """What to do with a checkpoint that is not the wanted ``model`` or ``VAE``."""
    kind, fits = kind_of(given), fitting_presets(given)
    names = " or ".join(fits)
    absent = next(iter(fits.values()), [])
    if kind == "adapter":
        return "this is an adapter: give it with --adapter, and the weights it belongs on with --ckpt"
    if kind == "unmerged world model":
        return "its LoRA layers are not merged: merge them where it was made (peft: merge_and_unload), and save again"
    if kind == "VAE" and wanted == "model":
        known = f" (preset {names})" if fits else ""
        return f"this is only a VAE{known}: give it with --vae (extract-latents, or pretrain --scratch)"
    if fits and (wanted == kind or set(absent) <= {PASSTHROUGH}):
        return f"it fits preset {names}: --preset {next(iter(fits))}"
    if fits:
        held = list(parts_of(given))
        folders = ", ".join(f"{part}/" for part in (*held, *absent))
        return (
            f"it holds the {_list(held)} of preset {names}, without {_list(absent)}: give whole weights, or a folder "
            f"with all parts ({folders})"
        )
    return (
        f"it fits none of the bundled presets ({', '.join(preset_names())}): give the one it was trained with, "
        "--preset FILE.toml"
    )


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
