"""What post-training could gain: the base in closed loop, helped by what no model knows.

`python -m benchmarks.ceiling [--dataset DIR] [--ckpt PATH] [--candidates 8] [--episodes 10] [--output DIR]`

The base rolls out 14 interactions of held-out episodes, one noise seed, and twice more with help in each interaction:

- `recorded history`: its memory gets the recorded frames, not its own. No exposure bias is left.
- `best of K`: it samples K candidates from its own history, and the one with the highest reward stays. The first has
  the noise of the rollout without help. It is what a group of K knows that its mean does not; a model can learn of it
  only what the history, and not the noise, decides.

Prints each less the base [95% bootstrap over episodes], and how much the candidates of a group differ. Finished
rollouts are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.proof import Numbers, by_arm, less, numbers, opened, scorer_of
from benchmarks.worker_process import become_worker
from persistworld_cli.checkpoints.references import ModelRef
from persistworld_cli.config.presets import resolve_settings
from persistworld_cli.evaluation.plan import plan_rollouts
from persistworld_cli.files import hash_of, write_json
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.reports.progress import Meter
from persistworld_cli.rollout.closed_loop import ClosedLoop, ScoredRollout
from persistworld_cli.rollout.finished import load_rollout, pending, save_rollout
from persistworld_cli.rollout.images import draw_images, to_unit
from persistworld_cli.rollout.recording import Item

SPREAD = "reward_spread"


@torch.no_grad()
def helped(
    loop: ClosedLoop, reward: Scorer, item: Item, candidates: int = 1, recorded_history: bool = False
) -> ScoredRollout:
    """One rollout with help.

    Args:
        loop: model, dataset, number of interactions; its scorer scores what stays.
        reward: what the candidates are chosen by.
        item: which rollout; its recording is as long.
        candidates: K of each interaction.
        recorded_history: store the recorded frames instead of the chosen candidate's.

    Returns:
        The rollout; its score `SPREAD` is the standard deviation of the reward over an interaction's candidates.
    """
    engine, recording, new = loop.engine, loop.recording(item), loop.num_frames - 1
    state = engine.start_from(loop.store, [recording])
    kept: list[torch.Tensor] = []
    spread: list[float] = []
    for step in range(loop.steps):
        poses = recording.poses(step, loop.num_frames)[None]
        noise = torch.cat([engine.noise(state, branch) for branch in range(candidates)])
        inputs = engine.inputs(state, poses).select([0] * candidates)
        clips = engine.sample(engine.condition(inputs), noise)
        images = draw_images(engine.model, clips, engine.sampling, recording.size)[:, 1:]
        target = to_unit([recording.frames[step * new : (step + 1) * new]])
        rewards = reward.reward(reward.metrics(images, target))
        best = int(rewards.argmax())
        spread.append(float(rewards.std(correction=0)))
        kept.append(images[best : best + 1])
        last = clips[best : best + 1, -1]
        if recorded_history:
            ids = recording.row_ids(step, loop.num_frames)[-1:]
            last = loop.store.latents(loop.split, item.episode, ids).to(last)
        state.append(last, poses[:, -1])
    drawn, target = torch.cat(kept, dim=1), to_unit([recording.frames[: loop.steps * new]])
    scores = {name: value[0].cpu().numpy() for name, value in loop.scorer.metrics(drawn, target).items()}
    scores[SPREAD] = np.repeat(np.asarray(spread, dtype=np.float32), new)[:, None]
    return ScoredRollout(item, recording.valid, scores, None, 0.0)


def main() -> None:
    """Roll out, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--ckpt", help="the base's weights; the preset's by default")
    parser.add_argument("--dataset", help="held-out episodes (split val); the preset's by default")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("outputs/ceiling"))
    options = parser.parse_args()
    flags = {"world.dataset": options.dataset, "model.ckpt": options.ckpt}
    settings = resolve_settings(options.preset, flags=flags).settings
    settings = opened(settings, str(settings.world.dataset), options.episodes, 1)
    become_worker("benchmarks.ceiling")
    plan = plan_rollouts(settings, [ModelRef("base", settings.model.ckpt)], torch.device("cpu"), quiet=True)
    (model,) = plan.models
    loop = replace(plan.loop(plan.load(model.ref), model), scorer=scorer_of(settings))
    reward = Scorer(settings.rewards, settings.world)
    for item in plan.items:
        if not loop.recording(item).valid.all():
            raise SystemExit(f"error: episode {item.episode} is shorter than {loop.steps} interactions")
    arms: dict[str, dict[str, Any]] = {
        "base": {},
        "recorded history": {"recorded_history": True},
        f"best of {options.candidates}": {"candidates": options.candidates},
    }
    made: dict[str, list[ScoredRollout]] = {name: [] for name in arms}
    with Meter("ceiling", len(arms) * len(plan.items)) as meter:
        for item, (name, help_) in product(plan.items, arms.items()):
            folder = options.output / f"{name.replace(' ', '-')}-{hash_of([plan.key(model), loop.scorer.names])}"
            folder.mkdir(parents=True, exist_ok=True)
            if pending(folder, [[item]]):
                save_rollout(folder, helped(loop, reward, item, **help_))
            made[name].append(load_rollout(folder, item))
            meter.advance()
    found: dict[str, list[Numbers]] = {name: [numbers(settings, rollouts)] for name, rollouts in made.items()}
    spread = float(np.mean([rollout.scores[SPREAD] for rollout in made[f"best of {options.candidates}"]]))
    base = found.pop("base")
    rows = less(settings, found, {"base": base})
    means = {name: float(value.mean()) for name, value in base[0].items()}
    tables: Mapping[str, Any] = {arm: {name: vars(pair) for name, pair in row.items()} for arm, row in rows.items()}
    write_json(options.output / "ceiling.json", {"base": means, "less base": tables, "spread": spread})
    print(by_arm(f"less base, {len(plan.items)} episodes", rows))
    print("base: " + ", ".join(f"{name} {value:.4g}" for name, value in means.items()))
    print(f"standard deviation of the reward in a group: {spread:.4f}")


if __name__ == "__main__":
    main()
