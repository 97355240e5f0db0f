"""Seconds of a pretraining update, by batch and preset: which size of a network can see how many clips in an hour.

`python -m benchmarks.pretraining_step [--presets tiny,other.toml] [--batches 6,12,24] [--updates 8]`

Clips are random latents; loss, gradient, optimizer and weight average are those of `pretrain`. Presets take turns, so
that a slow minute of the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.worker_process import become_worker
from persistworld_cli.config.presets import load_settings
from persistworld_cli.models.world_model import build_world_model
from persistworld_cli.objective.denoising import Draws, denoising_loss
from persistworld_cli.training.optim import Optimizers, WeightAverage, inputs_and_outputs
from persistworld_cli.training.pretrain import trained_parameters


def updater(preset: str, batch: int, device: torch.device) -> tuple[Callable[[], None], float]:
    """One update of a preset's network from random weights, as a function; and its UNet's parameters in millions."""
    settings = load_settings(preset, [], {})
    options, clip = settings.pretrain, settings.model
    torch.manual_seed(0)
    model = build_world_model(settings.model, settings.world).to(device).train()
    parameters = trained_parameters(model, options)
    optimizers = Optimizers(
        parameters,
        options.optimizer,
        lr=options.lr,
        weight_decay=options.weight_decay,
        betas=(0.9, options.beta2),
        by_adamw=inputs_and_outputs(model),
    )
    average = WeightAverage(parameters, options.ema)
    shape = (batch, clip.num_history + clip.num_frames, *model.latent_shape)
    latents, actions = torch.randn(shape, device=device), torch.randn(*shape[:2], clip.action_dim, device=device)
    draws = Draws.sample(shape, clip.num_history, torch.Generator().manual_seed(0), device)
    small = torch.autocast(device.type, torch.bfloat16, enabled=options.mixed_precision == "bf16")

    def update() -> None:
        texts = model.text_embeds(["put the cube on the drum"] * batch, grad=True) if clip.text_cond else None
        with small:
            loss = denoising_loss(model, latents, actions, texts, draws, options).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], options.max_grad_norm)
        optimizers.step()
        average.update(parameters)
        loss.item()  # waits for a GPU

    return update, sum(p.numel() for p in model.unet.parameters()) / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default="tiny")
    parser.add_argument("--batches", default="6,12,24")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.device == "cpu":
        become_worker("benchmarks.pretraining_step")
    print("preset, million parameters, batch: seconds of an update, median (least .. most); seconds a clip")
    for batch in map(int, options.batches.split(",")):
        made = {name: updater(name, batch, torch.device(options.device)) for name in options.presets.split(",")}
        took: dict[str, list[float]] = {name: [] for name in made}
        for turn in range(options.updates + 2):
            for name, (update, _) in made.items():
                begun = time.perf_counter()
                update()
                if turn > 1:  # the first two prepare
                    took[name].append(time.perf_counter() - begun)
        for name, (_, millions) in made.items():
            middle = float(np.median(took[name]))
            spread = f"{min(took[name]):.2f} .. {max(took[name]):.2f}"
            print(f"{name}, {millions:.1f}, {batch}: {middle:.2f} ({spread}); {middle / batch:.3f}", flush=True)


if __name__ == "__main__":
    main()
