"""`persistworld post-train`: PersistWorld's reinforcement learning on the model's own rollouts (arXiv 2603.25685).

One update: prefix with the sampling policy, branch K candidates, score them against the record, keep the best and the
worst, push the trained policy towards the better ones (objective/nft.py), let the sampling policy follow.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.settings import PostTrainSettings, Settings
from persistworld_cli.data.store import EpisodeStore
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models.checkpoints import load_world_model
from persistworld_cli.models.lora import PolicySwitch
from persistworld_cli.objective.nft import kl_to_reference, nft_loss, sampling_decay
from persistworld_cli.reports.progress import Meter
from persistworld_cli.rewards.advantage import keep_extremes
from persistworld_cli.rewards.score import Scorer
from persistworld_cli.rollout.engine import Inputs, RolloutEngine
from persistworld_cli.seeding import generator
from persistworld_cli.training.candidates import CandidateMaker, Candidates, GroupPlan
from persistworld_cli.training.credit import credit
from persistworld_cli.training.optim import Optimizers
from persistworld_cli.training.run import Interrupted, Run
from persistworld_cli.training.schedule import lr_factor


class PostTrainer:
    """Everything one update needs.

    Args:
        settings: the whole preset.
        job: `ckpt` (base weights; default the preset's).
        work: processes, state and logs.
    """

    def __init__(self, settings: Settings, job: dict[str, Any], work: Run) -> None:
        self.settings, self.options, self.work = settings, settings.post_train, work
        options = self.options
        if options.groups % work.world:
            raise PersistWorldError(
                f"{options.groups} groups cannot be shared by {work.world} processes",
                where="post_train.groups",
                fix="make it a multiple of --num-processes",
            )
        self.model = load_world_model(
            settings.model, settings.world, ckpt=job.get("ckpt"), adapter="", device=work.device
        )
        if options.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()
        self.switch = PolicySwitch(
            self.model,
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            targets=options.lora_targets,
            train_action_encoder=options.train_action_encoder,
            seed=options.seed,
        )
        store = EpisodeStore(resolve_path(settings.world.dataset))
        self.engine = RolloutEngine(self.model, settings.sampling, store.stat())
        self.scorer = Scorer(settings.rewards, settings.world, work.device)
        self.maker = CandidateMaker(self.engine, store, self.scorer, options)
        self.optimizers = Optimizers(
            self.switch.trainable(), options.optimizer, lr=options.lr, weight_decay=options.weight_decay
        )

    def update(self, step: int) -> dict[str, float]:
        """One update; the numbers worth logging (means over ranks)."""
        options, work = self.options, self.work
        local = options.groups // work.world
        plans = [self.maker.plan(step, work.rank * local + g) for g in range(local)]
        with self.switch.use("old"):
            made = self.maker.make(plans, step)
        r = credit(made, self.scorer, options)
        if options.objective == "recorded":
            self.aim_at_record(made, plans)
            r = torch.ones_like(r)
        kept = keep_extremes(made.reward, options.keep_best, options.keep_worst)  # (G, m + n)
        offsets = torch.arange(local, device=kept.device)[:, None] * options.candidates
        rows = (kept + offsets).flatten()
        clock = time.perf_counter()
        numbers = self.learn(step, made, rows, r[rows], [p.number for p in plans])
        made.seconds["update"] = time.perf_counter() - clock
        numbers |= self.health(made, kept)
        means = self.work.gather([numbers])
        return {key: sum(m[key] for m in means) / len(means) for key in numbers}

    def learn(
        self, step: int, made: Candidates, rows: torch.Tensor, r: torch.Tensor, groups: list[int]
    ) -> dict[str, float]:
        """Gradient of the objective over the kept candidates (their r, as `credit` gives it), optimiser step, EMA."""
        options = self.options
        lr = options.lr * lr_factor(step, options.updates, options.warmup, "constant")
        self.optimizers.set_lr(lr)
        each = len(rows) // len(groups)
        jobs = [
            (chunk, repeat, part)
            for chunk in range(options.chunks)
            for repeat in range(options.sigmas_per_candidate)
            for part in torch.arange(len(rows)).split(options.micro_batch)
        ]
        total = len(rows) * options.chunks * options.sigmas_per_candidate
        sums: dict[str, float] = {}
        for chunk, repeat, part in jobs:
            x0, inputs = made.x0[chunk][rows[part]], made.inputs[chunk].select(rows[part])
            keys: list[tuple[int, ...]] = [
                (options.seed, step, groups[int(i) // each], int(i) % each, chunk, repeat) for i in part
            ]
            loss, numbers = self.loss(x0, inputs, r[part] if r.ndim == 1 else r[part, chunk], keys)
            (loss.sum() / total).backward()
            for name, value in numbers.items():
                sums[name] = sums.get(name, 0.0) + value.sum().item() / total
        trainable = self.switch.trainable()
        self.work.average_gradients(trainable)
        norm = torch.nn.utils.clip_grad_norm_(trainable, options.max_grad_norm)
        if not torch.isfinite(norm):
            path = self.work.output / f"bad-batch-{step + 1}.pt"
            torch.save({"x0": made.x0, "inputs": [i._asdict() for i in made.inputs], "reward": made.reward}, path)
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

        def predict(policy: str) -> torch.Tensor:
            with self.switch.use(policy), self.work.accelerator.autocast():
                return self.model.denoise(noisy, sigma, self.engine.condition(inputs)).float()

        with torch.no_grad():
            old, reference = predict("old"), predict("reference")
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

    def health(self, made: Candidates, kept: torch.Tensor) -> dict[str, float]:
        """Reward by metric, spread in the group, margin of the kept ones, sharpness and motion, time shares."""
        best = made.reward.gather(1, kept)
        spread = made.reward.std(dim=1)
        total = sum(made.seconds.values())
        pictures = made.pictures
        real = made.recorded

        def sharpness(x: torch.Tensor) -> float:
            return x.diff(dim=-1).abs().mean().item()

        def motion(x: torch.Tensor) -> float:
            return x.diff(dim=1).abs().mean().item()

        return {
            "reward": made.reward.mean().item(),
            **{f"reward_{name}": value.mean().item() for name, value in made.metrics.items()},
            "group_spread": spread.mean().item(),
            "groups_without_spread": (spread < 1e-6).float().mean().item(),
            "kept_margin": (best.max(1).values - best.min(1).values).mean().item(),
            "sharpness": sharpness(pictures) / max(1e-9, sharpness(real)),
            "motion": motion(pictures) / max(1e-9, motion(real)),
            "seconds": total,
            **{f"share_{name}": value / total for name, value in made.seconds.items()},
        }

    def state(self) -> dict[str, Any]:
        """To resume from."""
        return {"switch": self.switch.state(), "optimizers": self.optimizers.state()}

    def load_state(self, saved: dict[str, Any]) -> None:
        """What `state` gave."""
        self.switch.load_state(saved["switch"])
        self.optimizers.load_state(saved["optimizers"])


def run(settings: Settings, job: dict[str, Any]) -> dict[str, Any]:
    """Post-train until `post_train.updates`, from the latest state in the output folder if there is one.

    Writes `weights/adapter/` (the sampling policy, an average of the trained one) and `metrics.jsonl`.
    """
    options = settings.post_train
    work = Run.of(settings, options, job)
    trainer = PostTrainer(settings, job, work)
    begun = resume(trainer, work, options)
    last: dict[str, float] = {}
    with Meter("post-train", options.updates, done=begun, quiet=not work.main) as meter:
        for step in range(begun, options.updates):
            last = trainer.update(step)
            work.log(step + 1, last)
            meter.advance(reward=last["reward"], spread=last["group_spread"], theta_old=last["theta_old"])
            done = step + 1
            stop = work.should_stop()
            if stop or done % options.save_every == 0 or done == options.updates:
                work.save(done, trainer.state())
            if stop:
                raise Interrupted
    adapter = work.output / "weights" / "adapter"
    if work.main and (begun < options.updates or not adapter.exists()):  # a finished run's files keep their hash
        adapter.parent.mkdir(exist_ok=True)
        trainer.switch.save_adapter(adapter, "old")
    rewards = [entry["reward"] for entry in work.history() if "reward" in entry]
    few = max(1, len(rewards) // 4)
    return {
        "updates": options.updates,
        "processes": work.world,
        "reward_first": sum(rewards[:few]) / few if rewards else None,
        "reward_last": sum(rewards[-few:]) / few if rewards else None,
        "trainable": sum(p.numel() for p in trainer.switch.trainable()),
        "lpips": trainer.scorer.labels.get("lpips", ""),
        "adapter": str(adapter),
    }


def resume(trainer: PostTrainer, work: Run, options: PostTrainSettings) -> int:
    """Load the latest state, if any; the number of updates done."""
    if (saved := work.load()) is None:
        return 0
    trainer.load_state(saved)
    work.trim_log(int(saved["step"]))
    return int(saved["step"])
