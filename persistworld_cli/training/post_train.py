"""`persistworld post-train`: PersistWorld's reinforcement learning on the model's own rollouts (arXiv 2603.25685).

One update (`PostTrainer.update`): roll out a prefix with the sampling policy, branch K candidates, score them against
the recording, keep the best and the worst, push the trained policy towards the better ones (objective/nft.py), let the
sampling policy follow.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from itertools import cycle, product
from operator import neg, pos
from typing import Any

import numpy as np
import torch

from persistworld_cli.checkpoints.action_scale import scale_note, weights_stores
from persistworld_cli.checkpoints.loading import load_world_model
from persistworld_cli.checkpoints.saving import save_torch
from persistworld_cli.config.requests import PostTrainRequest
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.clips.mixture import ClipMixture, open_clips
from persistworld_cli.data.clips.store import open_store
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.metrics.referees import load_referees
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.objective.advantage import keep_extremes
from persistworld_cli.objective.nft import kl_to_reference, nft_loss, sampling_decay
from persistworld_cli.reports.curves import POST_TRAIN_PANELS, training_curves
from persistworld_cli.reports.model_card import read_card, write_card
from persistworld_cli.rollout.engine import Inputs, RolloutEngine
from persistworld_cli.seeding import generator
from persistworld_cli.stages import stage
from persistworld_cli.training.action_margin import HeldOutLosses, against_base, held_out_losses
from persistworld_cli.training.candidates import CandidateMaker, Candidates, GroupPlan, credit
from persistworld_cli.training.health import CollapseGuard, candidate_health
from persistworld_cli.training.optim import Optimizers, lr_factor
from persistworld_cli.training.policy_switch import PolicySwitch, product_type_on_gpu
from persistworld_cli.training.run import Run, Trainer
from persistworld_cli.training.sharing import Share
from persistworld_cli.training.states import require_same_shapes
from persistworld_cli.training.validation import Active, ClosedLoopCheck, HeldOut, SampleVideos
from persistworld_cli.training.warnings import (
    CHECKS,
    FallingReferee,
    GroupsWithoutSpread,
    IdenticalPolicies,
    IgnoredActions,
    Warnings,
    Watcher,
    log_deviation,
)

logger = logging.getLogger(__name__)
_KEEP_ACTIONS = "Take an earlier state, raise post_train.kl or lower post_train.lr"
_TREND = 20  # least number of updates over which the candidates' trends are read; a twentieth of a long run


class PostTrainer(Trainer):
    """Everything that one update needs."""

    shown = ("reward", "group_spread", "theta_old")

    def __init__(self, settings: Settings, work: Run) -> None:
        self.settings, self.options, self.work = settings, settings.post_train, work
        options = self.options
        shares = [Share.of(options, rank, work.world) for rank in range(work.world)]
        self.share = shares[work.rank]
        weights = [*work.resumed_from, settings.model.ckpt]
        (store,) = weights_stores(settings, open_store(settings), [weights], split="train", quiet=not work.main)
        work.notes |= scale_note(store.stat())
        self.model = load_world_model(
            settings.model, settings.world, ckpt=settings.model.ckpt, adapter="", device=work.device
        )
        if options.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()
        small = product_type_on_gpu(settings) if work.device.type == "cuda" else None
        self.switch = PolicySwitch(self.model, options, small)
        # in float32 a merged adapter changes less than 1e-6; in bfloat16 compared policies are computed the same way
        self.exact = work.device.type == "cpu" and work.accelerator.mixed_precision == "no"
        self.stat = store.stat()
        self.engine = RolloutEngine(self.model, settings.sampling, self.stat)
        self.scorer = Scorer(settings.rewards, settings.world, work.device)
        self.maker = CandidateMaker(self.engine, store, self.scorer, options, shares, work.rank, work.gather)
        steps, batch = options.validate_steps, options.micro_batch * 4
        held = partial(HeldOut, settings, self.engine, store, work, steps=steps, batch=batch)
        self.check: ClosedLoopCheck | None = None
        if options.validate_every:
            referees = load_referees(options.referees, work.device, store.root)
            self.check = ClosedLoopCheck(held(count=options.validate_rollouts), self.scorer.with_referees(referees))
        elif options.referees:
            names = ", ".join(options.referees)
            logger.info(
                "post_train.validate_every = 0: no closed-loop check, so these referees are not computed: %s", names
            )
        self.videos: SampleVideos | None = None
        if options.video_every:
            self.videos = SampleVideos(held(count=options.video_rollouts), {"base": self.policy("reference")})
        self.guard = CollapseGuard(options.collapse_checks)
        held_out = options.margin_every and store.episodes("val")
        self.clips = open_clips(settings, "val", self.stat) if held_out else None
        if options.margin_every and not held_out and work.main:
            logger.warning("no held-out episodes: the use of actions is not measured")
        self.margin_base: list[float] | None = None
        self.warnings = Warnings(self._watchers(), work)
        self.lr_scale = 1.0
        self.optimizers = self._optimizers()

    @property
    def title(self) -> str:
        """Name of the run, with the caveat of its reward."""
        return f"post-train, {caveat}" if (caveat := self.scorer.caveat) else "post-train"

    def policy(self, name: str) -> Active:
        """A context manager that puts a policy in place, to sample from."""
        return partial(self.switch.use, name, sampling=True)

    def _watchers(self) -> list[Watcher]:
        """The conditions that this run warns about."""
        window = max(_TREND, self.options.updates // 20)
        referees = self.check.scorer.referees if self.check else {}
        return [
            IdenticalPolicies(),
            GroupsWithoutSpread(),
            IgnoredActions(_KEEP_ACTIONS),
            *(FallingReferee(name, "reward", window, log_deviation) for name in ("sharpness", "motion")),
            *(
                FallingReferee(f"val_{name}", "val_reward", CHECKS, neg if referee.higher_is_better else pos)
                for name, referee in referees.items()
            ),
        ]

    def update(self, step: int) -> dict[str, float]:
        """One update; its numbers to log (means over ranks)."""
        options, share = self.options, self.share
        groups = [self.maker.plan(step, group) for group in range(options.groups)]
        with self.switch.use("old", sampling=True):
            made = self.maker.make(groups, step)
        plans = [groups[number] for number in share.groups]
        whole = partial(share.whole, gather=self.work.gather)
        made.reward = whole(made.reward.flatten()).view(len(plans), -1)
        r = credit(made, self.scorer, options, whole)
        if options.objective == "recorded":
            self.use_recorded_targets(made, plans)
            r = torch.ones_like(r)
        kept = keep_extremes(made.reward.cpu(), options.keep_best, options.keep_worst)  # (G, m + n)
        rows, places = share.own(kept)
        own_r = r.unflatten(0, made.reward.shape)[places[:, 0], kept[places[:, 0], places[:, 1]]]
        keys = [(options.seed, step, plans[group].number, place) for group, place in places.tolist()]
        clock = time.perf_counter()
        numbers = self.learn(step, made, rows, own_r, keys)
        made.seconds["update"] = time.perf_counter() - clock
        numbers |= candidate_health(made, kept, self.settings.world.cameras, self.scorer.labels)
        means = self.work.gather([numbers])
        return {key: sum(m[key] for m in means) / len(means) for key in numbers}

    @stage("update")
    def learn(
        self, step: int, made: Candidates, rows: torch.Tensor, r: torch.Tensor, draws: Sequence[tuple[int, ...]]
    ) -> dict[str, float]:
        """Gradient of the objective over the kept candidates, optimiser step, EMA.

        Args:
            step: number of the update.
            made: this rank's candidates.
            rows: (n,) the kept ones; n differs between ranks that share groups.
            r: their optimality, from `credit`.
            draws: n keys, one per candidate, of its random draws.
        """
        options = self.options
        lr = options.lr * self.lr_scale * lr_factor(step, options.updates, options.warmup, options.decay)
        self.optimizers.set_lr(lr)
        kept = len(self.share.groups) * (options.keep_best + options.keep_worst) / len(self.share.team)  # mean of ranks
        total = kept * options.chunks * options.sigmas_per_candidate
        sums = dict.fromkeys(("loss", "kl", "theta_old", "theta_reference"), 0.0)
        # a rank that shares a group may have none of its kept candidates
        parts = [slice(i, i + options.micro_batch) for i in range(0, len(rows), options.micro_batch)]
        rows = rows.to(made.x0[0].device)
        logged: list[torch.Tensor] = []
        for chunk, repeat, part in product(range(options.chunks), range(options.sigmas_per_candidate), parts):
            x0, inputs = made.x0[chunk][rows[part]], made.inputs[chunk].select(rows[part])
            keys = [(*key, chunk, repeat) for key in draws[part]]
            loss, numbers = self.loss(x0, inputs, r[part] if r.ndim == 1 else r[part, chunk], keys)
            with stage("backward"):
                (loss.sum() / total).backward()
            logged += [numbers[name].sum() for name in sums]
        trainable = self.switch.trainable()
        self.work.average_gradients(trainable)
        norm = torch.nn.utils.clip_grad_norm_(trainable, options.max_grad_norm or math.inf)
        *values, grad_norm = torch.stack([*logged, norm]).tolist()  # the only wait for a GPU
        for name, value in zip(cycle(sums), values, strict=False):
            sums[name] += value / total
        if not math.isfinite(grad_norm):
            path = self.work.output / f"bad-batch-{step + 1}.pt"
            save_torch(path, {"x0": made.x0, "inputs": [i._asdict() for i in made.inputs], "reward": made.reward})
            raise PersistWorldError(
                f"the gradient of update {step + 1} is not finite; the weights are unchanged",
                where=f"batch saved in {path}",
                fix="lower post_train.lr, or set post_train.mixed_precision = 'no'",
            )
        self.optimizers.step()
        self.switch.copy_theta(sampling_decay(step + 1, options.ema, options.ema_rate, options.ema_max))
        return {**sums, "grad_norm": grad_norm, "lr": lr}

    def noised(self, x0: torch.Tensor, keys: list[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Clips x0 (M, L, C, h, w), each with the noise level and the noise of its own key, and the levels (M,)."""
        options = self.options
        generators = [generator("update", *key) for key in keys]
        z = torch.stack([torch.randn((), generator=g) for g in generators]).to(x0.device, non_blocking=True)
        drawn = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators])
        noise = drawn.to(x0.device, non_blocking=True)
        sigma = (options.p_std * z + options.p_mean).exp()
        return x0 + sigma.view(-1, 1, 1, 1, 1) * noise, sigma

    def loss(
        self, x0: torch.Tensor, inputs: Inputs, r: torch.Tensor, keys: list[tuple[int, ...]]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss (M,) of candidates x0 (M, L, C, h, w), each with its own noise, and numbers (M,) to log."""
        options = self.options
        noisy, sigma = self.noised(x0, keys)

        def predict(policy: str, *, merged: bool = False) -> torch.Tensor:
            with self.switch.use(policy, sampling=merged), self.work.accelerator.autocast():
                return self.model.denoise(noisy, sigma, self.engine.condition(inputs)).float()

        with torch.no_grad():
            old, reference = (predict(name, merged=self.exact) for name in ("old", "reference"))
        theta = predict("theta")
        beta = options.beta if options.objective == "nft" else 1.0
        policy = nft_loss(theta, old, x0, r, beta=beta, weighting=options.weighting)
        kl = kl_to_reference(theta, reference)
        numbers = {
            "loss": policy.detach(),
            "kl": kl.detach(),
            "theta_old": (theta.detach() - old).abs().flatten(1).mean(1),
            "theta_reference": (theta.detach() - reference).abs().flatten(1).mean(1),
        }
        return policy + options.kl * kl, numbers

    def use_recorded_targets(self, made: Candidates, plans: list[GroupPlan]) -> None:
        """Replace the candidates by the recording; with r = 1 and beta = 1 the objective is |D_theta - x0|^2."""
        for chunk, x0 in enumerate(made.x0):
            real = torch.stack([self.maker.recorded_latents(plan, chunk) for plan in plans])
            made.x0[chunk] = real.repeat_interleave(len(x0) // len(plans), 0).to(x0)

    def checks(self, done: int, numbers: dict[str, float]) -> dict[str, float]:
        """Use of actions, closed-loop validation, warnings and videos, each at its own interval."""
        options = self.options
        checked: dict[str, float] = {}
        if self.clips and done % options.margin_every == 0:
            checked |= self.action_margin(self.clips)
        if self.check and done % options.validate_every == 0:
            checked |= self.check.check(self.policy("reference"), self.policy("old"))
            if self.guard.see(checked["val_reward"] - checked["val_base"], self.switch.state()):
                self.restore_best(done)
        self.warnings.see(done, numbers | checked)
        if self.videos and done % options.video_every == 0:
            self.videos.write(done, {"post-trained": self.policy("old")})
        return checked

    def action_margin(self, clips: ClipMixture) -> dict[str, float]:
        """Whether the sampling policy uses its actions, compared with the base."""

        def losses(policy: str) -> HeldOutLosses:
            with self.switch.use(policy, sampling=True):
                return held_out_losses(self.model, clips, self.settings.pretrain, self.work.accelerator.autocast)

        if self.margin_base is None:
            self.margin_base = losses("reference").margins.tolist()
        now = losses("old")
        return {**now.numbers(), **against_base(now, np.asarray(self.margin_base))}

    def restore_best(self, done: int) -> None:
        """After a collapse: restore the policies of the best check; then end the run, or roll back.

        Rolling back resets the optimisers and halves the learning rate.
        """
        assert self.guard.state is not None
        self.switch.load_state(self.guard.state)
        back = self.options.on_collapse == "rollback"
        self.ended = not back
        if back:
            self.guard.rolled_back()
            self.lr_scale /= 2
            self.optimizers = self._optimizers()
        slower = f", the learning rate is now {self.lr_scale:g} times post_train.lr" if back else ""
        self.work.warn(
            done,
            "collapse",
            f"closed-loop validation fell {self.options.collapse_checks} times in a row and is below the base; the "
            f"best policy so far is restored{slower}",
        )

    def _optimizers(self) -> Optimizers:
        options = self.options
        return Optimizers(
            self.switch.trainable(),
            options.optimizer,
            lr=options.lr,
            weight_decay=options.weight_decay,
            scale=options.muon_scale,
        )

    def state(self) -> dict[str, Any]:
        """As `Trainer`."""
        return {
            "switch": self.switch.state(),
            "optimizers": self.optimizers.state(),
            "guard": self.guard.snapshot(),
            "lr_scale": self.lr_scale,
            "val_base": self.check.base if self.check else None,
            "margin_base": self.margin_base,
            "warnings": self.warnings.state(),
        }

    def load_state(self, saved: dict[str, Any]) -> None:
        """As `Trainer`."""
        now = self.switch.state()
        for name, policy in saved["switch"].items():
            require_same_shapes(policy, now[name], "post_train.lora_rank, lora_targets, model")
        self.switch.load_state(saved["switch"])
        self.optimizers.load_state(saved["optimizers"])
        self.guard.load(saved["guard"])
        self.lr_scale = saved["lr_scale"]
        self.margin_base = saved.get("margin_base")
        self.warnings.load_state(saved.get("warnings", {}))
        if self.check:
            self.check.load_base(saved["val_base"])


def run(settings: Settings, request: PostTrainRequest) -> dict[str, Any]:
    """Post-train until `post_train.updates`, from the latest state in the output folder if there is one.

    Writes `weights/adapter/` (the sampling policy, an average of the trained one), `metrics.jsonl` and `curves.png`.
    """
    options = settings.post_train
    with Run.of(settings, options, request) as work:
        trainer = PostTrainer(settings, work)
        begun = work.resume(trainer)
        work.train(trainer, begun, trainer.title, options.save_every)
        adapter = work.output / "weights" / "adapter"
        rewards = [entry["reward"] for entry in work.history() if "reward" in entry]
        few = max(1, len(rewards) // 4)
        result = {
            "updates": max(begun, options.updates),  # a finished run may have more than requested now
            "processes": work.world,
            "reward_first": sum(rewards[:few]) / few if rewards else None,
            "reward_last": sum(rewards[-few:]) / few if rewards else None,
            "trainable": sum(p.numel() for p in trainer.switch.trainable()),
            "lpips": trainer.scorer.labels.get("lpips", ""),
            "adapter": str(adapter),
            "warnings": trainer.warnings.repeat(),
        }
        if work.main:  # of a finished run too: one that was stopped in its last update has an older adapter
            card = read_card(adapter)
            trainer.switch.save_adapter(adapter, "old", trainer.stat)
            write_card(adapter, card, settings, request, trainer.stat, result)
            training_curves(work.output / "curves.png", trainer.title, work.history(), POST_TRAIN_PANELS)
    if trainer.ended:
        raise PersistWorldError(
            f"post-training collapsed: the held-out closed loop fell {options.collapse_checks} checks in a row",
            where=str(work.output / "metrics.jsonl"),
            fix=f"the best policy is in {adapter}; lower post_train.lr, or set post_train.on_collapse = 'rollback'",
        )
    return result
