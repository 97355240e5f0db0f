"""The size of a latent; needs no torch.

diffusers' VAE crops images whose size its factor does not divide, so config/check.py refuses such sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BLOCKS, _CHANNELS = (64,), 4  # defaults of diffusers' class


def vae_factor(vae: Mapping[str, Any]) -> int:
    """Image pixels per latent pixel, along either side.

    Args:
        vae: keywords or config of `AutoencoderKLTemporalDecoder`; every block but the last halves the image.
    """
    return 2 ** (len(vae.get("block_out_channels") or _BLOCKS) - 1)


def latent_size(vae: Mapping[str, Any], height: int, width: int) -> tuple[int, int, int]:
    """(C, h, w) of the latent of one camera's image, as diffusers computes it."""
    factor = vae_factor(vae)
    return int(vae.get("latent_channels") or _CHANNELS), height // factor, width // factor
