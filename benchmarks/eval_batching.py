"""Speed of rolling out several episodes at once, one by one, and in the plain way (`benchmarks.plain`).

`python -m benchmarks.eval_batching [--dataset DIR] [--episodes 8] [--steps 3] [--batch 8] [--repeats 3] [--json]`

The bundled benchmark's rollouts (sampling, decoding, all metrics; no loading, no report) of the tiny preset's base, in
one process with the environment that workers get. The three ways are run in turn, `repeats` times; ratios are
computed per round, their spread is the smallest and the largest. The gate: batched takes at most 0.60 of `alone`, the
same program with `eval.batch = 1`. The ratio to `plain` is the effect of batching and all other optimisations.
`apart` is the largest difference of any score.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import plain
from benchmarks.worker_process import become_worker
from persistworld_cli.checkpoints.loading import load_for_sampling
from persistworld_cli.config.presets import resolve_settings
from persistworld_cli.data.clips.store import open_store
from persistworld_cli.evaluation.benchmarks import load_benchmark
from persistworld_cli.evaluation.plan import eval_items
from persistworld_cli.metrics.lpips import Lpips
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.rollout.closed_loop import ClosedLoop
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.rollout.scoring import SHOWN

GATE = 0.60


def measure(dataset: str | None, episodes: int, steps: int, batch: int, repeats: int) -> dict[str, Any]:
    """Times of both ways, in turn."""
    benchmark = load_benchmark("bundled")
    flags = {"world.dataset": dataset, "eval.steps": steps}
    settings = resolve_settings("tiny", flags=flags, pinned=benchmark.pinned if benchmark else None).settings
    store = open_store(settings)
    items = eval_items(store, settings)[:episodes]
    model = load_for_sampling(settings, ckpt=settings.model.ckpt, adapter="")
    engine = RolloutEngine(model, settings.sampling, store.stat())
    scorer = Scorer(settings.rewards, settings.world, "cpu", names=SHOWN)

    loop = ClosedLoop(engine, store, settings.eval.split, steps, batch, scorer)
    recordings = [loop.recording(item) for item in items]
    lpips = scorer.registered["lpips"]
    assert isinstance(lpips, Lpips)

    def plainly() -> tuple[float, dict[str, NDArray[np.float32]]]:
        begun = time.perf_counter()
        with plain.plain_blocks(model):
            scores = plain.roll(loop, lpips, recordings)
        return time.perf_counter() - begun, scores

    def roll(size: int) -> tuple[float, dict[str, NDArray[np.float32]]]:
        begun = time.perf_counter()
        done = list(replace(loop, batch=size).roll(items))
        return time.perf_counter() - begun, {name: np.stack([r.scores[name] for r in done]) for name in done[0].scores}

    roll(batch)  # the first one pays for what is set up once
    times: dict[str, list[float]] = {"plain": [], "alone": [], "batched": []}
    apart = {"plain": 0.0, "alone": 0.0}
    for _ in range(repeats):
        seconds, by_hand = plainly()
        times["plain"].append(seconds)
        alone, one = roll(1)
        together, many = roll(batch)
        times["alone"].append(alone)
        times["batched"].append(together)
        for name, others in (("plain", by_hand), ("alone", one)):
            gaps = [float(np.nanmax(np.abs(others[k] - many[k]))) for k in others]
            apart[name] = max(apart[name], *gaps)
    ratios = {name: [b / a for a, b in zip(times[name], times["batched"], strict=True)] for name in apart}
    return {
        "rollouts": len(items),
        "steps": steps,
        "batch": batch,
        "repeats": repeats,
        "seconds": times,
        "against": {
            name: {"ratio": statistics.median(own), "low": min(own), "high": max(own), "apart": apart[name]}
            for name, own in ratios.items()
        },
        "gate": GATE,
        "held": statistics.median(ratios["alone"]) <= GATE,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="the bundled world, extracted; the preset's by default")
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    become_worker("benchmarks.eval_batching")
    told = measure(options.dataset, options.episodes, options.steps, options.batch, options.repeats)
    if options.json:
        print(json.dumps(told, indent=1))
        return
    print(f"{told['rollouts']} rollouts of {told['steps']} interactions, {told['repeats']} times each, in turn")
    for name, seconds in told["seconds"].items():
        print(f"{name:>8}  median {statistics.median(seconds):.2f} s  ({min(seconds):.2f} .. {max(seconds):.2f})")
    for name, found in told["against"].items():
        spread = f"{found['low']:.2f} .. {found['high']:.2f}"
        gate = f", gate {GATE}: {'held' if told['held'] else 'missed'}" if name == "alone" else ""
        print(f"batched / {name:<5} {found['ratio']:.2f} ({spread}), scores {found['apart']:.2g} apart at most{gate}")


if __name__ == "__main__":
    main()
