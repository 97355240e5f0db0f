"""What an update costs, counted on the meta device before anything is read (see `models.meter`).

What the training uses is built there: adapters, optimisers, the network with or without gradient checkpointing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from persistworld_cli.config.settings import PostTrainSettings, PretrainSettings, Settings
from persistworld_cli.cost.flops import Work, checkpointing, measure
from persistworld_cli.cost.interaction import (
    AUTOCAST,
    META,
    InteractionCost,
    count_interaction,
    meta_model,
    part_sizes,
    predict,
    tensor_bytes,
    weight_bytes,
)
from persistworld_cli.cost.report import CostReport, MemoryRow, WorkRow, clips, interaction_rows
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.training.candidates import prefix_limit
from persistworld_cli.training.optim import Optimizers, inputs_and_outputs
from persistworld_cli.training.policy_switch import PolicySwitch
from persistworld_cli.training.pretrain import trained_parameters
from persistworld_cli.training.sharing import team_size

FLOAT32 = 4  # bytes


def post_train_report(settings: Settings) -> CostReport:
    """Cost of post-training: an interaction, an update by its kinds of work, the run, and a process's memory."""
    options, sampling = settings.post_train, settings.sampling
    model = meta_model(settings.model, settings.world)
    parameters, weights = part_sizes(model), weight_bytes(model)
    interaction = count_interaction(model, sampling, 1)
    switch = _policies(model, options)
    local = _local_groups(settings) * _local_candidates(settings)
    together = min(local, max(1, options.micro_batch * 4))  # as CandidateMaker draws them
    with switch.use("old", sampling=True):
        drawn = measure(
            lambda: predict(model, together, sampling.guidance), model.parameters(), AUTOCAST[sampling.dtype]
        )
    old = drawn.flops // (together if sampling.guidance == 1.0 else 2 * together)
    micro, learned = _learning(model, settings)
    images = local * options.chunks * _image_bytes(model)
    kept, frames = _latent_bytes(model, local * options.chunks), settings.model.num_frames
    adapters = [p for policy in ("theta", "old") for p in switch.parameters(policy)]
    return CostReport(
        parameters=parameters,
        trained=_trained_sizes(switch, options),
        work=[
            *interaction_rows(interaction, settings),
            *_update_rows(settings, interaction, old, learned.flops // micro),
        ],
        memory=[
            MemoryRow("weights", "weights, float32", weights),
            MemoryRow("adapters", "adapters of the trained and the sampling policy", tensor_bytes(adapters)),
            *_training_rows(switch.trainable(), options.optimizer),
            MemoryRow("candidates", f"candidates: {local}, latents and images", kept + (frames - 1) * images),
            MemoryRow("sampling", f"sampling {clips(together)} at once", drawn.peak, passing=True),
            MemoryRow("decoding", "decoding", interaction.decoding_bytes + frames * images, passing=True),
            MemoryRow("learning", f"learning from {clips(micro)} at once{_how(options)}", learned.peak, passing=True),
        ],
    )


def pretrain_report(settings: Settings) -> CostReport:
    """Cost of teacher-forced training: an update, the run, and a process's memory."""
    options, processes = settings.pretrain, settings.launch.num_processes
    model = meta_model(settings.model, settings.world)
    parameters = part_sizes(model)
    learned = trained_parameters(model, options)
    share = max(1, options.batch // processes)
    with _checkpointed(model, options):
        dtype = AUTOCAST[options.mixed_precision]
        step = measure(lambda: predict(model, share), model.parameters(), dtype, backward=True)
    update = step.flops / share * options.batch * options.accumulate
    return CostReport(
        parameters=parameters,
        trained={part: parameters[part] for part in options.parts},
        work=[
            WorkRow("clip", "forward and backward of one clip", step.flops / share),
            WorkRow("update", f"update: {clips(options.batch * options.accumulate)}", update, processes),
            WorkRow("run", f"run: {options.updates} updates", update * options.updates, processes),
        ],
        memory=[
            MemoryRow("weights", "weights, float32", weight_bytes(model)),
            *_training_rows(learned, options.optimizer, inputs_and_outputs(model)),
            *([MemoryRow("average", "averaged weights", tensor_bytes(learned))] if options.ema else []),
            MemoryRow("learning", f"learning from {clips(share)} at once{_how(options)}", step.peak, passing=True),
        ],
    )


def mean_prefix(options: PostTrainSettings) -> float:
    """Interactions of a prefix, on average over the run, where episodes are long enough."""
    longest = sum(prefix_limit(options, update) for update in range(options.updates)) / options.updates
    return longest if options.prefix == "fixed" else longest / 2


def _policies(model: WorldModel, options: PostTrainSettings) -> PolicySwitch:
    """The adapters that the training puts on the model."""
    with META:
        return PolicySwitch(
            model,
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            targets=options.lora_targets,
            train_action_encoder=options.train_action_encoder,
            seed=options.seed,
        )


def _learning(model: WorldModel, settings: Settings) -> tuple[int, Work]:
    """Clips of a micro batch, and its forward and backward under the trained policy."""
    options = settings.post_train
    kept = min(options.keep_best + options.keep_worst, _local_candidates(settings))
    micro = min(options.micro_batch, _local_groups(settings) * kept)
    with _checkpointed(model, options):
        dtype = AUTOCAST[options.mixed_precision]
        return micro, measure(lambda: predict(model, micro), model.parameters(), dtype, backward=True)


def _local_groups(settings: Settings) -> int:
    """Groups of which a process has candidates."""
    processes = settings.launch.num_processes
    return math.ceil(settings.post_train.groups * team_size(settings.post_train, processes) / processes)


def _local_candidates(settings: Settings) -> int:
    """Candidates of each of them that it draws."""
    return math.ceil(settings.post_train.candidates / team_size(settings.post_train, settings.launch.num_processes))


def _checkpointed(model: WorldModel, options: PostTrainSettings | PretrainSettings) -> AbstractContextManager[None]:
    dtype = AUTOCAST[options.mixed_precision]
    return checkpointing(model.unet, dtype) if options.gradient_checkpointing else nullcontext()


def _update_rows(settings: Settings, interaction: InteractionCost, old: int, theta: int) -> list[WorkRow]:
    """An update by its kinds of work, over all processes; ``old`` and ``theta`` are FLOPs of a clip.

    The sampling policy draws, so its adapters are beside the weights; the reference has none.
    """
    options, processes = settings.post_train, settings.launch.num_processes
    drawn, prefix = options.groups * options.candidates * options.chunks, mean_prefix(options)
    kept = options.groups * (options.keep_best + options.keep_worst) * options.chunks * options.sigmas_per_candidate
    draw = interaction.calls * old
    prefixes = options.groups * team_size(options, processes)  # every process of a team rolls it out for itself
    ahead = f"  {prefixes} prefixes of {prefix:g} interactions"
    parts = [
        WorkRow("prefixes", ahead, prefixes * prefix * draw, processes),
        WorkRow("candidates", f"  {drawn} candidates drawn", drawn * draw, processes),
        WorkRow("images", "  and decoded", drawn * interaction.decoding, processes),
        WorkRow(
            "learning",
            f"  {kept} learned from: trained policy forward and backward, sampling and reference forward",
            kept * (theta + old + interaction.network),
            processes,
        ),
    ]
    update = sum(part.flops for part in parts)
    return [
        WorkRow("drawing", "interaction step while training, adapters beside the weights", draw + interaction.decoding),
        WorkRow("update", "update", update, processes),
        *parts,
        WorkRow("run", f"run: {options.updates} updates", update * options.updates, processes),
    ]


def _training_rows(
    learned: list[nn.Parameter], optimizer: str, by_adamw: Iterable[nn.Parameter] = ()
) -> list[MemoryRow]:
    """Gradients, and what the optimisers remember: Muon one number a parameter, AdamW two."""
    state = 0
    for part in Optimizers(learned, optimizer, lr=1.0, weight_decay=0.0, by_adamw=by_adamw).all:
        held = [p for group in part.param_groups for p in group["params"]]
        state += tensor_bytes(held) * (1 if isinstance(part, torch.optim.Muon) else 2)
    return [
        MemoryRow("gradients", "gradients", tensor_bytes(learned)),
        MemoryRow("optimizer", f"optimiser ({optimizer})", state),
    ]


def _trained_sizes(switch: PolicySwitch, options: PostTrainSettings) -> dict[str, int]:
    """Parameters that learn: the adapters and the action encoder."""
    encoder = sum(p.numel() for p in switch.encoders["theta"].parameters() if p.requires_grad)
    lora = sum(p.numel() for p in switch.trainable()) - encoder
    return {f"LoRA, rank {options.lora_rank}": lora, "action_encoder": encoder}


def _latent_bytes(model: WorldModel, count: int) -> int:
    """Bytes of ``count`` candidates' latents and of what they were predicted from (history, current frame)."""
    settings = model.settings
    return count * (settings.num_history + 1 + settings.num_frames) * math.prod(model.latent_shape) * FLOAT32


def _image_bytes(model: WorldModel) -> int:
    """Bytes of one frame of all cameras, decoded."""
    return len(model.world.cameras) * 3 * model.world.height * model.world.width * FLOAT32


def _how(options: PostTrainSettings | PretrainSettings) -> str:
    """In which precision a training step runs, and what it keeps."""
    kept = ", checkpointed" if options.gradient_checkpointing else ""
    return f" ({options.mixed_precision if options.mixed_precision != 'no' else 'float32'}{kept})"
