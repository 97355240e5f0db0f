"""A post-training update against the plain way: candidates one by one, every image scored by itself.

`python -m benchmarks.post_training [--dataset DIR] [--updates 3] [--groups 2] [--json]`

The tiny preset's post-training with the paper's credit (one number per candidate), in one process with the environment
that workers get. The plain way (`benchmarks.plain`): diffusers' own blocks; each group's prefix, then each candidate,
sampled by itself; each clip decoded by itself; each image scored by scikit-image and the lpips package; the three
predictions and the gradient of each kept candidate by themselves. Both ways compute the gradients of the same updates,
in turn; no weights change. Ratios are per update, their spread is the smallest and largest. The gate: at least 3 times
the updates per hour, and scoring and decoding together below 15% of an update.

Before that, one group runs in float32, so that rounding does not hide a mistake: `gradients apart` is the distance of
the two gradients divided by the gradient's norm (gate 1e-4).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.worker_process import become_worker
from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.requests import PostTrainRequest
from persistworld_cli.config.settings import Settings
from persistworld_cli.metrics.lpips import Lpips
from persistworld_cli.objective.advantage import group_advantages, keep_extremes, optimality
from persistworld_cli.rollout.engine import Inputs, rollout_noise
from persistworld_cli.training.candidates import GroupPlan, exploration
from persistworld_cli.training.post_train import PostTrainer
from persistworld_cli.training.run import Run

SPEED, APART, SHARE = 3.0, 1e-4, 0.15
EXACT = {
    "post_train.mixed_precision": "no",
    "sampling.dtype": "float32",
    "sampling.decode_dtype": "float32",
    "post_train.candidates": 4,
    "post_train.keep_best": 1,
    "post_train.keep_worst": 1,
    "post_train.prefix_max": 2,
    "post_train.groups": 1,
}


class Caught:
    """In the optimisers' place: keeps the gradient, steps nothing."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters, self.gradient = parameters, torch.empty(0)

    def set_lr(self, lr: float) -> None:
        """Nothing is stepped."""

    def step(self) -> None:
        """Keep the gradient and forget it."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.gradient = torch.cat([part.flatten() for part in parts])
        for parameter in self.parameters:
            parameter.grad = None


def trainer(settings: Settings, work: Run) -> tuple[PostTrainer, Caught]:
    """A post-training that steps nothing."""
    made = PostTrainer(settings, work)
    caught = Caught(made.switch.trainable())
    made.optimizers = caught  # type: ignore[assignment]
    return made, caught


def plain_group(trainer: PostTrainer, plan: GroupPlan, step: int, lpips: Lpips) -> list[tuple[Tensor, Inputs, float]]:
    """A group's candidates: latents (1, L, C, h, w), what each was predicted from, reward."""
    maker, options, sampling = trainer.maker, trainer.options, trainer.engine.sampling
    views = len(trainer.scorer.camera_weights)
    (state,) = maker.prefixes([plan], step)
    inputs = trainer.engine.inputs(state, maker.poses(plan, plan.prefix))
    known = maker.recorded(plan)
    made = []
    for number in range(options.candidates):
        keys = [(options.seed, f"branch {step} {plan.number}", number, 0)]
        noise = rollout_noise(keys, trainer.engine.noise_shape)
        with torch.no_grad():
            x0 = maker.brancher.sample(maker.engine.condition(inputs), noise)
            x0 = x0 + exploration(keys, x0, views, options).to(x0)
            drawn = plain.decode(trainer.model, x0[0], sampling.decode_chunk, sampling.decode_dtype)[1:]
            scores = plain.score(lpips, drawn, known)
        by_camera = sum(weight * scores[name].mean(axis=0) for name, weight in trainer.scorer.weights.items())
        made.append((x0, inputs, float(by_camera @ trainer.scorer.camera_weights.numpy())))
    return made


def plain_update(trainer: PostTrainer, step: int, lpips: Lpips) -> None:
    """The gradient of an update, candidate by candidate."""
    options = trainer.options
    plans = [trainer.maker.plan(step, group) for group in trainer.share.groups]
    kept = options.keep_best + options.keep_worst
    with plain.plain_blocks(trainer.model), plain.plain_switching(trainer.switch):
        for plan in plans:
            with trainer.switch.use("old"), trainer.work.accelerator.autocast():
                made = plain_group(trainer, plan, step, lpips)
            rewards = torch.tensor([[reward for *_, reward in made]])
            r = optimality(group_advantages(rewards), options.adv_clip)[0]
            for place, row in enumerate(keep_extremes(rewards, options.keep_best, options.keep_worst)[0].tolist()):
                x0, inputs, _ = made[row]
                key = (options.seed, step, plan.number, place, 0, 0)
                loss, _ = trainer.loss(x0, inputs, r[row : row + 1], [key])
                (loss.sum() / (kept * len(plans))).backward()
    torch.nn.utils.clip_grad_norm_(trainer.switch.trainable(), options.max_grad_norm)
    trainer.optimizers.step()


def settings_of(dataset: str | None, changes: dict[str, Any]) -> Settings:
    """The tiny preset's, with the paper's credit."""
    flags = {"world.dataset": dataset, "post_train.credit": "rollout", "launch.trackers": ("none",), **changes}
    return load_settings("tiny", flags=flags)


def gradients_apart(dataset: str | None) -> float:
    """Distance of the two ways' gradients in float32, over the gradient's length."""
    settings = settings_of(dataset, EXACT)
    with (
        TemporaryDirectory() as folder,
        Run.of(settings, settings.post_train, PostTrainRequest(output=Path(folder))) as work,
    ):
        both, caught = trainer(settings, work)
        both.update(0)
        ours = caught.gradient
        plain_update(both, 0, _lpips(both))
        return float((ours - caught.gradient).norm() / caught.gradient.norm())


def _lpips(of: PostTrainer) -> Lpips:
    metric = of.scorer.registered["lpips"]
    assert isinstance(metric, Lpips)
    return metric


def measure(dataset: str | None, updates: int, groups: int) -> dict[str, Any]:
    """Both ways in turn."""
    exact = [
        sys.executable,
        "-m",
        "benchmarks.post_training",
        "--exact",
    ]  # accelerate: one precision a process
    said = subprocess.run([*exact, *(["--dataset", dataset] if dataset else [])], stdout=subprocess.PIPE, check=True)
    apart = float(said.stdout)
    settings = settings_of(dataset, {"post_train.groups": groups})
    with (
        TemporaryDirectory() as folder,
        Run.of(settings, settings.post_train, PostTrainRequest(output=Path(folder))) as work,
    ):
        both, _ = trainer(settings, work)
        both.update(0)  # the first one pays for what is set up once
        times: dict[str, list[float]] = {"plain": [], "ours": []}
        shares: dict[str, list[float]] = {}
        for step in range(1, updates + 1):
            begun = time.perf_counter()
            plain_update(both, step, _lpips(both))
            times["plain"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            numbers = both.update(step)
            times["ours"].append(time.perf_counter() - begun)
            work.log(step, numbers)
            for name in (name for name in numbers if name.startswith("share_")):
                shares.setdefault(name.removeprefix("share_"), []).append(numbers[name])
    ratios = [a / b for a, b in zip(times["plain"], times["ours"], strict=True)]
    share = {name: statistics.median(values) for name, values in shares.items()}
    return {
        "updates": updates,
        "groups": groups,
        "candidates": settings.post_train.candidates,
        "seconds": times,
        "times_as_fast": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "shares": share,
        "scoring_and_decoding": share["scoring"] + share["decoding"],
        "gradients_apart": apart,
        "gates": {"times_as_fast": SPEED, "scoring_and_decoding": SHARE, "gradients_apart": APART},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="the bundled world, extracted; the preset's by default")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.exact:
        print(gradients_apart(options.dataset))
        return
    become_worker("benchmarks.post_training")
    told = measure(options.dataset, options.updates, options.groups)
    if options.json:
        print(json.dumps(told, indent=1))
        return
    print(f"{told['updates']} updates of {told['groups']} groups x {told['candidates']} candidates, each way, in turn")
    for name, seconds in told["seconds"].items():
        print(f"{name:>6}  median {statistics.median(seconds):.2f} s  ({min(seconds):.2f} .. {max(seconds):.2f})")
    print(f"times as fast         {told['times_as_fast']:.2f} ({told['low']:.2f} .. {told['high']:.2f}), gate {SPEED}")
    print("shares                " + ", ".join(f"{name} {value:.0%}" for name, value in told["shares"].items()))
    print(f"scoring and decoding  {told['scoring_and_decoding']:.1%}, gate {SHARE:.0%}")
    print(f"gradients apart       {told['gradients_apart']:.2g} in float32, gate {APART:g}")


if __name__ == "__main__":
    main()
