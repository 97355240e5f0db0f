"""Parameters of a world model, and FLOPs and memory of one interaction, counted without weights (see `flops`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from persistworld_cli.config.settings import ModelSettings, SamplingSettings, Settings, WorldSettings
from persistworld_cli.config.weight_names import PASSTHROUGH
from persistworld_cli.cost.flops import measure
from persistworld_cli.cost.report import CostReport, MemoryRow, WorkRow
from persistworld_cli.models.cpu.hook import as_diffusers
from persistworld_cli.models.diffusion import karras_sigmas
from persistworld_cli.models.samplers import SAMPLERS, find_sampler
from persistworld_cli.models.vae import encode
from persistworld_cli.models.world_model import Condition, WorldModel, build_world_model, sampling_dtype

META = torch.device("meta")
AUTOCAST = {  # sampling.dtype and mixed_precision
    **{"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16},
    **{"no": torch.float32, "bf16": torch.bfloat16},
}


@dataclass(frozen=True)
class InteractionCost:
    """One interaction step of a model as it samples, adapters merged: L - 1 new frames, decoded.

    Attributes:
        calls: clips through the network per clip drawn: the sampler's calls, twice as many with guidance.
        network: FLOPs of the network for one clip.
        network_reference: the same with cross-attention computed at every pixel, as the reference does.
        decoding: FLOPs of decoding the L frames of all cameras.
        encoding: FLOPs of encoding one frame of all cameras, with which a rollout from images begins.
        sampling_bytes, decoding_bytes: most bytes alive at once beside the weights.
    """

    calls: int
    network: int
    network_reference: int
    decoding: int
    encoding: int
    sampling_bytes: int
    decoding_bytes: int

    @property
    def flops(self) -> int:
        """Of a whole interaction of one rollout."""
        return self.calls * self.network + self.decoding

    @property
    def flops_reference(self) -> int:
        """The same as the reference computes it."""
        return self.calls * self.network_reference + self.decoding


def meta_model(settings: ModelSettings, world: WorldSettings) -> WorldModel:
    """The model of a preset on the meta device, frozen.

    Raises:
        PersistWorldError: no model can be built from the settings.
    """
    with META:
        model = build_world_model(settings, world)
    return model.to(META).eval().requires_grad_(False)  # diffusers still creates a few scalars on the CPU


def part_sizes(model: WorldModel) -> dict[str, int]:
    """Parameters of each part, by its name in the checkpoint."""
    return {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}


def weight_bytes(model: WorldModel) -> int:
    """Bytes of the weights that are loaded: all except the unused image encoder."""
    return sum(tensor_bytes(part.parameters()) for name, part in model.named_children() if name != PASSTHROUGH)


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors as they are held."""
    return sum(t.numel() * t.element_size() for t in tensors)


def predict(model: WorldModel, clips: int, guidance: float = 1.0) -> torch.Tensor:
    """The clean prediction of some clips from their poses and instructions: (clips, L, C, h, w) on the meta device."""
    settings, frame = model.settings, model.latent_shape
    past, frames = settings.num_history, settings.num_frames

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(clips, *shape, device=META)

    text = empty(model.text_encoder.text_projection.out_features) if settings.text_cond else None
    tokens = model.tokens(empty(past + frames, settings.action_dim), text)
    condition = Condition(empty(past, *frame), empty(*frame), tokens, 0.0)
    return model.denoise_guided(empty(frames, *frame), empty(), condition, guidance)


def sampler_calls(sampling: SamplingSettings) -> int:
    """Clips through the network per sampled clip: the sampler's own calls on a clip of zeros, twice under guidance.

    Raises:
        PersistWorldError: a user-defined sampler fails on it.
    """
    calls = 0

    def count(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return x

    sigmas = karras_sigmas(sampling.steps, sampling.sigma_min, sampling.sigma_max, sampling.rho)
    find_sampler(sampling.sampler)(count, torch.zeros(1, 1, 1, 1, 1), sigmas)
    return calls if sampling.guidance == 1.0 else 2 * calls


def count_interaction(model: WorldModel, sampling: SamplingSettings, rollouts: int) -> InteractionCost:
    """Cost of an interaction of a model on the meta device; bytes for ``rollouts`` rollouts advanced together."""
    dtype = AUTOCAST[sampling.dtype] if model.dtype is torch.float32 else torch.float32  # no autocast, as the engine
    sampled = measure(lambda: predict(model, rollouts, sampling.guidance), model.parameters(), dtype)
    rows, chunk = model.settings.num_frames * len(model.world.cameras), sampling.decode_chunk
    together = 1 if rows % (chunk or model.settings.num_frames) else -(-model.decode_rows // rows)
    latents = torch.empty(together, model.settings.num_frames, *model.latent_shape, device=META)
    decode_dtype = AUTOCAST[sampling.decode_dtype] if model.vae.dtype is torch.float32 else torch.float32
    decoded = measure(lambda: model.decode_latents(latents, chunk), model.parameters(), decode_dtype)
    images = torch.empty(len(model.world.cameras), 3, model.world.height, model.world.width, device=META)
    with as_diffusers(model.unet):
        reference = measure(lambda: predict(model, 1), model.parameters(), dtype)
    return InteractionCost(
        calls=sampler_calls(sampling),
        network=sampled.flops // (rollouts if sampling.guidance == 1.0 else 2 * rollouts),
        network_reference=reference.flops,
        decoding=decoded.flops // together,
        encoding=measure(lambda: encode(model.vae, images), model.parameters(), torch.float32).flops,
        sampling_bytes=sampled.peak,
        decoding_bytes=decoded.peak,
    )


def interaction_rows(cost: InteractionCost, settings: Settings) -> list[WorkRow]:
    """The network and an interaction step of one rollout, here and as the reference computes them."""
    sampling = settings.sampling
    seconds = (settings.model.num_frames - 1) / settings.world.rate_hz
    guided = ", twice each for guidance" if sampling.guidance != 1.0 else ""
    steps = f"{sampling.steps} {sampling.sampler} step{'s' if sampling.steps > 1 else ''}{guided}"
    if sampling.sampler not in SAMPLERS:
        steps += f" ({cost.calls} network calls, counted on a clip of zeros)"
    reference = "  as the reference computes it (cross-attention at every pixel)"
    return [
        WorkRow("network", "the network, one clip", cost.network),
        WorkRow("network_reference", reference, cost.network_reference),
        WorkRow("interaction", f"interaction step, {seconds:g} s of the world: {steps}, decoding", cost.flops),
        WorkRow("interaction_reference", reference, cost.flops_reference),
        WorkRow("decoding", "  decoding alone", cost.decoding),
        WorkRow("encoding", "encoding one frame of all cameras", cost.encoding),
    ]


def interaction_report(settings: Settings, rollouts: int) -> CostReport:
    """Cost of an interaction step of ``rollouts`` rollouts advanced together, adapters merged."""
    model = meta_model(settings.model, settings.world).cast_for_sampling(settings.sampling)
    cost = count_interaction(model, settings.sampling, rollouts)
    rows, held = interaction_rows(cost, settings), str(sampling_dtype(settings.sampling)).removeprefix("torch.")
    if rollouts > 1:
        rows.append(WorkRow("batch", f"interaction step of {rollouts} rollouts together", rollouts * cost.flops))
    return CostReport(
        parameters=part_sizes(model),
        work=rows,
        memory=[
            MemoryRow("weights", f"weights, {held}", weight_bytes(model)),
            MemoryRow("sampling", f"sampling {clips(rollouts)} at once", cost.sampling_bytes, passing=True),
            MemoryRow("decoding", "decoding", cost.decoding_bytes, passing=True),
        ],
    )


def clips(count: int) -> str:
    """``1 clip``, ``8 clips``."""
    return "1 clip" if count == 1 else f"{count} clips"
