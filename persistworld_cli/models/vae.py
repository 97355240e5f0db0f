"""Encode frames to latents and decode them with SVD's temporal-decoder VAE.

Shapes: N frames, V cameras, C latent channels, H x W image, h = V * latent height (cameras stacked), w latent width.
Pixels are uint8 or [0, 1] outside, [-1, 1] inside; latents are scaled by the VAE's `scaling_factor` outside.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder

from persistworld_cli.config.sizes import latent_size
from persistworld_cli.models.cpu.hook import speed_up
from persistworld_cli.models.layers import fold_temporal_convs, set_norm_groups
from persistworld_cli.seeding import generator

DIFFUSERS_GROUPS = 32


def build_vae(config: dict[str, Any], norm_groups: int = DIFFUSERS_GROUPS) -> AutoencoderKLTemporalDecoder:
    """diffusers' class with `config`'s keywords and random weights."""
    vae = AutoencoderKLTemporalDecoder(**config)
    fold_temporal_convs(vae)
    speed_up(vae)
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


def encode(vae: AutoencoderKLTemporalDecoder, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Images (M, 3, H, W) in [-1, 1] to scaled latents (M, C, h1, w): the posterior's mode, or a sample
    from it, given unit `noise` of the latents' shape.
    """
    posterior = vae.encode(images.to(vae.dtype)).latent_dist
    latents = posterior.mode() if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
    return latents * vae.config.scaling_factor


def encode_images(
    vae: AutoencoderKLTemporalDecoder, frames_u8: torch.Tensor, device: torch.device, posterior: str = "mode"
) -> torch.Tensor:
    """uint8 images (N, V, H, W, 3) on the CPU to latents with the cameras stacked, (N, C, h, w), float32, on `device`.

    ``posterior``: ``mode``, or ``sample``, which is seeded by camera and image: the same in every batch and process.
    """
    n, v = frames_u8.shape[:2]
    images = pixels_to_unit(frames_u8.flatten(0, 1).to(device))
    noise = _image_noise(vae, frames_u8).to(device) if posterior == "sample" else None
    return stack_cameras(encode(vae, images, noise).unflatten(0, (n, v)).float())


def _image_noise(vae: AutoencoderKLTemporalDecoder, frames_u8: torch.Tensor) -> torch.Tensor:
    """Unit noise (N * V, C, h1, w) for images (N, V, H, W, 3), seeded by camera and image."""
    size = latent_size(vae.config, *frames_u8.shape[2:4])
    numbered = [(camera, image) for frame in frames_u8 for camera, image in enumerate(frame)]
    seeds = [("posterior", camera, zlib.crc32(image.contiguous().numpy().tobytes())) for camera, image in numbered]
    return torch.stack([torch.randn(size, generator=generator(*seed)) for seed in seeds])


def decode(vae: AutoencoderKLTemporalDecoder, latents: torch.Tensor, chunk: int, together: int = 1) -> torch.Tensor:
    """Scaled latents (M, C, h1, w) to images (M, 3, H, W), not clamped, in [-1, 1].

    Runs of `chunk` rows go through the decoder as one clip each, as in Ctrl-World, `together` of them at once (1 unless
    M is a multiple of chunk). Rows are ordered camera by camera: if the chunk does not divide a camera's frames,
    neighbouring cameras mix.
    """
    latents = (latents / vae.config.scaling_factor).to(vae.dtype)
    parts = latents.split(chunk * together)
    return torch.cat([vae.decode(part, num_frames=min(chunk, len(part))).sample for part in parts])
