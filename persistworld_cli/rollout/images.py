"""Images of rollouts: latents decoded and cut to the recording's size, floats to 8 bit and back.

Shape legend: B rollouts, N frames, S interactions, L frames of an interaction, V cameras, C latent channels, h, w
latent, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persistworld_cli.config.settings import SamplingSettings
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models.world_model import WorldModel

VAE_ROUNDING = 16  # a VAE rounds sizes up by less than this many pixels


def to_unit(frames: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> Tensor:
    """uint8 (..., H, W, 3) to float (..., 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(frames))).movedim(-1, -3).float() / 255.0


def to_uint8(images: Tensor, rounding: str = "nearest") -> NDArray[np.uint8]:
    """Float (..., 3, H, W) in [0, 1] to uint8 (..., H, W, 3), rounded to the nearest, or "down" as Ctrl-World does."""
    scaled = images.clamp(0, 1) * 255.0
    whole = scaled.round() if rounding == "nearest" else scaled.floor()
    return whole.to(torch.uint8).movedim(-3, -1).cpu().numpy()


def draw_images(
    model: WorldModel, latents: Tensor, sampling: SamplingSettings, size: tuple[int, ...] | None = None
) -> Tensor:
    """Decode latents (B, N, C, h, w) or (N, C, h, w) to images (..., V, 3, H, W) in [0, 1].

    They are cut to ``size``: the (H, W) of a recording; by default of the model's world settings.

    Raises:
        PersistWorldError: images smaller than the recording, or larger by more than a VAE rounds up.
    """
    images = model.draw(latents.to(model.device), sampling)
    height, width = size or (model.world.height, model.world.width)
    h, w = images.shape[-2:]
    if not (0 <= h - height < VAE_ROUNDING and 0 <= w - width < VAE_ROUNDING):
        raise PersistWorldError(
            f"the model draws {h}x{w} images, the recording has {height}x{width}",
            where="model.vae, world.height, world.width",
            fix="use the preset that the dataset was extracted with",
        )
    return images[..., :height, :width]


def draw_frames(
    model: WorldModel, latents: NDArray[np.float16], sampling: SamplingSettings, size: tuple[int, ...] | None = None
) -> NDArray[np.uint8]:
    """Decode a rollout's kept latents (S, L, C, h, w) to its new frames, uint8 (S (L-1), V, H, W, 3)."""
    predicted = torch.from_numpy(np.asarray(latents, dtype=np.float32))
    images = torch.cat([draw_images(model, step, sampling, size)[1:] for step in predicted])
    return to_uint8(images, model.world.pixel_rounding)
