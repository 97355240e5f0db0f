"""Frames to latents and back with SVD's temporal-decoder VAE.

Shapes: N frames, V cameras, C latent channels, H x W picture, h = V * latent height (cameras stacked), w latent width.
Pixels are uint8 or [0, 1] outside, [-1, 1] inside; latents are scaled by the VAE's `scaling_factor` outside.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder

from persistworld_cli.models.norms import set_norm_groups
from persistworld_cli.models.temporal_conv import fold_temporal_convs

DIFFUSERS_GROUPS = 32


def build_vae(config: dict[str, Any], norm_groups: int = DIFFUSERS_GROUPS) -> AutoencoderKLTemporalDecoder:
    """diffusers' class with `config`'s keywords and fresh weights."""
    vae = AutoencoderKLTemporalDecoder(**config)
    fold_temporal_convs(vae)
    set_norm_groups(vae, norm_groups)
    return vae


def pixels_to_unit(frames_u8: torch.Tensor) -> torch.Tensor:
    """uint8 (..., H, W, 3) to float (..., 3, H, W) in [-1, 1]."""
    return frames_u8.movedim(-1, -3).float() / 127.5 - 1


def stack_cameras(latent_nvchw: torch.Tensor) -> torch.Tensor:
    """(N, V, C, h1, w) to (N, C, V * h1, w): the cameras one above the other."""
    n, v, c, h, w = latent_nvchw.shape
    return latent_nvchw.permute(0, 2, 1, 3, 4).reshape(n, c, v * h, w)


def unstack_cameras(latent_nchw: torch.Tensor, cameras: int) -> torch.Tensor:
    """The inverse of `stack_cameras`."""
    n, c, h, w = latent_nchw.shape
    return latent_nchw.reshape(n, c, cameras, h // cameras, w).permute(0, 2, 1, 3, 4)


def encode(vae: AutoencoderKLTemporalDecoder, images: torch.Tensor) -> torch.Tensor:
    """Mode of the posterior, scaled: images (M, 3, H, W) in [-1, 1] to (M, C, h1, w)."""
    return vae.encode(images.to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor


def decode(vae: AutoencoderKLTemporalDecoder, latents: torch.Tensor, chunk: int) -> torch.Tensor:
    """Scaled latents (M, C, h1, w) to pictures (M, 3, H, W), not clamped, in [-1, 1].

    Runs of `chunk` rows go through the decoder as one clip each, as Ctrl-World does it: with rows ordered camera by
    camera and a chunk that does not divide a camera's frames, neighbouring cameras mix.
    """
    latents = (latents / vae.config.scaling_factor).to(vae.dtype)
    runs = [vae.decode(run, num_frames=run.shape[0]).sample for run in latents.split(chunk)]
    return torch.cat(runs)


def decode_clips(vae: AutoencoderKLTemporalDecoder, latents: torch.Tensor, chunk: int) -> torch.Tensor:
    """Like `decode` with M a multiple of chunk, all runs in one batch: the same numbers, one call."""
    latents = (latents / vae.config.scaling_factor).to(vae.dtype)
    return vae.decode(latents, num_frames=chunk).sample
