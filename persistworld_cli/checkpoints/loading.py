"""Load models: state dicts (.pt, .safetensors), shards, diffusers folders, hub ids, adapters.

Names and shapes are checked before any data is read. Tensors are then read one by one into the model, so that loading
needs little more memory than the model itself (`benchmarks/loading.py` measures it).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from persistworld_cli.checkpoints.action_scale import weights_stores
from persistworld_cli.checkpoints.adapters import merge_adapter
from persistworld_cli.checkpoints.compatibility import part_of, parts_of, require_fit, shapes_of
from persistworld_cli.checkpoints.references import inference_ref
from persistworld_cli.checkpoints.sources import locate
from persistworld_cli.checkpoints.tensor_files import WeightFiles, fill
from persistworld_cli.config.settings import ModelSettings, Settings, WorldSettings
from persistworld_cli.config.weight_names import PARTS, PASSTHROUGH, USED_PARTS
from persistworld_cli.data.clips.store import EpisodeStore, open_store
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models.compiling import compile_network
from persistworld_cli.models.precision import allow_tf32
from persistworld_cli.models.vae import AutoencoderKLTemporalDecoder, build_vae
from persistworld_cli.models.world_model import WorldModel, build_world_model, sampling_dtype

logger = logging.getLogger(__name__)
SCALING_NOTE = "vae_scaling_factor"  # note of a VAE's weights: 1 / standard deviation of its latents, as measured
SCALING_TOLERANCE = 0.05
OPTIONAL = ("text_encoder", "action_encoder")  # parts that Stable Video Diffusion does not have
_CLIP_IMAGES = tuple(f"text_encoder.{name}" for name in ("vision_model.", "visual_projection.", "logit_scale"))


def load_world_model(
    settings: ModelSettings,
    world: WorldSettings,
    *,
    ckpt: str | None = None,
    adapter: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    optional: Sequence[str] = (),
    passthrough: bool = False,
) -> WorldModel:
    """The model of a preset with its weights, on `device`, in eval mode, frozen; for every subcommand.

    Args:
        settings: architecture and default weights.
        world: cameras and image size.
        ckpt: file, folder, hub id or "bundled:PATH"; None: `settings.ckpt`.
        adapter: a post-trained PEFT folder on top; None: `settings.adapter`; "" for none.
        device: where to put it.
        dtype: of all weights, whatever the file's; an adapter is merged in float32 first.
        optional: of `OPTIONAL`, parts that the checkpoint may lack as a whole: the text encoder then comes from the
            tokenizer's folder or hub id (CLIP), the action encoder starts at random.
        passthrough: also load the unused image encoder (a quarter of the full-size checkpoint); by default it is only
            checked, if the checkpoint has it.

    Raises:
        PersistWorldError: weights that are absent, damaged, or of another model.
    """
    source = settings.ckpt if ckpt is None else ckpt
    if not source:
        raise PersistWorldError("no weights named", where="model.ckpt", fix="give --ckpt: a file, a folder or a hub id")
    overlay = settings.adapter if adapter is None else adapter
    with torch.device("meta"):
        model = build_world_model(settings, world).to(torch.float32 if overlay else dtype)
    files, absent = _open(source, settings, optional, passthrough)
    expected = shapes_of(model.state_dict())
    require_fit({k: shape for k, shape in expected.items() if part_of(k) not in absent}, files.shapes, source)
    if not passthrough or PASSTHROUGH not in parts_of(files.info):
        model.drop_passthrough()
    files.report()
    model.to_empty(device=device)
    targets = model.state_dict()
    files.rename({name: name for name in files.info if name in targets})
    fill(targets, files)
    del files, targets
    if "action_encoder" in absent:
        logger.info("'%s' has no action encoder: it starts with random weights", source)
        for layer in model.action_encoder.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.reset_parameters()
    reset_buffers(model)
    if overlay:
        merge_adapter(model, overlay)
    model.to(device, dtype).eval().requires_grad_(False)
    return model


def load_for_sampling(settings: Settings, *, ckpt: str, adapter: str, device: torch.device | str = "cpu") -> WorldModel:
    """`load_world_model` for rollouts: weights in the type of ``settings.sampling``, compiled if requested.

    `references.inference_ref` names the weights of a preset.
    """
    allow_tf32(settings.launch.tf32)
    model = load_world_model(
        settings.model,
        settings.world,
        ckpt=ckpt,
        adapter=adapter,
        device=device,
        dtype=sampling_dtype(settings.sampling),
    )
    model.cast_for_sampling(settings.sampling)
    if settings.launch.compile:
        compile_network(model)
    return model


def open_dataset(settings: Settings) -> EpisodeStore:
    """The dataset that the settings name, with the action scale of the weights that `load_model` loads.

    Raises:
        UsageError: they name none.
        PersistWorldError: it is not there, or as `weights_stores`.
    """
    (store,) = weights_stores(settings, open_store(settings), [inference_ref(settings.model).parts])
    return store


def load_model(settings: Settings) -> WorldModel:
    """The world model that the settings say inference runs (`inference_ref`), on their device.

    Raises:
        PersistWorldError: weights that are absent, damaged, or of another model; no such device.
    """
    ref, device, gpu = inference_ref(settings.model), settings.launch.device, torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise PersistWorldError("no CUDA device is available", where="launch.device", fix="--device cpu, or auto")
    device = ("cuda" if gpu else "cpu") if device == "auto" else device
    return load_for_sampling(settings, ckpt=ref.ckpt, adapter=ref.adapter, device=device)


def open_passthrough(source: str) -> WeightFiles:
    """The unused part of a checkpoint (image encoder), fetched and opened but not read; may be empty."""
    files = WeightFiles(locate(source))
    files.rename({name: name for name in files.info if name.startswith(f"{PASSTHROUGH}.")})
    return files


def _open(
    source: str, settings: ModelSettings, optional: Sequence[str], passthrough: bool
) -> tuple[WeightFiles, list[str]]:
    """A checkpoint's tensors, with CLIP's text tower if its own is missing; and the missing parts."""
    located = locate(source, PARTS if passthrough else USED_PARTS)
    files = WeightFiles(located)
    held = parts_of(files.info)
    absent = [part for part in optional if part not in held]
    if "unet" not in held or "text_encoder" not in absent:
        return files, absent if "unet" in held else []
    try:
        clip = locate(settings.tokenizer)
    except PersistWorldError as error:
        raise PersistWorldError(
            f"the checkpoint has no text encoder, and there is none with the tokenizer: {error.what}",
            where=f"{source}, model.tokenizer = {settings.tokenizer}",
            fix="let model.tokenizer name a CLIP model with its weights, e.g. openai/clip-vit-base-patch32",
        ) from error
    logger.info("'%s' has no text encoder: using CLIP's from '%s'", source, settings.tokenizer)
    files = WeightFiles(located, replace(clip, files=tuple((path, "text_encoder.") for path, _ in clip.files)))
    files.rename({name: name for name in files.info if not name.startswith(_CLIP_IMAGES)})
    return files, [part for part in absent if part != "text_encoder"]


def vae_source(vae: str | None, settings: ModelSettings) -> str:
    """The weights of the VAE to load: ``--vae``, else the model's. Raises PersistWorldError if there are none."""
    if source := vae or settings.ckpt:
        return source
    raise PersistWorldError("no VAE is named", where="--vae, model.ckpt", fix="give --vae, or a preset with weights")


def _compare_scaling(measured: str | None, used: float, source: str) -> None:
    """Warn if latents would not have the standard deviation 1 that the noise levels are made for (method.md 2)."""
    if measured and abs(used / float(measured) - 1) > SCALING_TOLERANCE:
        logger.warning(
            "warning: latents of this VAE would have a standard deviation of %.2f instead of 1\n  where: %s; "
            "model.vae.scaling_factor = %g\n  to do: --set model.vae.scaling_factor=%s, in extraction and training",
            used / float(measured),
            source,
            used,
            measured,
        )


def load_vae(settings: ModelSettings, source: str) -> AutoencoderKLTemporalDecoder:
    """The preset's VAE with its weights, float32, frozen.

    Args:
        settings: its architecture.
        source: a world model's checkpoint (of which only `vae.*` is read), a diffusers folder, or a VAE alone.

    Raises:
        PersistWorldError: weights that are absent, damaged, or of another VAE.
    """
    files = WeightFiles(locate(source, parts=("vae",)))
    own = {name: name.removeprefix("vae.") for name in files.info if name.startswith("vae.")}
    whole = set(parts_of(files.info)) - {"vae", ""}
    with torch.device("meta"):
        vae = build_vae(settings.vae, settings.norm_groups)
    expected = {f"vae.{name}": shape for name, shape in shapes_of(vae.state_dict()).items()}
    given = {name: files.info[name].shape for name in (own if own and whole else files.info)}
    require_fit(expected, given, source, wanted="VAE")
    files.report()
    files.rename(own)
    vae.to_empty(device="cpu")
    fill(vae.state_dict(), files)
    _compare_scaling(files.metadata.get(SCALING_NOTE), float(vae.config.scaling_factor), source)
    return vae.eval().requires_grad_(False)


def reset_buffers(model: WorldModel) -> None:
    """Fill buffers that no checkpoint holds (CLIP's position ids) after the model was built on the meta device."""
    for module in model.modules():
        ids = module._buffers.get("position_ids")
        if ids is not None:
            module._buffers["position_ids"] = torch.arange(ids.shape[-1])[None]
