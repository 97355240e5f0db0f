"""The one place that says how large a latent is; needs no torch.

diffusers' VAE cuts off what its factor does not divide, so an image must be a multiple of it: others are refused where
settings are read (`check_image_size`), before anything is extracted at a size that no rollout takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from persistworld_cli.config.settings import Settings
from persistworld_cli.errors import UsageError

_BLOCKS, _CHANNELS = (64,), 4  # what diffusers' class takes where `model.vae` says nothing


def vae_factor(vae: Mapping[str, Any]) -> int:
    """Pixels of an image a latent pixel, along either side.

    Args:
        vae: keywords or config of `AutoencoderKLTemporalDecoder`; every block but the last halves the image.
    """
    return 2 ** (len(vae.get("block_out_channels") or _BLOCKS) - 1)


def latent_size(vae: Mapping[str, Any], height: int, width: int) -> tuple[int, int, int]:
    """(C, h, w) of the latent of one camera's image, as diffusers computes it."""
    factor = vae_factor(vae)
    return int(vae.get("latent_channels") or _CHANNELS), height // factor, width // factor


def check_image_size(settings: Settings, place: Callable[..., str]) -> None:
    """Refuse an image size that the VAE's factor does not divide.

    Args:
        settings: typed settings.
        place: dotted keys -> where they were written.

    Raises:
        UsageError: with the nearest sizes that work.
    """
    factor, world = vae_factor(settings.model.vae), settings.world
    for key, side in (("world.height", world.height), ("world.width", world.width)):
        if side % factor:
            below = side // factor * factor
            nearest = " or ".join(str(size) for size in (below, below + factor) if size)
            raise UsageError(
                f"{key} = {side} is no multiple of {factor}, by which this VAE makes images smaller",
                where=place(key, "model.vae"),
                fix=f"set {key} = {nearest}",
            )
