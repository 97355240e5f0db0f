"""The cost of an update, counted on the meta device (see `flops`) with the training's own adapters and optimisers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from persistworld_cli.config.settings import PostTrainSettings, PretrainSettings, SamplingSettings, Settings
from persistworld_cli.cost.flops import Work, checkpointing, measure
from persistworld_cli.cost.interaction import (
    AUTOCAST,
    META,
    InteractionCost,
    clips,
    count_interaction,
    interaction_rows,
    meta_model,
    part_sizes,
    predict,
    sampler_calls,
    tensor_bytes,
    weight_bytes,
)
from persistworld_cli.cost.report import CostReport, MemoryRow, WorkRow
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.training.action_margin import BATCH
from persistworld_cli.training.candidates import prefix_limit, sampled_together, sampling_calls
from persistworld_cli.training.fsdp import units
from persistworld_cli.training.optim import Optimizers, inputs_and_outputs
from persistworld_cli.training.policy_switch import PolicySwitch, product_type_on_gpu
from persistworld_cli.training.pretrain import ROLLOUTS, clips_per_process, trained_parameters
from persistworld_cli.training.sharing import Share, divide

FLOAT32 = 4  # bytes
DRAWN = 500  # updates over which the wait for the slowest process is averaged


def post_train_report(settings: Settings) -> CostReport:
    """Cost of post-training: an interaction, an update by its kinds of work, the run, and a process's memory."""
    options, sampling = settings.post_train, settings.sampling
    model = meta_model(settings.model, settings.world)
    parameters = part_sizes(model)
    interaction = count_interaction(model, sampling, 1)
    held = product_type_on_gpu(settings)
    with META:
        switch = PolicySwitch(model, options, held)
    processes = settings.launch.num_processes
    share = Share.of(options, 0, processes)
    local = len(share.draws)
    kept = min(options.keep_best + options.keep_worst, len(share.candidates))
    micro = min(options.micro_batch, len(share.groups) * kept)
    together = min(local, sampled_together(options))
    with switch.use("old", sampling=True), torch.no_grad():
        merged = [layer.effective_weight() for layer in switch.layers]
        there = [*model.parameters(), *merged]
        drawn = measure(lambda: predict(model, together, sampling.guidance), there, AUTOCAST[sampling.dtype])
    learned = _learning(model, options, micro)
    clip_count, frames, world = local * options.chunks, settings.model.num_frames, settings.world
    latents = (settings.model.num_history + 1 + frames) * math.prod(model.latent_shape)  # also what is predicted from
    image = len(world.cameras) * 3 * world.height * world.width
    adapters = [p for policy in ("theta", "old") for p in switch.parameters(policy)]
    encoders = {id(p) for policy in ("theta", "old") for p in switch.encoders[policy].parameters()}
    lora_layers = [p for p in adapters if id(p) not in encoders]
    exact = tensor_bytes([layer.exact for layer in switch.layers]) if held else 0
    learning = switch.trainable()
    encoder = sum(p.numel() for p in switch.encoders["theta"].parameters() if p.requires_grad)
    lora = sum(p.numel() for p in learning) - encoder
    return CostReport(
        parameters=parameters,
        trained={f"LoRA, rank {options.lora_rank}": lora, "action_encoder": encoder},
        work=[
            *interaction_rows(interaction, settings),
            *_update_rows(settings, interaction, learned.forward // micro, learned.flops // micro),
        ],
        memory=[
            MemoryRow("weights", f"weights, {_held(held)}", weight_bytes(model) - tensor_bytes(lora_layers) + exact),
            MemoryRow("adapters", "adapters of the trained and the sampling policy", tensor_bytes(adapters)),
            MemoryRow("merged", "weights of the sampling policy, merged", tensor_bytes(merged)),
            *_training_rows(learning, options.optimizer),
            MemoryRow(
                "candidates",
                f"candidates: {local}, latents and images",
                clip_count * (latents + (frames - 1) * image) * FLOAT32,
            ),
            MemoryRow("sampling", f"sampling {clips(together)} at once", drawn.peak, passing=True),
            MemoryRow(
                "decoding", "decoding", interaction.decoding_bytes + clip_count * frames * image * FLOAT32, passing=True
            ),
            MemoryRow("learning", f"learning from {clips(micro)} at once{_how(options)}", learned.peak, passing=True),
        ],
    )


def pretrain_report(settings: Settings) -> CostReport:
    """Cost of teacher-forced training: an update, the run, and a process's memory."""
    options, processes = settings.pretrain, settings.launch.num_processes
    model = meta_model(settings.model, settings.world)
    parameters = part_sizes(model)
    learned = trained_parameters(model, options)
    held, ranks = tensor_bytes(learned), processes if options.shard else 1
    share = clips_per_process(options, processes)
    step = _learning(model, options, share)
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
            MemoryRow("weights", "weights, float32", weight_bytes(model) - held + held // ranks),
            *_training_rows(learned, options.optimizer, inputs_and_outputs(model), ranks),
            *([MemoryRow("average", "averaged weights", held // ranks)] if options.ema else []),
            MemoryRow(
                "learning",
                f"learning from {clips(share)} at once{_how(options)}",
                step.peak + (_gathered(model, options) if ranks > 1 else 0),
                passing=True,
            ),
            *_between_updates(model, settings, held, ranks),
        ],
    )


def _gathered(model: WorldModel, options: PretrainSettings) -> int:
    """Bytes that an update of a sharded model holds beside shares, at most: a part's own weights and their gradients,
    and four times its largest unit (weights, gradients, and what is being gathered and reduced).
    """
    apart = [[tensor_bytes(unit.parameters()) for unit in units(getattr(model, part))] for part in options.parts]
    return max(2 * (whole - sum(inner)) + 4 * max(inner, default=0) for *inner, whole in apart)


def _between_updates(model: WorldModel, settings: Settings, held: int, ranks: int) -> list[MemoryRow]:
    """What passes with several processes: gradients, averaged whole; or a sharded model's checks, gathered whole."""
    options, processes = settings.pretrain, settings.launch.num_processes
    if ranks == 1:
        return [MemoryRow("averaging", "averaging gradients", 2 * held, passing=True)] if processes > 1 else []
    looked = measure(lambda: predict(model, BATCH), model.parameters(), AUTOCAST[options.mixed_precision]).peak
    if options.check_every or options.video_every:
        drawn = count_interaction(model, settings.sampling, ROLLOUTS)
        looked = max(looked, drawn.sampling_bytes, drawn.decoding_bytes)
    own = held // ranks if options.ema else 0  # put aside for the averages
    return [MemoryRow("checks", "checks, with all weights gathered", held + own + looked, passing=True)]


def mean_prefix(options: PostTrainSettings) -> float:
    """Mean interactions of a prefix over the run, if episodes are long enough."""
    longest = sum(prefix_limit(options, update) for update in range(options.updates)) / options.updates
    return longest if options.prefix == "fixed" else longest / 2


def _learning(model: WorldModel, options: PostTrainSettings | PretrainSettings, count: int) -> Work:
    """Forward and backward of some clips."""
    dtype = AUTOCAST[options.mixed_precision]
    with checkpointing(model.unet, dtype) if options.gradient_checkpointing else nullcontext():
        return measure(lambda: predict(model, count), model.parameters(), dtype, backward=True)


def slowest_process(options: PostTrainSettings, sampling: SamplingSettings, processes: int) -> tuple[float, float]:
    """Of the slowest process of an update, on average: calls of the network to sample, and candidates learned from.

    Over random prefixes, as if episodes were long enough, and random kept candidates.
    """
    shares = [Share.of(options, rank, processes) for rank in range(processes)]
    rng, kept = np.random.default_rng(0), options.keep_best + options.keep_worst
    numbers = np.tile(np.arange(options.candidates), (options.groups, 1))
    calls = learned = 0
    for draw in range(DRAWN):
        longest = prefix_limit(options, draw * options.updates // DRAWN)
        prefixes = rng.integers(longest if options.prefix == "fixed" else 0, longest + 1, options.groups)
        calls += divide(shares, prefixes.tolist(), *sampling_calls(options, sampling)).calls
        best = rng.permuted(numbers, axis=1)[:, :kept]
        learned += max(int(np.isin(best[list(share.groups)], share.candidates).sum()) for share in shares)
    return calls / DRAWN, learned / DRAWN


def _update_rows(settings: Settings, interaction: InteractionCost, old: int, theta: int) -> list[WorkRow]:
    """An update by its kinds of work, over all processes.

    ``old``: FLOPs of a clip with adapters, forward; ``theta``: forward and backward. Sampling merges them.
    """
    options, sampling, processes = settings.post_train, settings.sampling, settings.launch.num_processes
    drawn, prefix = options.groups * options.candidates * options.chunks, mean_prefix(options)
    repeats = options.chunks * options.sigmas_per_candidate
    kept = options.groups * (options.keep_best + options.keep_worst) * repeats
    calls = sampler_calls(replace(sampling, steps=options.steps or sampling.steps))
    # every process of a team rolls out its prefixes for itself
    prefixes = options.groups * len(Share.of(options, 0, processes).team)
    ahead = f"  {prefixes} prefixes of {prefix:g} interactions"
    learning = theta + old + interaction.network
    parts = [  # adapters are merged once per update
        WorkRow("prefixes", ahead, prefixes * prefix * interaction.calls * interaction.network, processes),
        WorkRow("candidates", f"  {drawn} candidates drawn", drawn * calls * interaction.network, processes),
        WorkRow("images", "  and decoded", drawn * interaction.decoding, processes),
        WorkRow(
            "learning",
            f"  {kept} learned from: trained policy forward and backward, sampling and reference forward",
            kept * learning,
            processes,
        ),
    ]
    steps, learned = slowest_process(options, sampling, processes)  # a single one waits for none
    sampled = steps * interaction.network * interaction.calls / sampling.steps
    slowest = (
        sampled + drawn * interaction.decoding / processes + learned * repeats * learning if processes > 1 else 0.0
    )
    update = sum(part.flops for part in parts)
    return [
        WorkRow("update", "update", update, processes, slowest),
        *parts,
        WorkRow(
            "run", f"run: {options.updates} updates", update * options.updates, processes, slowest * options.updates
        ),
    ]


def _training_rows(
    learned: list[nn.Parameter], optimizer: str, by_adamw: Iterable[nn.Parameter] = (), ranks: int = 1
) -> list[MemoryRow]:
    """Gradients, and the optimisers' state: one number per parameter for Muon, two for AdamW; shared by ``ranks``."""
    state = 0
    for part in Optimizers(learned, optimizer, lr=1.0, weight_decay=0.0, by_adamw=by_adamw).all:
        held = [p for group in part.param_groups for p in group["params"]]
        state += tensor_bytes(held) * (1 if isinstance(part, torch.optim.Muon) else 2)
    return [
        MemoryRow("gradients", "gradients", tensor_bytes(learned) // ranks),
        MemoryRow("optimizer", f"optimiser ({optimizer})", state // ranks),
    ]


def _held(dtype: torch.dtype | None) -> str:
    """The types that a post-training holds the weights in."""
    return "float32" if dtype is None else f"the network's products {str(dtype).removeprefix('torch.')}, others float32"


def _how(options: PostTrainSettings | PretrainSettings) -> str:
    """A training step's precision, and whether it is checkpointed."""
    kept = ", checkpointed" if options.gradient_checkpointing else ""
    return f" ({options.mixed_precision if options.mixed_precision != 'no' else 'float32'}{kept})"
