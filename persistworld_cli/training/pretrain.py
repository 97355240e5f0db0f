"""`persistworld pretrain`: teacher-forced training of the world model on recorded clips.

Clips and all random draws are functions of (seed, number of the clip in the run), so a resumed run repeats an
uninterrupted one, and several processes compute the same as one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from persistworld_cli.checkpoints.action_scale import check_poses, scale_note, scale_of
from persistworld_cli.checkpoints.loading import OPTIONAL, load_vae, load_world_model, open_passthrough, vae_source
from persistworld_cli.checkpoints.saving import save_safetensors
from persistworld_cli.checkpoints.tensor_files import WeightFiles
from persistworld_cli.config.requests import PretrainRequest
from persistworld_cli.config.settings import PretrainSettings, Settings
from persistworld_cli.config.weight_names import adapter_name
from persistworld_cli.data.clips.loader import ClipLoader
from persistworld_cli.data.clips.mixture import ClipMixture, open_clips
from persistworld_cli.data.clips.store import ActionStat, EpisodeStore, open_store
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.models.world_model import WorldModel, build_world_model
from persistworld_cli.objective.denoising import clip_losses
from persistworld_cli.reports.curves import PRETRAIN_PANELS, training_curves
from persistworld_cli.reports.model_card import read_card, write_card
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.stages import stage
from persistworld_cli.training.action_margin import clip_by_clip, held_out_losses
from persistworld_cli.training.fsdp import gathered, shard, shared_as, whole, whole_state
from persistworld_cli.training.optim import Optimizers, WeightAverage, inputs_and_outputs, lr_factor
from persistworld_cli.training.run import FREE_DISK, Run, Trainer
from persistworld_cli.training.states import require_same_shapes
from persistworld_cli.training.validation import ClosedLoopCheck, HeldOut, SampleVideos
from persistworld_cli.training.warnings import IgnoredActions, Warnings

logger = logging.getLogger(__name__)
ROLLOUTS = 8  # of a check, made together
_USE_ACTIONS = (
    "Check that actions and frames are synchronised, and that action_encoder is in pretrain.parts (build-meta "
    "--check reports actions that never change); lower pretrain.token_drop, or train longer"
)


def initial_model(settings: Settings, request: PretrainRequest, device: torch.device) -> WorldModel:
    """From the settings' weights; with `--scratch` from random ones, except the VAE's.

    Stable Video Diffusion's weights lack two parts: the text encoder then comes from CLIP, and the action encoder is
    initialised at random.
    """
    torch.manual_seed(settings.pretrain.seed)
    if not request.scratch:
        own = settings.model
        if not own.ckpt:
            fix = "give --ckpt, or begin from random ones: --scratch --vae WEIGHTS"
            raise PersistWorldError("no weights to begin from", where="model.ckpt", fix=fix)
        return load_world_model(
            own, settings.world, ckpt=own.ckpt, adapter=adapter_name(own.adapter), device=device, optional=OPTIONAL
        )
    model = build_world_model(settings.model, settings.world)
    model.vae = load_vae(settings.model, vae_source(request.vae, settings.model))
    return model.to(device)


def trained_parameters(model: WorldModel, options: PretrainSettings) -> list[torch.nn.Parameter]:
    """Parameters of the trained parts (`pretrain.parts`); everything else is frozen."""
    model.requires_grad_(False)
    for part in options.parts:
        if not isinstance(module := getattr(model, part, None), torch.nn.Module):
            raise PersistWorldError(
                f"no part '{part}' in this model", where="pretrain.parts", fix="unet, action_encoder, ..."
            )
        module.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def clips_per_process(options: PretrainSettings, world: int) -> int:
    """Clips of one pass on each of ``world`` processes. Raises PersistWorldError if they do not divide evenly."""
    share, rest = divmod(options.batch, world)
    if rest:
        raise PersistWorldError(
            f"{options.batch} clips cannot be shared by {world} processes",
            where="pretrain.batch",
            fix="make it a multiple of --num-processes",
        )
    return share


def save_weights(
    model: WorldModel,
    folder: Path,
    carried: WeightFiles | None = None,
    stat: ActionStat | None = None,
    *,
    write: bool = True,
) -> Path:
    """Write all parts as one safetensors file under Ctrl-World's names, atomically.

    Args:
        model: the trained model.
        folder: of the file.
        carried: tensors of the initial checkpoint outside the model (an image encoder), copied unchanged.
        stat: the percentiles that scale actions, recorded in the file.
        write: whether this rank writes the file; all ranks of a sharded model call this.

    Raises:
        CannotWrite: the disk is full or read-only.
    """
    path = folder / "model.safetensors"
    own = whole_state(model.state_dict(), keep=write)
    if write:
        own = {k: v.detach().cpu().contiguous() for k, v in own.items()}
        save_safetensors(path, {**own, **(carried.load() if carried else {})}, scale_note(stat), FREE_DISK)
    return path


class Pretrainer(Trainer):
    """Everything that one update of pretraining needs; validation uses the averaged weights.

    Args:
        settings, request: what `run` takes.
        work: processes, state and logs.
        loader: training clips.
        val: held-out clips; None if the dataset has none.
        store: the dataset, with the percentiles that scale actions.

    Raises:
        PersistWorldError: rollouts are requested, and the split has no episodes.
    """

    def __init__(
        self,
        settings: Settings,
        request: PretrainRequest,
        work: Run,
        loader: ClipLoader,
        val: ClipMixture | None,
        store: EpisodeStore,
    ) -> None:
        self.settings, self.options, self.work, self.loader, self.val = settings, settings.pretrain, work, loader, val
        options = self.options
        self.model = initial_model(settings, request, work.device)
        self.parameters = trained_parameters(self.model, options)
        self.sharded = options.shard and work.world > 1
        if self.sharded:
            shard(self.model, options.parts, work.world)
            self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if options.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()
        self.optimizers = Optimizers(
            self.parameters,
            options.optimizer,
            lr=options.lr,
            weight_decay=options.weight_decay,
            betas=(0.9, options.beta2),
            by_adamw=inputs_and_outputs(self.model),
        )
        self.average = WeightAverage(self.parameters, options.ema)
        self.warnings = Warnings([IgnoredActions(_USE_ACTIONS)], work)
        self.last_loss = float("nan")
        if val is None and options.validate_every and work.main:
            logger.warning("no held-out episodes: the held-out loss and the use of actions are not measured")
        engine = RolloutEngine(self.model, settings.sampling, store.stat())
        held = partial(HeldOut, settings, engine, store, work, steps=options.check_steps, batch=ROLLOUTS)
        self.loop: ClosedLoopCheck | None = None
        if options.check_every:
            scorer = Scorer(settings.rewards, settings.world, work.device)
            self.loop = ClosedLoopCheck(held(count=options.check_rollouts), scorer)
        self.videos = SampleVideos(held(count=options.video_rollouts)) if options.video_every else None

    @property
    def title(self) -> str:
        """Name of the run, with the caveat of its held-out reward."""
        caveat = self.loop.scorer.caveat if self.loop else ""
        return f"pretrain, {caveat}" if caveat else "pretrain"

    def begin(self, step: int) -> None:
        """Before update ``step``: open its clips, and score the initial weights as the base of the checks."""
        work, options = self.work, self.options
        self.batches = self.loader.batches(options.seed, step * options.accumulate, work.rank, work.world)
        if self.loop and self.loop.base is None:
            with self.averaged():
                self.loop.base = self.loop.scores()
        self.model.train()

    def update(self, step: int) -> dict[str, float]:
        """One update; returns numbers if it is one to log."""
        options, work, done = self.options, self.work, step + 1
        lr = options.lr * lr_factor(step, options.updates, options.warmup, options.decay)
        self.optimizers.set_lr(lr)
        for part in range(options.accumulate):
            batch = next(self.batches)
            first = ((step * options.accumulate + part) * work.world + work.rank) * len(batch.latents)
            with work.accelerator.autocast():
                loss = clip_losses(self.model, batch, options, options.seed, first).mean()
            with stage("backward"):
                (loss / options.accumulate).backward()
        if not self.sharded:  # FSDP averages gradients as it shards them
            work.average_gradients(self.parameters)
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        torch.nn.utils.clip_grads_with_norm_(self.parameters, options.max_grad_norm or math.inf, norm)
        if not torch.isfinite(norm):
            work.save(step, self.state())
            raise PersistWorldError(
                f"gradient is not finite at update {done}", where="pretrain", fix="lower pretrain.lr; state saved"
            )
        self.optimizers.step()
        self.average.update(self.parameters)
        self.last_loss = loss.item()
        if done % options.log_every:
            return {}
        mean = sum(work.gather([self.last_loss])) / work.world
        return {"loss": mean, "grad_norm": norm.item(), "lr": lr}

    def checks(self, done: int, numbers: dict[str, float]) -> dict[str, float]:
        """Held-out loss and use of actions, closed loop, videos and warnings, each at its own interval."""
        checked: dict[str, float] = {}
        if self.val is not None and _due(done, self.options.validate_every):
            with self.averaged():
                losses = held_out_losses(self.model, self.val, self.options, self.work.accelerator.autocast)
            checked |= {"val_loss": float(losses.right.mean()), **losses.numbers()}
        if self.loop and _due(done, self.options.check_every):
            checked |= self.loop.check(nullcontext, self.averaged)
        if self.videos and _due(done, self.options.video_every):
            self.videos.write(done, {"averaged weights": self.averaged})
        self.warnings.see(done, checked)
        return checked

    def val_loss(self) -> float | None:
        """Mean held-out loss of the averaged weights; None without held-out clips."""
        if self.val is None:
            return None
        with self.averaged(), self.work.accelerator.autocast():
            return float(clip_by_clip(self.model, self.val, self.options).mean())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within a block, use the averaged weights, with the model in evaluation mode."""
        self.model.eval()
        self.model.forget_texts()
        try:
            with self.average.in_place_of(self.parameters), gathered(self.model):
                yield
        finally:
            self.model.forget_texts()
            self.model.train()

    def state(self) -> dict[str, Any]:
        """As `Trainer`."""
        return {
            "parameters": [p.detach() for p in self.parameters],
            "optimizers": self.optimizers.state(),
            **self.average.state(),
            "val_base": self.loop.base if self.loop else None,
            "warnings": self.warnings.state(),
        }

    def load_state(self, saved: dict[str, Any]) -> None:
        """As `Trainer`."""
        then, now = ({f"parameter {i}": p for i, p in enumerate(s)} for s in (saved["parameters"], self.parameters))
        require_same_shapes(then, now, "pretrain.parts, model")
        with torch.no_grad():
            for p, value in zip(self.parameters, saved["parameters"], strict=True):
                p.copy_(shared_as(p, value))
        self.optimizers.load_state(saved["optimizers"])
        self.average.load_state(saved, self.parameters)
        self.warnings.load_state(saved.get("warnings", {}))
        if self.loop:
            self.loop.load_base(saved.get("val_base"))


def _due(done: int, every: int) -> bool:
    return bool(every) and done % every == 0


def run(settings: Settings, request: PretrainRequest) -> dict[str, Any]:
    """Train until `settings.pretrain.updates`, from the latest state in the output folder if there is one.

    Returns the last training loss, the validation loss and the path of the weights.
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
            own_scale = replace(scale, of_data=scale.of_data and source.store.root == store.root)
            check_poses(settings, source.store, own_scale, split=source.split, quiet=not work.main)
        val = open_clips(settings, "val", scale.stat) if store.episodes("val") else None
        work.notes |= scale_note(scale.stat)
        if work.main:
            logger.info("clips: %s; action scale: %s", train.describe(), scale.origin)
        share = clips_per_process(settings.pretrain, work.world)
        # before the model is loaded: its workers are forks of this process
        with ClipLoader(train, share, workers=clips.workers, ahead=clips.ahead) as loader:
            trainer = Pretrainer(settings, request, work, loader, val, store)
            carried = None if request.scratch else open_passthrough(settings.model.ckpt)
            begun = work.resume(trainer)
            trainer.begin(begun)
            work.train(trainer, begun, trainer.title, settings.pretrain.save_every)
            val_loss = trainer.val_loss()
            trainer.average.copy_to(trainer.parameters)
            weights = work.output / "weights" / "model.safetensors"
            result = {
                "updates": max(begun, settings.pretrain.updates),
                "loss": trainer.last_loss,
                "val_loss": val_loss,
                "weights": str(weights),
                "warnings": trainer.warnings.repeat(),
            }
            save_weights(trainer.model, weights.parent, carried, store.stat(), write=work.main)
            if work.main:
                training_curves(work.output / "curves.png", trainer.title, work.history(), PRETRAIN_PANELS)
                write_card(weights.parent, read_card(weights.parent), settings, request, store.stat(), result)
            return result
