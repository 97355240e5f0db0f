"""Shared by benchmarks and traces of models of any size: random weights, a recorded world, a process's peak memory."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from persistworld_cli.checkpoints.saving import save_safetensors
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.settings import Settings
from persistworld_cli.config.sizes import latent_size
from persistworld_cli.cost.interaction import meta_model
from persistworld_cli.data.metadata.meta import build_meta
from persistworld_cli.data.raw.video import write_mp4

FRAMES = 16  # of each episode of `recorded_world`


def peak_bytes() -> int:
    """The most memory this process ever had: VmHWM, or what getrusage says where there is no /proc."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def random_weights(shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, view of random numbers) for every shape; scaled to the fan-in, norms at 1, biases at 0.

    Every tensor is cut from one random block, from the place where the last one ended: drawing billions of numbers
    would take longer than everything else.
    """
    largest = max(shape.numel() for shape in shapes.values())
    block = torch.empty(2 * largest).uniform_(-1, 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    begin = 0
    for name, shape in shapes.items():
        if len(shape) < 2:
            yield name, torch.full(shape, float(name.endswith("weight")), dtype=dtype)
            continue
        cut = block[begin : begin + shape.numel()].view(shape)
        yield name, cut * (3 / shape[1:].numel()) ** 0.5
        begin = (begin + shape.numel()) % largest


def random_checkpoint(path: Path, settings: Settings) -> None:
    """Write random weights of a preset's size in bfloat16, under the names of its checkpoint."""
    model = meta_model(settings.model, settings.world)
    model.drop_passthrough()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    save_safetensors(path, dict(random_weights(shapes, torch.bfloat16)))


def recorded_world(root: Path, settings: Settings) -> None:
    """Write two episodes of a preset, one to train on and one held out: moving ramps, latents of unit noise."""
    world = settings.world
    stat = json.loads(resolve_path(settings.model.stat).read_text())
    low, high = np.asarray(stat["state_01"]), np.asarray(stat["state_99"])
    draw = np.random.default_rng(0)
    across = np.arange(world.height)[:, None] + np.arange(world.width)
    for split, episode in (("train", "0"), ("val", "1")):
        latents = root / "latent_videos" / split / episode
        latents.mkdir(parents=True)
        for camera in range(len(world.cameras)):
            grey = [(across * (camera + 1) + 4 * frame) % 256 for frame in range(FRAMES)]
            frames = np.repeat(np.stack(grey)[..., None], 3, axis=-1).astype(np.uint8)
            write_mp4(root / "videos" / split / episode / f"{camera}.mp4", frames, world.rate_hz)
            size = (FRAMES, *latent_size(settings.model.vae, world.height, world.width))
            np.save(latents / f"{camera}.npy", draw.standard_normal(size).astype(np.float16))
        states = low + np.linspace(0.1, 0.9, FRAMES)[:, None] * (high - low)
        note = {"texts": ["push the red block"], "states": states.tolist(), "video_length": FRAMES, "success": True}
        (root / "annotation" / split).mkdir(parents=True)
        (root / "annotation" / split / f"{episode}.json").write_text(json.dumps(note))
    build_meta(root)
