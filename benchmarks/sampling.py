"""Speed of a guided interaction with many denoising steps, in the plain way and in ours.

`python -m benchmarks.sampling [--steps 50] [--repeats 3] [--size tiny|mid] [--rollouts 8] [--compile] [--whole]`

Random weights of the tiny preset's size, or of a mid-size network (about 100 million weights) on the same latents; one
process with the environment that workers get. The plain way (`benchmarks.plain`): diffusers' own blocks, Euler steps,
guidance as a doubled batch, one rollout at a time; the predicted clip decoded by itself, and the recorded one again
beside it. Ours: the rollout engine, for one rollout and for several together; only predicted clips are decoded; with
`--compile`, the network is compiled first (the ratios do not include this time). All in float32, in turn, `repeats`
times; ratios are per round. Gates: 1.5 times as fast for one rollout, 2 times per rollout for several. `apart`: the
largest difference of an image, of numbers in [0, 1] (gate 1e-4).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks import plain
from benchmarks.worker_process import become_worker
from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.metadata.index import ActionStat
from persistworld_cli.models.compiling import compile_network
from persistworld_cli.models.cpu.attention import diffusers_attention
from persistworld_cli.models.cpu.fused_blocks import DIFFUSERS
from persistworld_cli.models.cpu.layers import swapped_classes
from persistworld_cli.models.cpu.native.build import without_kernels
from persistworld_cli.models.world_model import Condition, WorldModel, build_world_model
from persistworld_cli.rollout.engine import RolloutEngine

GATES = {"one": 1.5, "several": 2.0, "apart": 1e-4}
WIDTHS = {"tiny": None, "mid": (128, 256, 512)}
GUIDANCE = 2.0
WITHOUT: dict[str, Callable[[WorldModel], AbstractContextManager[None]]] = {
    "kernels of our own": lambda model: without_kernels(),
    "fused blocks": lambda model: swapped_classes(model.unet, DIFFUSERS),
    "one-token attention": lambda model: diffusers_attention(model.unet),
}


def settings_of(size: str, steps: int) -> Settings:
    """The tiny preset's in float32, guided; or with a wider network."""
    flags = {"sampling.steps": steps, "sampling.guidance": GUIDANCE, "sampling.dtype": "float32"}
    settings = load_settings("tiny", flags={**flags, "sampling.decode_dtype": "float32"})
    if (widths := WIDTHS[size]) is None:
        return settings
    unet = {**settings.model.unet, "block_out_channels": list(widths), "num_attention_heads": [4, 8, 16]}
    return replace(settings, model=replace(settings.model, unet=unet, norm_groups=32))


def conditions(model: WorldModel, count: int) -> Condition:
    """What several rollouts are predicted from, at random."""
    g = torch.Generator().manual_seed(0)
    rows = model.settings.num_history + model.settings.num_frames
    return Condition(
        history=torch.randn(count, model.settings.num_history, *model.latent_shape, generator=g),
        current=torch.randn(count, *model.latent_shape, generator=g),
        tokens=torch.randn(count, rows, model.settings.token_dim, generator=g),
        noise_aug=0.02,
    )


def one_row(condition: Condition, row: int) -> Condition:
    """One rollout's part."""
    part = slice(row, row + 1)
    return replace(
        condition, history=condition.history[part], current=condition.current[part], tokens=condition.tokens[part]
    )


def plain_clip(engine: RolloutEngine, condition: Condition, noise: torch.Tensor) -> torch.Tensor:
    """One clip (1, L, C, h, w): Euler steps along the engine's noise levels, guidance as a doubled batch."""
    model, sigmas = engine.model, engine.sigmas
    both = Condition(
        history=condition.history.repeat(2, 1, 1, 1, 1),
        current=condition.current.repeat(2, 1, 1, 1),
        tokens=torch.cat([torch.zeros_like(condition.tokens), condition.tokens]),
        noise_aug=condition.noise_aug,
    )
    weight = torch.linspace(1.0, GUIDANCE, noise.shape[1]).view(1, -1, 1, 1, 1)
    x = noise * (sigmas[0] ** 2 + 1).sqrt()
    for now, then in pairwise(sigmas):
        without, given = model.denoise(x.repeat(2, 1, 1, 1, 1), now.expand(2), both).chunk(2)
        clean = without + weight * (given - without)
        x = x + (x - clean) / now * (then - now)
    return x


def without(model: WorldModel, ours: Callable[[], Any], repeats: int) -> dict[str, list[float]]:
    """What each way of being faster gives by itself: time without it over time with everything, in turn."""
    found: dict[str, list[float]] = {name: [] for name in WITHOUT}
    for number in range(repeats + 1):
        for name, less in WITHOUT.items():
            begun = time.perf_counter()
            ours()
            middle = time.perf_counter()
            with less(model):
                ours()
            if number:
                found[name].append((time.perf_counter() - middle) / (middle - begun))
    return found


def measure(size: str, steps: int, rollouts: int, repeats: int, compiled: bool, whole: bool) -> dict[str, Any]:
    """All ways in turn."""
    settings = settings_of(size, steps)
    torch.manual_seed(0)
    model = build_world_model(settings.model, settings.world).eval().requires_grad_(False)
    width = settings.model.action_dim
    engine = RolloutEngine(model, settings.sampling, ActionStat(-np.ones(width), np.ones(width)))
    if compiled:
        compile_network(model)
    every = conditions(model, rollouts)
    noise = torch.randn(rollouts, *engine.noise_shape, generator=torch.Generator().manual_seed(1))
    sampling = settings.sampling

    @torch.no_grad()
    def plainly() -> torch.Tensor:
        with plain.plain_blocks(model):
            clip = plain_clip(engine, one_row(every, 0), noise[:1])[0]
            plain.decode(model, clip, sampling.decode_chunk, sampling.decode_dtype)  # in the record's place
            return plain.decode(model, clip, sampling.decode_chunk, sampling.decode_dtype)

    def ours(count: int) -> torch.Tensor:
        part = every if count > 1 else one_row(every, 0)
        return model.draw(engine.sample(part, noise[:count]), sampling)[0]

    begun = time.perf_counter()
    if compiled:
        for count in (1, rollouts):
            ours(count)
    warm_up = time.perf_counter() - begun
    times: dict[str, list[float]] = {"plain": [], "one": [], "several": []}
    apart = 0.0
    for _ in range(repeats + 1):  # the first round pays for what is set up once
        images = []
        for name, call in (("plain", plainly), ("one", lambda: ours(1)), ("several", lambda: ours(rollouts))):
            begun = time.perf_counter()
            images.append(call())
            times[name].append((time.perf_counter() - begun) / (rollouts if name == "several" else 1))
        apart = max(apart, *(float((images[0] - other).abs().max()) for other in images[1:]))
    times = {name: seconds[1:] for name, seconds in times.items()}
    ratios = {name: [a / b for a, b in zip(times["plain"], times[name], strict=True)] for name in ("one", "several")}
    return {
        "size": size,
        "weights": sum(p.numel() for p in model.unet.parameters()),
        "steps": steps,
        "rollouts": rollouts,
        "repeats": repeats,
        "compiled": compiled,
        "warm_up_s": warm_up,
        "seconds_a_rollout": times,
        "times_as_fast": {
            name: {"ratio": statistics.median(own), "low": min(own), "high": max(own)} for name, own in ratios.items()
        },
        "without": {} if compiled or whole else without(model, lambda: ours(1), repeats),
        "apart": apart,
        "gates": GATES,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(WIDTHS), default="tiny")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--whole", action="store_true", help="leave out what each way of being faster gives by itself")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    become_worker("benchmarks.sampling")
    told = measure(options.size, options.steps, options.rollouts, options.repeats, options.compile, options.whole)
    if options.json:
        print(json.dumps(told, indent=1))
        return
    weights = f"{told['weights'] / 1e6:.1f} million weights"
    print(f"{told['size']}: {weights}, {told['steps']} guided steps, n {told['repeats']}")
    for name, seconds in told["seconds_a_rollout"].items():
        print(f"{name:>8}  {statistics.median(seconds):.2f} s a rollout  ({min(seconds):.2f} .. {max(seconds):.2f})")
    for name, found in told["times_as_fast"].items():
        spread = f"{found['low']:.2f} .. {found['high']:.2f}"
        print(f"{name:>8}  {found['ratio']:.2f} times as fast ({spread}), gate {GATES[name]}")
    for name, found in told["without"].items():
        print(f"without {name}: {statistics.median(found):.2f} times the time ({min(found):.2f} .. {max(found):.2f})")
    print(f"   apart  {told['apart']:.2g} at most, gate {GATES['apart']:g}")


if __name__ == "__main__":
    main()
