"""`persistworld pretrain`: teacher-forced training of the world model on recorded clips.

Clips and all that is drawn for each are functions of (seed, number of the clip in the run), so a resumed run repeats an
unbroken one, and several processes do what one would.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from persistworld_cli.checkpoints.action_scale import check_poses, scale_note, scale_of
from persistworld_cli.checkpoints.loading import FRESH, load_vae, load_world_model, open_passthrough
from persistworld_cli.checkpoints.saving import save_safetensors
from persistworld_cli.checkpoints.tensor_files import WeightFiles
from persistworld_cli.config.requests import PretrainRequest
from persistworld_cli.config.settings import PretrainSettings, Settings
from persistworld_cli.config.weight_names import adapter_name
from persistworld_cli.data.clips.loader import ClipLoader
from persistworld_cli.data.clips.mixture import ClipMixture, open_clips
from persistworld_cli.data.clips.store import ActionStat, EpisodeStore, open_store
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models.world_model import WorldModel, build_world_model
from persistworld_cli.objective.denoising import batch_loss
from persistworld_cli.reports.progress import Meter
from persistworld_cli.reports.training_curves import PRETRAIN_PANELS, training_curves
from persistworld_cli.stages import stage
from persistworld_cli.training.optim import Optimizers, inputs_and_outputs
from persistworld_cli.training.pretrain_checks import PretrainChecks
from persistworld_cli.training.resuming import require_same_shapes
from persistworld_cli.training.run import GO_ON, Interrupted, Run
from persistworld_cli.training.schedule import WeightAverage, lr_factor

logger = logging.getLogger(__name__)


def initial_model(settings: Settings, request: PretrainRequest, device: torch.device) -> WorldModel:
    """From the settings' weights; by request from scratch, but for the VAE.

    Stable Video Diffusion's weights lack two parts: the text encoder then comes from CLIP, the action encoder is fresh.
    """
    torch.manual_seed(settings.pretrain.seed)
    if not request.scratch:
        own = settings.model
        return load_world_model(
            own, settings.world, ckpt=own.ckpt, adapter=adapter_name(own.adapter), device=device, fresh=FRESH
        )
    model = build_world_model(settings.model, settings.world)
    model.vae = load_vae(settings.model, request.vae or settings.model.ckpt)
    return model.to(device)


def trained_parameters(model: WorldModel, options: PretrainSettings) -> list[torch.nn.Parameter]:
    """Parameters of the parts that learn; everything else is frozen."""
    model.requires_grad_(False)
    for part in options.parts:
        if not isinstance(module := getattr(model, part, None), torch.nn.Module):
            raise PersistWorldError(
                f"no part '{part}' in this model", where="pretrain.parts", fix="unet, action_encoder, ..."
            )
        module.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def save_weights(
    model: WorldModel, folder: Path, carried: WeightFiles | None = None, stat: ActionStat | None = None
) -> Path:
    """All parts as one safetensors file under Ctrl-World's names, whole or not at all.

    Args:
        model: what was trained.
        folder: where the file goes.
        carried: what the checkpoint it began from holds beside (an image encoder), taken over as it is.
        stat: the percentiles that actions are scaled by, which the file then carries.

    Raises:
        CannotWrite: the disk is full or closed to us.
    """
    path = folder / "model.safetensors"
    own = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    save_safetensors(path, {**own, **(carried.load() if carried else {})}, scale_note(stat), GO_ON)
    return path


def run(settings: Settings, request: PretrainRequest) -> dict[str, Any]:
    """Train until `settings.pretrain.updates`, from the latest state in the output folder if there is one.

    Returns the last training loss, the validation loss and where the weights lie.
    """
    clips = settings.clips
    with Run.of(settings, settings.pretrain, request) as work:
        own = settings.model
        begun_from = [] if request.scratch else [adapter_name(own.adapter), own.ckpt]
        store = open_store(settings)
        scale = scale_of(settings, store, [*work.resumed_from, *begun_from], quiet=not work.main)
        store = store.scaled_by(scale.stat)
        train = open_clips(settings, stat=scale.stat)
        for source in train.sources:
            check_poses(settings, source.store, scale, split=source.split, quiet=not work.main)
        val = open_clips(settings, "val", scale.stat) if store.episodes("val") else None
        work.notes |= scale_note(scale.stat)
        if work.main:
            logger.info("clips: %s; scale of actions: %s", train.describe(), scale.origin)
        share = settings.pretrain.batch // work.world
        # before the model is here: its workers are copies of this process
        with ClipLoader(train, share, workers=clips.workers, ahead=clips.ahead) as loader:
            return _train(settings, request, work, loader, val, store)


def _train(
    settings: Settings,
    request: PretrainRequest,
    work: Run,
    loader: ClipLoader,
    val: ClipMixture | None,
    store: EpisodeStore,
) -> dict[str, Any]:
    """The training loop."""
    options = settings.pretrain
    model = initial_model(settings, request, work.device)
    carried = None if request.scratch else open_passthrough(settings.model.ckpt)
    parameters = trained_parameters(model, options)
    if options.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    optimizers = Optimizers(
        parameters,
        options.optimizer,
        lr=options.lr,
        weight_decay=options.weight_decay,
        betas=(0.9, options.beta2),
        by_adamw=inputs_and_outputs(model),
    )
    average = WeightAverage(parameters, options.ema)
    checks = PretrainChecks(settings, model, val, parameters, average, work, store)
    begun = restore(work, parameters, optimizers, average, checks)
    checks.begin()
    batches = loader.batches(options.seed, begun * options.accumulate, work.rank, work.world)
    model.train()
    loss = torch.tensor(float("nan"))
    title = f"pretrain, {checks.caveat}" if checks.caveat else "pretrain"
    with Meter(title, options.updates, done=begun, quiet=not work.main) as meter:
        for step in range(begun, options.updates):
            lr = options.lr * lr_factor(step, options.updates, options.warmup, options.decay)
            optimizers.set_lr(lr)
            for part in range(options.accumulate):
                tick = step * options.accumulate + part
                batch = next(batches)
                with work.accelerator.autocast():
                    first = (tick * work.world + work.rank) * len(batch.latents)
                    loss = batch_loss(model, batch, options, options.seed, first)
                with stage("backward"):
                    (loss / options.accumulate).backward()
            work.average_gradients(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
            if not torch.isfinite(norm):
                work.save(step, snapshot(parameters, optimizers, average, checks))
                raise PersistWorldError(
                    f"gradient is not finite at update {step + 1}",
                    where="pretrain",
                    fix="lower pretrain.lr; state saved",
                )
            optimizers.step()
            average.update(parameters)
            meter.advance(loss=loss.item())
            done = step + 1
            if done % options.log_every == 0:
                mean = sum(work.gather([loss.item()])) / work.world
                work.log(done, {"loss": mean, "grad_norm": norm.item(), "lr": lr})
            if seen := checks.look(done):
                work.log(done, seen)
            stop = work.should_stop()
            if stop or done % options.save_every == 0 or done == options.updates:
                work.save(done, snapshot(parameters, optimizers, average, checks))
            if stop:
                raise Interrupted
    final = checks.loss(val) if val is not None else None
    average.copy_to(parameters)
    weights = work.output / "weights" / "model.safetensors"
    if work.main:
        save_weights(model, weights.parent, carried, store.stat())
        training_curves(work.output / "curves.png", title, work.history(), PRETRAIN_PANELS)
    return {
        "updates": max(begun, options.updates),
        "loss": loss.item(),
        "val_loss": final,
        "weights": str(weights),
        "warnings": checks.warnings.tell_again(),
    }


def snapshot(
    parameters: list[torch.nn.Parameter], optimizers: Optimizers, average: WeightAverage, checks: PretrainChecks
) -> dict[str, Any]:
    """What a run needs to go on."""
    return {
        "parameters": [p.detach().cpu() for p in parameters],
        "optimizers": optimizers.state(),
        **average.state(),
        **checks.state(),
    }


def restore(
    work: Run,
    parameters: list[torch.nn.Parameter],
    optimizers: Optimizers,
    average: WeightAverage,
    checks: PretrainChecks,
) -> int:
    """Load the latest state, if any; the number of updates done."""
    if (saved := work.load()) is None:
        return 0
    then, now = ({f"parameter {i}": p for i, p in enumerate(side)} for side in (saved["parameters"], parameters))
    require_same_shapes(then, now, "pretrain.parts, model")
    with torch.no_grad():
        for p, value in zip(parameters, saved["parameters"], strict=True):
            p.copy_(value)
    optimizers.load_state(saved["optimizers"])
    average.load_state(saved, parameters)
    checks.load_state(saved)
    return int(saved["step"])
