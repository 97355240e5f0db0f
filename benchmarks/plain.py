"""The plain way, the baseline of speed measurements: a script around diffusers, lpips and scikit-image.

diffusers' own blocks (its attention, its 3-D convolutions, its memory layout) and peft's own LoRA layers, one rollout
at a time, each clip decoded by itself in runs of the decode chunk, every image scored by itself. Only the
benchmarks use it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn

from persistworld_cli.metrics.lpips import Lpips
from persistworld_cli.models import vae
from persistworld_cli.models.cpu.attention import diffusers_attention
from persistworld_cli.models.cpu.fused_blocks import DIFFUSERS
from persistworld_cli.models.cpu.layers import swapped_classes
from persistworld_cli.models.cpu.lora_layers import FUSED_LORA
from persistworld_cli.models.layers import TemporalConv
from persistworld_cli.models.precision import small_products
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.rollout.closed_loop import ClosedLoop
from persistworld_cli.rollout.recording import Recording
from persistworld_cli.training.policy_switch import PolicySwitch

_PLAIN = {TemporalConv: nn.Conv3d, **DIFFUSERS, **{fused: own for own, fused in FUSED_LORA.items()}}


@contextmanager
def plain_blocks(model: WorldModel) -> Iterator[None]:
    """diffusers' and peft's own blocks, not compiled, in the place of this project's; put back afterwards."""
    compiled = model.unet.__dict__.pop("forward", None)
    try:
        with swapped_classes(model, _PLAIN), diffusers_attention(model.unet):
            yield
    finally:
        if compiled is not None:
            model.unet.forward = compiled


@contextmanager
def plain_switching(switch: PolicySwitch) -> Iterator[None]:
    """Adapters switched by peft's own calls, which walk over every parameter."""

    def activate(policy: str, **_: object) -> None:
        for layer in switch.layers:
            layer.enable_adapters(policy != "reference")
            if policy != "reference":
                layer.set_adapter(policy, inference_mode=policy != "theta")
        switch.model.action_encoder = switch.encoders[policy]
        for parameter in theta:
            parameter.requires_grad_(True)

    theta = switch.trainable()
    switch.activate = activate  # type: ignore[method-assign]
    try:
        yield
    finally:
        del switch.activate
        switch.activate("theta")


@torch.no_grad()
def decode(model: WorldModel, latents: Tensor, chunk: int, dtype: str) -> Tensor:
    """One clip (N, C, h, w), camera by camera in runs of `chunk`, to images (N, V, 3, H, W) in [0, 1]."""
    views = len(model.world.cameras)
    flat = vae.unstack_cameras(latents, views).transpose(0, 1).flatten(0, 1)
    with small_products(model.device, getattr(torch, dtype), model.vae.dtype):
        images = vae.decode(model.vae, flat, chunk or len(latents)).float()
    return (images.unflatten(0, (views, len(latents))).transpose(0, 1) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def score(lpips: Lpips, drawn: Tensor, known: Tensor) -> dict[str, NDArray[np.float32]]:
    """SSIM and PSNR by scikit-image and LPIPS by the lpips package, image by image.

    Args:
        lpips: whose network is called; its batched metric is not.
        drawn, known: (N, V, 3, H, W) in [0, 1].

    Returns:
        name -> (N, V).
    """
    out = {name: np.zeros(drawn.shape[:2], dtype=np.float32) for name in ("ssim", "psnr", "lpips")}
    for at in np.ndindex(*drawn.shape[:2]):
        a, b = drawn[at], known[at]
        first, second = a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy()
        out["ssim"][at] = structural_similarity(first, second, channel_axis=2, data_range=1.0)
        out["psnr"][at] = peak_signal_noise_ratio(second, first, data_range=1.0)
        out["lpips"][at] = lpips.model(2 * a[None] - 1, 2 * b[None] - 1).item()
    return out


def roll(loop: ClosedLoop, lpips: Lpips, recordings: Sequence[Recording]) -> dict[str, NDArray[np.float32]]:
    """Rollouts one after the other, scored: name -> (I, F, V). Call it under `plain_blocks`."""
    engine, rows = loop.engine, loop.num_frames
    model, sampling = engine.model, engine.sampling
    done: list[dict[str, NDArray[np.float32]]] = []
    for recording in recordings:
        state = engine.start_from(loop.store, [recording])
        parts = []
        for step in range(loop.steps):
            noise = engine.noise(state)
            clip = engine.step(state, recording.poses(step, rows)[None], noise)[0]
            drawn = decode(model, clip, sampling.decode_chunk, sampling.decode_dtype)[1:]
            known = torch.from_numpy(recording.frames[step * (rows - 1) : (step + 1) * (rows - 1)])
            parts.append(score(lpips, drawn, known.movedim(-1, -3).float() / 255.0))
        done.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return {name: np.stack([one[name] for one in done]) for name in done[0]}
