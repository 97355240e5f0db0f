"""Weights in: state dicts (.pt, .safetensors), folders, hub ids, adapters; one message where they do not fit."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.settings import ModelSettings, WorldSettings
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models.lora import merge_adapter
from persistworld_cli.models.vae import AutoencoderKLTemporalDecoder, build_vae
from persistworld_cli.models.world_model import WorldModel, build_world_model

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# Buffers that old transformers wrote and new ones do not .
DROPPED = ("position_ids",)


def load_world_model(
    settings: ModelSettings,
    world: WorldSettings,
    *,
    ckpt: str | None = None,
    adapter: str | None = None,
    device: torch.device | str = "cpu",
) -> WorldModel:
    """The model of a preset with its weights, on `device`, in eval mode, float32.

    Args:
        settings: architecture and default weights.
        world: cameras and picture size.
        ckpt: file, folder, hub id or "bundled:PATH"; None: `settings.ckpt`.
        adapter: a post-trained PEFT folder on top; None: `settings.adapter`; "" for none.
        device: where to put it.

    Raises:
        PersistWorldError: weights that are absent, damaged, or of another model.
    """
    source = settings.ckpt if ckpt is None else ckpt
    if not source:
        raise PersistWorldError("no weights named", where="model.ckpt", fix="give --ckpt: a file, a folder or a hub id")
    with torch.device("meta"):
        model = build_world_model(settings, world)
    tensors = read_state_dict(find_weights(source))
    check_fit(model.state_dict(), tensors, source)
    model.to_empty(device="cpu")
    reset_buffers(model)
    model.load_state_dict({k: v.float() for k, v in tensors.items()})
    model.to(device).eval().requires_grad_(False)
    overlay = settings.adapter if adapter is None else adapter
    if overlay:
        merge_adapter(model, find_weights(overlay, folder=True))
        model.to(device).eval().requires_grad_(False)
    return model


def load_vae(settings: ModelSettings, source: str) -> AutoencoderKLTemporalDecoder:
    """The preset's VAE with its weights: keys `vae.*` of a world model's checkpoint, or a VAE's own keys."""
    tensors = read_state_dict(find_weights(source))
    own = {k.removeprefix("vae."): v.float() for k, v in tensors.items() if k.startswith("vae.")} or tensors
    vae = build_vae(settings.vae, settings.norm_groups)
    check_fit(vae.state_dict(), own, source)
    vae.load_state_dict(own)
    return vae.eval().requires_grad_(False)


def reset_buffers(model: WorldModel) -> None:
    """Fill buffers that no checkpoint holds (CLIP's position ids) after the model was built without memory."""
    for module in model.modules():
        ids = module._buffers.get("position_ids")
        if ids is not None:
            module._buffers["position_ids"] = torch.arange(ids.shape[-1])[None]


def find_weights(source: str | Path, *, folder: bool = False) -> Path:
    """A local file or folder for a path, "bundled:PATH" or hub id (HF_HOME and HF_HUB_OFFLINE are honoured)."""
    path = resolve_path(str(source))
    if path.exists():
        return path
    text = str(source)
    if text.count("/") != 1 or text.startswith((".", "/", "~", "bundled:")):
        raise PersistWorldError(f"no such file or folder: '{path}'", where="weights", fix="check the path")
    try:
        return Path(snapshot_download(text))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise PersistWorldError(
            f"'{text}' is neither on disk nor to be had from the hub: {str(error).splitlines()[0]}",
            where="weights",
            fix="check the path or hub id; offline, download it first (hf download) and set HF_HOME",
        ) from error


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a weights file, or of all weights files of a folder; memory-mapped, no code is run.

    Raises:
        PersistWorldError: no weights there, a damaged file, or a pickle that holds more than tensors.
    """
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in SUFFIXES)
    if not files:
        raise PersistWorldError(f"no weights in '{path}'", where="weights", fix=f"expected files ending in {SUFFIXES}")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                part: Mapping[str, torch.Tensor] = load_file(str(file))
            else:
                part = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise PersistWorldError(
                "the file holds more than tensors and was not opened",
                where=str(file),
                fix="get a state dict or safetensors",
            ) from error
        except (SafetensorError, RuntimeError, EOFError, OSError) as error:
            raise PersistWorldError(
                f"damaged or not a weights file: {str(error).splitlines()[0]}", where=str(file), fix="download it again"
            ) from error
        tensors.update(part)
    return {k: v for k, v in tensors.items() if not k.endswith(DROPPED)}


def check_fit(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise one message with the count and first of the missing, unexpected and differently shaped keys."""
    missing = [k for k in expected if k not in given]
    unexpected = [k for k in given if k not in expected]
    shape = [k for k in expected if k in given and expected[k].shape != given[k].shape]
    if not (missing or unexpected or shape):
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} keys missing (first: {missing[0]})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected (first: {unexpected[0]})")
    if shape:
        k = shape[0]
        parts.append(
            f"{len(shape)} of another shape (first: {k} {tuple(given[k].shape)}, not {tuple(expected[k].shape)})"
        )
    raise PersistWorldError(
        f"the checkpoint does not fit this preset's model: {'; '.join(parts)}",
        where=source,
        fix="name the preset it was trained with (--preset)",
    )
