"""One forward pass of the full-size network on this CPU: time, FLOP/s, memory.

`python -m benchmarks.full_forward [--preset ctrl-world] [--dtype bfloat16] [--repeats 3] [--plain] [--json]`

UNet and action encoder get random weights in the requested type, straight from the meta device; no other part of the
model uses memory. A clip of the preset's size (ctrl-world: 1 x 11 frames, 72 x 40) goes through `denoise`, once to
warm up and then `--repeats` times. FLOPs are those of `persistworld ... --dry-run` (counted on the meta device). The
measurement runs in its own process with the environment that workers get; `peak_bytes` is its VmHWM (Linux), with
the interpreter and its libraries in it (`libraries_bytes`: before the model is built). `cpu_s` is the CPU time of
the process: if it is well below threads x seconds, the machine was shared and the times are unreliable.

With `--plain`, each pass is followed by one through diffusers' own blocks (`benchmarks.plain`); `apart` is the largest
difference of the two predictions divided by the largest value of the second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import plain
from benchmarks.full_size import peak_bytes, random_weights
from persistworld_cli.compat import free_main_thread
from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.settings import LaunchSettings, Settings
from persistworld_cli.cost.flops import measure
from persistworld_cli.cost.interaction import meta_model, predict
from persistworld_cli.launch.environment import worker_environment
from persistworld_cli.models.world_model import Condition, WorldModel


def build(
    settings: Settings,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    parts: Sequence[str] = ("unet", "action_encoder"),
) -> WorldModel:
    """The model with memory and random weights for some parts alone."""
    model = meta_model(settings.model, settings.world).to(dtype)
    for part in (getattr(model, name) for name in parts):
        part.to_empty(device=device)
        targets = part.state_dict()
        for name, tensor in random_weights({k: v.shape for k, v in targets.items()}, dtype):
            targets[name].copy_(tensor)
    return model


@torch.no_grad()
def random_clips(model: WorldModel, clips: int, noise_aug: float) -> tuple[Condition, torch.Tensor]:
    """Random conditions of some clips, and unit noise for them (clips, L, C, h, w)."""
    draw = torch.Generator().manual_seed(0)
    settings, frame, device = model.settings, model.latent_shape, model.device

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(clips, *shape, generator=draw).to(device)

    text = normal(model.text_encoder.text_projection.out_features)
    tokens = model.tokens(
        normal(settings.num_history + settings.num_frames, settings.action_dim), text.to(model.action_encoder.dtype)
    )
    condition = Condition(normal(settings.num_history, *frame), normal(*frame), tokens, noise_aug)
    return condition, normal(settings.num_frames, *frame)


@torch.no_grad()
def forward(model: WorldModel) -> torch.Tensor:
    """The clean prediction of one random clip: (1, L, C, h, w), float32."""
    condition, noise = random_clips(model, 1, 0.02)
    return model.denoise(noise, torch.tensor([1.0]), condition)


def run(preset: str, asked: str, repeats: int, plainly: bool) -> dict[str, Any]:
    """Build and time in this process."""
    free_main_thread()
    settings, dtype = load_settings(preset, [], {}, env={}), getattr(torch, asked)
    counted = meta_model(settings.model, settings.world)
    work = measure(lambda: predict(counted, 1), counted.parameters(), dtype)
    libraries = peak_bytes()
    model = build(settings, dtype)
    weights = sum(p.nbytes for p in model.parameters() if not p.is_meta)
    seconds, busy, plain_seconds, apart = [], [], [], 0.0
    for _ in range(repeats + 1):  # the first one also chooses kernels
        begun, worked = time.perf_counter(), time.process_time()
        out = forward(model)
        seconds.append(round(time.perf_counter() - begun, 2))
        busy.append(round(time.process_time() - worked, 2))
        print(f"forward {len(busy)}: {seconds[-1]} s, {busy[-1]} s of CPU", file=sys.stderr, flush=True)
        if plainly:
            with plain.plain_blocks(model):
                begun = time.perf_counter()
                theirs = forward(model)
                plain_seconds.append(round(time.perf_counter() - begun, 2))
            apart = max(apart, float((out - theirs).abs().max() / theirs.abs().max()))
    assert out.isfinite().all()
    middle = statistics.median(seconds[1:])
    return {
        "preset": preset,
        "dtype": asked,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters() if not p.is_meta),
        "output": list(out.shape),
        "first_s": seconds[0],
        "seconds": seconds[1:],
        "median_s": middle,
        "cpu_s": busy[1:],
        "flops": work.flops,
        "gflop_per_s": round(work.flops / middle / 1e9),
        "weights_bytes": weights,
        "counted_activation_bytes": work.peak,
        "libraries_bytes": libraries,
        "peak_bytes": peak_bytes(),
        "plain_seconds": plain_seconds[1:],
        "apart": apart,
    }


def table(result: dict[str, Any]) -> str:
    """For people."""
    gib = 2**30
    busy = statistics.median(result["cpu_s"])
    share = busy / (result["threads"] * result["median_s"])
    times = f"{', '.join(f'{s:.1f}' for s in result['seconds'])}; first {result['first_s']:.1f}"
    rows = {
        "network": f"{result['parameters']:,} parameters in {result['dtype']} ({result['preset']}), one clip",
        "time": f"{result['median_s']:.1f} s (median of {len(result['seconds'])}: {times})",
        "CPU": f"{busy:.1f} s, {100 * share:.0f}% of threads x time{' (shared machine)' if share < 0.9 else ''}",
        "work": f"{result['flops'] / 1e12:.2f} TFLOP, {result['gflop_per_s']} GFLOP/s on {result['threads']} threads",
        "memory": f"peak {result['peak_bytes'] / gib:.2f} GiB: weights {result['weights_bytes'] / gib:.2f}, libraries "
        f"{result['libraries_bytes'] / gib:.2f}, activations counted {result['counted_activation_bytes'] / gib:.2f}",
    }
    if result["plain_seconds"]:
        ratios = [a / b for a, b in zip(result["plain_seconds"], result["seconds"], strict=True)]
        spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
        rows["plain"] = f"{statistics.median(ratios):.2f} times as fast ({spread}), {result['apart']:.2g} apart"
    return "\n".join(f"{name:8} {value}" for name, value in rows.items())


def main() -> None:
    """Measure in a child with the workers' environment; print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="ctrl-world")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="diffusers' own blocks beside ours")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run(options.preset, options.dtype, options.repeats, options.plain)))
        return
    own = ["--preset", options.preset, "--dtype", options.dtype, "--repeats", str(options.repeats), "--child"]
    own += ["--plain"] if options.plain else []
    command = [sys.executable, "-m", "benchmarks.full_forward", *own]
    env = worker_environment(LaunchSettings(device="cpu"))
    result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env).stdout)
    print(json.dumps(result, indent=1) if options.json else table(result))


if __name__ == "__main__":
    main()
