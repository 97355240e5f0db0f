"""An interaction step of the full-size model on a GPU, with random weights: time, FLOP/s, share of peak, memory.

`python -m benchmarks.gpu [--preset persistworld] [--repeats 5] [--device cuda] [--json]`

The model gets random weights of the preset's size, in the type of its sampling. A way is a sampler, its steps, guidance
and the number of rollouts advanced together; each samples clips from random conditions and decodes them, as an
interaction step does, once to warm up and then `--repeats` times, all ways in turn. FLOPs are those of a dry run, peaks
those of the data sheets. `--device cpu --preset tiny` tests the script without a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.full_forward import build, random_clips
from benchmarks.full_size import peak_bytes
from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.settings import SamplingSettings, Settings
from persistworld_cli.cost.accelerators import ACCELERATORS, Accelerator
from persistworld_cli.cost.interaction import count_interaction, meta_model
from persistworld_cli.data.clips.store import ActionStat
from persistworld_cli.models.world_model import WorldModel, sampling_dtype
from persistworld_cli.rollout.engine import RolloutEngine


class Way(NamedTuple):
    """How a clip is drawn, and of how many rollouts at once."""

    sampler: str
    steps: int
    guidance: float
    rollouts: int

    @property
    def name(self) -> str:
        """In words."""
        guided = "with guidance" if self.guidance != 1.0 else "no guidance"
        return f"{self.sampler} {self.steps}, {guided}, {self.rollouts} together"


WAYS = (
    Way("euler", 50, 2.0, 1),
    Way("euler", 50, 1.0, 1),
    Way("dpmpp-2m", 6, 1.0, 1),
    Way("dpmpp-2m", 6, 1.0, 8),
)


def way_sampling(settings: Settings, way: Way) -> SamplingSettings:
    """The preset's sampling, drawn this way."""
    return replace(settings.sampling, sampler=way.sampler, steps=way.steps, guidance=way.guidance)


def interaction(model: WorldModel, sampling: SamplingSettings, rollouts: int) -> Callable[[], torch.Tensor]:
    """A call that draws and decodes one interaction of so many rollouts."""
    numbers = model.settings.action_dim
    engine = RolloutEngine(model, sampling, ActionStat(np.zeros(numbers), np.ones(numbers)))
    condition, noise = random_clips(model, rollouts, sampling.noise_aug)

    @torch.no_grad()
    def step() -> torch.Tensor:
        return model.draw(engine.sample(condition, noise), sampling)

    return step


def peak_of(name: str) -> Accelerator | None:
    """The accelerator whose name is in the device's, the longest of them; None where it is not listed."""
    words = name.lower().replace(" ", "-")
    known = sorted((one for one in ACCELERATORS if one in words), key=len)
    return ACCELERATORS[known[-1]] if known else None


def measure(preset: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Every way, in turn."""
    settings = load_settings(preset, env={})
    counted = meta_model(settings.model, settings.world)
    dtype = sampling_dtype(settings.sampling)
    model = build(settings, dtype, device, ("unet", "action_encoder", "vae"))
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else ""
    peak = peak_of(name)
    steps = {way: interaction(model, way_sampling(settings, way), way.rollouts) for way in WAYS}
    times: dict[Way, list[float]] = {way: [] for way in WAYS}
    memory: dict[Way, int] = {}
    for turn in range(repeats + 1):
        for way, step in steps.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.synchronize(device)
            begun = time.perf_counter()
            images = step()
            if on_gpu:
                torch.cuda.synchronize(device)
            if turn:  # the first one chooses kernels
                times[way].append(time.perf_counter() - begun)
                memory[way] = torch.cuda.max_memory_allocated(device) if on_gpu else peak_bytes()
            assert images.isfinite().all()
    seconds_of_robot = (settings.model.num_frames - 1) / settings.world.rate_hz
    rows = []
    for way, taken in times.items():
        flops = way.rollouts * count_interaction(counted, way_sampling(settings, way), 1).flops
        middle = statistics.median(taken)
        rows.append(
            {
                "way": way.name,
                "seconds": taken,
                "median_s": middle,
                "of_real_time": middle / way.rollouts / seconds_of_robot,
                "tflop_per_s": flops / middle / 1e12,
                "share_of_peak": flops / middle / 1e12 / peak.tflops if peak else None,
                "memory_gib": memory[way] / 2**30,
            }
        )
    return {"preset": preset, "device": name or device.type, "repeats": repeats, "ways": rows}


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{result['preset']} on {result['device']}, random weights, n = {result['repeats']}"]
    lines.append(f"{'way':42}{'s (min .. max)':>28}{'of real time':>14}{'TFLOP/s':>10}{'of peak':>9}{'GiB':>7}")
    for row in result["ways"]:
        spread = f"{row['median_s']:.3f} ({min(row['seconds']):.3f} .. {max(row['seconds']):.3f})"
        share = "-" if row["share_of_peak"] is None else f"{row['share_of_peak']:.0%}"
        lines.append(
            f"{row['way']:42}{spread:>28}{row['of_real_time']:>13.2f}x{row['tflop_per_s']:>10.3g}{share:>9}"
            f"{row['memory_gib']:>7.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="persistworld")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device was found")
    result = measure(options.preset, torch.device(options.device), options.repeats)
    print(json.dumps(result, indent=1) if options.json else table(result))


if __name__ == "__main__":
    main()
