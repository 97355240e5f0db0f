"""`persistworld post-train`: PersistWorld's reinforcement learning on the model's own rollouts (arXiv 2603.25685).

One update: prefix with the sampling policy, branch K candidates, score them against the record, keep the best and the
worst, push the trained policy towards the better ones (objective/nft.py), let the sampling policy follow.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from operator import neg, pos
from typing import Any

import numpy as np
import torch

from persistworld_cli.checkpoints.action_scale import scale_note, weights_stores
from persistworld_cli.checkpoints.loading import load_world_model
from persistworld_cli.checkpoints.saving import save_torch
from persistworld_cli.config.requests import PostTrainRequest
from persistworld_cli.config.settings import PostTrainSettings, Settings
from persistworld_cli.data.clips.mixture import open_clips
from persistworld_cli.data.clips.store import open_store
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.metrics.referees import load_referees
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.objective.advantage import keep_extremes
from persistworld_cli.objective.nft import kl_to_reference, nft_loss, sampling_decay
from persistworld_cli.reports.progress import Meter
from persistworld_cli.reports.training_curves import POST_TRAIN_PANELS, training_curves
from persistworld_cli.rollout.engine import Inputs, RolloutEngine
from persistworld_cli.seeding import generator
from persistworld_cli.stages import stage
from persistworld_cli.training.action_margin import HeldOutLosses, against_base, held_out_losses
from persistworld_cli.training.candidates import CandidateMaker, Candidates, GroupPlan
from persistworld_cli.training.credit import credit
from persistworld_cli.training.health import CollapseGuard, candidate_health
from persistworld_cli.training.optim import Optimizers
from persistworld_cli.training.policy_switch import PolicySwitch
from persistworld_cli.training.resuming import require_same_shapes
from persistworld_cli.training.run import Interrupted, Run
from persistworld_cli.training.samples import SampleVideos
from persistworld_cli.training.schedule import lr_factor
from persistworld_cli.training.sharing import Share
from persistworld_cli.training.validation import Active, ClosedLoopCheck, HeldOut
from persistworld_cli.training.warnings import (
    CHECKS,
    FallingReferee,
    GroupsWithoutSpread,
    IgnoredActions,
    RestingPolicies,
    Warnings,
    Watcher,
    apart_from_record,
)

logger = logging.getLogger(__name__)
_KEEP_ACTIONS = "Take an earlier state, raise post_train.kl or lower post_train.lr"
_TREND = 20  # updates at least over which the candidates' trends are read; a twentieth of a long run
LEARNING = ("loss", "kl", "theta_old", "theta_reference")  # numbers of `PostTrainer.loss`


class PostTrainer:
    """Everything one update needs.

    Args:
        settings: the whole preset.
        work: processes, state and logs.
    """

    def __init__(self, settings: Settings, work: Run) -> None:
        self.settings, self.options, self.work = settings, settings.post_train, work
        options = self.options
        self.share = Share.of(options, work.rank, work.world)
        weights = [*work.resumed_from, settings.model.ckpt]
        (store,) = weights_stores(settings, open_store(settings), [weights], split="train", quiet=not work.main)
        work.notes |= scale_note(store.stat())
        self.model = load_world_model(
            settings.model, settings.world, ckpt=settings.model.ckpt, adapter="", device=work.device
        )
        if options.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()
        self.switch = PolicySwitch(self.model, options)
        # in float32 a merged adapter changes less than 1e-6; in bfloat16 policies that are compared are computed alike
        self.exact = work.device.type == "cpu" and work.accelerator.mixed_precision == "no"
        self.stat = store.stat()
        self.engine = RolloutEngine(self.model, settings.sampling, self.stat)
        self.scorer = Scorer(settings.rewards, settings.world, work.device)
        self.maker = CandidateMaker(self.engine, store, self.scorer, options)
        held = partial(HeldOut, settings, self.engine, store, work, batch=options.micro_batch * 4)
        checked = held(count=options.validate_rollouts, steps=options.validate_steps)
        shown = held(count=options.video_rollouts, steps=options.validate_steps)
        self.check: ClosedLoopCheck | None = None
        if options.validate_every:
            referees = load_referees(options.referees, work.device)
            self.check = ClosedLoopCheck(checked, self.scorer.beside(referees))
        elif options.referees:
            logger.info(
                "post_train.validate_every = 0: no closed-loop check, so these are not computed: %s",
                ", ".join(options.referees),
            )
        self.videos = SampleVideos(shown, {"base": self.policy("reference")}) if options.video_every else None
        self.guard = CollapseGuard(options.collapse_checks)
        held_out = options.margin_every and store.episodes("val")
        self.clips = open_clips(settings, "val") if held_out else None
        if options.margin_every and not held_out and work.main:
            logger.warning("no held-out episodes: whether actions are used is not measured")
        self.margin_base: list[float] | None = None
        self.warnings = Warnings(self._watchers(), work)
        self.lr_scale = 1.0
        self.optimizers = self._optimizers()

    def policy(self, name: str) -> Active:
        """A policy as weights that can be put in place to be sampled."""
        return partial(self.switch.use, name, sampling=True)

    def _watchers(self) -> list[Watcher]:
        """What this run warns of."""
        window = max(_TREND, self.options.updates // 20)
        referees = self.check.scorer.referees if self.check else {}
        return [
            RestingPolicies(),
            GroupsWithoutSpread(),
            IgnoredActions(_KEEP_ACTIONS),
            *(FallingReferee(name, "reward", window, apart_from_record) for name in ("sharpness", "motion")),
            *(
                FallingReferee(f"val_{name}", "val_reward", CHECKS, neg if referee.higher_is_better else pos)
                for name, referee in referees.items()
            ),
        ]

    def update(self, step: int) -> dict[str, float]:
        """One update; the numbers worth logging (means over ranks)."""
        options, share = self.options, self.share
        plans = [self.maker.plan(step, group) for group in share.groups]
        with self.switch.use("old", sampling=True):
            made = self.maker.make(plans, step, share.candidates)
        made.reward = self.whole(made.reward.flatten()).view(len(plans), -1)
        r = credit(made, self.scorer, options, self.whole)
        if options.objective == "recorded":
            self.aim_at_record(made, plans)
            r = torch.ones_like(r)
        kept = keep_extremes(made.reward, options.keep_best, options.keep_worst)  # (G, m + n)
        rows, places = share.own(kept)
        chosen = r.unflatten(0, made.reward.shape)[places[:, 0], kept[places[:, 0], places[:, 1]]]
        keys = [(options.seed, step, plans[group].number, place) for group, place in places.tolist()]
        clock = time.perf_counter()
        numbers = self.learn(step, made, rows, chosen, keys)
        made.seconds["update"] = time.perf_counter() - clock
        numbers |= candidate_health(made, kept, self.settings.world.cameras, self.scorer.labels)
        means = self.work.gather([numbers])
        return {key: sum(m[key] for m in means) / len(means) for key in numbers}

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """Values (G * k, ...) of this rank's candidates with those of the ranks that share its groups: (G * K, ...)."""
        return self.share.whole(part, self.work.gather)

    @stage("update")
    def learn(
        self, step: int, made: Candidates, rows: torch.Tensor, r: torch.Tensor, draws: Sequence[tuple[int, ...]]
    ) -> dict[str, float]:
        """Gradient of the objective over the kept candidates, optimiser step, EMA.

        Args:
            step: which update.
            made: this rank's candidates.
            rows: (n,) which of them were kept; as many on every rank only where groups are whole.
            r: their optimality, as `credit` gives it.
            draws: n keys of what is drawn for each.
        """
        options = self.options
        lr = options.lr * self.lr_scale * lr_factor(step, options.updates, options.warmup, "constant")
        self.optimizers.set_lr(lr)
        jobs = [
            (chunk, repeat, part)
            for chunk in range(options.chunks)
            for repeat in range(options.sigmas_per_candidate)
            for part in torch.arange(len(rows)).split(options.micro_batch)
            if len(part)  # a rank that shares a group may have none of its kept candidates
        ]
        kept = len(self.share.groups) * (options.keep_best + options.keep_worst) / len(self.share.team)  # mean of ranks
        total = kept * options.chunks * options.sigmas_per_candidate
        sums = dict.fromkeys(LEARNING, 0.0)
        for chunk, repeat, part in jobs:
            x0, inputs = made.x0[chunk][rows[part]], made.inputs[chunk].select(rows[part])
            keys = [(*draws[int(i)], chunk, repeat) for i in part]
            loss, numbers = self.loss(x0, inputs, r[part] if r.ndim == 1 else r[part, chunk], keys)
            with stage("backward"):
                (loss.sum() / total).backward()
            for name, value in numbers.items():
                sums[name] += value.sum().item() / total
        trainable = self.switch.trainable()
        self.work.average_gradients(trainable)
        norm = torch.nn.utils.clip_grad_norm_(trainable, options.max_grad_norm)
        if not torch.isfinite(norm):
            path = self.work.output / f"bad-batch-{step + 1}.pt"
            save_torch(path, {"x0": made.x0, "inputs": [i._asdict() for i in made.inputs], "reward": made.reward})
            raise PersistWorldError(
                f"the gradient of update {step + 1} is not finite; nothing was stepped",
                where=f"batch saved in {path}",
                fix="lower post_train.lr, or set post_train.mixed_precision = 'no'",
            )
        self.optimizers.step()
        self.switch.copy_theta(sampling_decay(step + 1, options.ema, options.ema_rate, options.ema_max))
        return {**sums, "grad_norm": norm.item(), "lr": lr}

    def loss(
        self, x0: torch.Tensor, inputs: Inputs, r: torch.Tensor, keys: list[tuple[int, ...]]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss (M,) of candidates x0 (M, L, C, h, w), each noised afresh, under the three policies."""
        options = self.options
        generators = [generator("update", *key) for key in keys]
        z = torch.stack([torch.randn((), generator=g) for g in generators]).to(x0.device)
        noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators]).to(x0.device)
        sigma = (options.p_std * z + options.p_mean).exp()
        noisy = x0 + sigma.view(-1, 1, 1, 1, 1) * noise

        def predict(policy: str, *, merged: bool = False) -> torch.Tensor:
            with self.switch.use(policy, sampling=merged), self.work.accelerator.autocast():
                return self.model.denoise(noisy, sigma, self.engine.condition(inputs)).float()

        with torch.no_grad():
            old, reference = (predict(name, merged=self.exact) for name in ("old", "reference"))
        theta = predict("theta")
        beta = options.beta if options.objective == "nft" else 1.0
        terms = nft_loss(theta, old, x0, r, beta=beta, weighting=options.weighting)
        kl = kl_to_reference(theta, reference)
        numbers = {
            "loss": terms.policy.detach(),
            "kl": kl.detach(),
            "theta_old": (theta.detach() - old).abs().flatten(1).mean(1),
            "theta_reference": (theta.detach() - reference).abs().flatten(1).mean(1),
        }
        return terms.policy + options.kl * kl, numbers

    def aim_at_record(self, made: Candidates, plans: list[GroupPlan]) -> None:
        """Put the record in the candidates' place; with r = 1 and beta = 1 the objective is |D_theta - x0|^2."""
        for chunk, x0 in enumerate(made.x0):
            real = torch.stack([self.maker.recorded_latents(plan, chunk) for plan in plans])
            made.x0[chunk] = real.repeat_interleave(len(x0) // len(plans), 0).to(x0)

    def action_margin(self) -> dict[str, float]:
        """Whether the sampling policy uses its actions, beside the base."""
        assert self.clips is not None
        if self.margin_base is None:
            self.margin_base = self._held_out("reference").margins.tolist()
        now = self._held_out("old")
        return {**now.numbers(), **against_base(now, np.asarray(self.margin_base))}

    def _held_out(self, policy: str) -> HeldOutLosses:
        assert self.clips is not None
        with self.switch.use(policy, sampling=True):
            return held_out_losses(self.model, self.clips, self.settings.pretrain, self.work.accelerator.autocast)

    def validate(self, done: int) -> tuple[dict[str, float], bool]:
        """The closed-loop check after an update: its numbers, and whether the run has collapsed and is to end.

        Rolling back puts the best check's policies in place, forgets the optimisers' memory and halves the step.
        """
        assert self.check is not None
        numbers = self.check.check(self.policy("reference"), self.policy("old"))
        if not self.guard.see(numbers["val_reward"] - numbers["val_base"], self.switch.state()):
            return numbers, False
        assert self.guard.state is not None
        self.switch.load_state(self.guard.state)
        back = self.options.on_collapse == "rollback"
        if back:
            self.guard.rolled_back()
            self.lr_scale /= 2
            self.optimizers = self._optimizers()
        slower = f", the learning rate is now {self.lr_scale:g} times post_train.lr" if back else ""
        self.work.warn(
            done,
            "collapse",
            f"closed-loop validation fell {self.options.collapse_checks} times in a row and is below the base; the "
            f"best policy so far is put back{slower}",
        )
        return numbers, not back

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
        """To resume from."""
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
        """What `state` gave."""
        now, decides = self.switch.state(), "post_train.lora_rank, lora_targets, model"
        for name, policy in saved["switch"].items():
            require_same_shapes(policy, now[name], decides)
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
    with Run.of(settings, settings.post_train, request) as work:
        return _train(settings.post_train, PostTrainer(settings, work), work)


def _train(options: PostTrainSettings, trainer: PostTrainer, work: Run) -> dict[str, Any]:
    """The training loop."""
    begun = resume(trainer, work)
    last: dict[str, float] = {}
    collapsed = False
    title = f"post-train, {caveat}" if (caveat := trainer.scorer.caveat) else "post-train"
    with Meter(title, options.updates, done=begun, quiet=not work.main) as meter:
        for step in range(begun, options.updates):
            last = trainer.update(step)
            done = step + 1
            if trainer.clips and done % options.margin_every == 0:
                last |= trainer.action_margin()
            if options.validate_every and done % options.validate_every == 0:
                checked, collapsed = trainer.validate(done)
                last |= checked
            work.log(done, last)
            trainer.warnings.see(done, last)
            if trainer.videos and done % options.video_every == 0:
                trainer.videos.write(done, {"post-trained": trainer.policy("old")})
            meter.advance(reward=last["reward"], spread=last["group_spread"], theta_old=last["theta_old"])
            stop = work.should_stop()
            if stop or collapsed or done % options.save_every == 0 or done == options.updates:
                work.save(done, trainer.state())
            if stop:
                raise Interrupted
            if collapsed:
                break
    adapter = work.output / "weights" / "adapter"
    if work.main:  # of a finished run too, whose files keep their hash: one stopped in its last update has an old one
        trainer.switch.save_adapter(adapter, "old", trainer.stat)
    if work.main:
        training_curves(work.output / "curves.png", title, work.history(), POST_TRAIN_PANELS)
    told = trainer.warnings.tell_again()
    if collapsed:
        raise PersistWorldError(
            f"post-training collapsed: the held-out closed loop fell {options.collapse_checks} checks in a row",
            where=str(work.output / "metrics.jsonl"),
            fix=f"the best policy is in {adapter}; lower post_train.lr, or set post_train.on_collapse = 'rollback'",
        )
    rewards = [entry["reward"] for entry in work.history() if "reward" in entry]
    few = max(1, len(rewards) // 4)
    return {
        "updates": max(begun, options.updates),  # a finished run may have more than are asked for
        "processes": work.world,
        "reward_first": sum(rewards[:few]) / few if rewards else None,
        "reward_last": sum(rewards[-few:]) / few if rewards else None,
        "trainable": sum(p.numel() for p in trainer.switch.trainable()),
        "lpips": trainer.scorer.labels.get("lpips", ""),
        "adapter": str(adapter),
        "warnings": told,
    }


def resume(trainer: PostTrainer, work: Run) -> int:
    """Load the latest state, if any; the number of updates done."""
    if (saved := work.load()) is None:
        return 0
    trainer.load_state(saved)
    return int(saved["step"])
