"""Teacher-forced training: EDM's denoising loss on the predicted frames (Ctrl-World, arXiv 2510.10125).

Shapes: B batch, P history frames, L predicted frames, N = P + L, C, h, w latent.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from persistworld_cli.config.settings import PretrainSettings
from persistworld_cli.data.clips.mixture import ClipBatch
from persistworld_cli.models.diffusion import loss_weight, noised_condition
from persistworld_cli.models.world_model import Condition, WorldModel
from persistworld_cli.seeding import generator


@dataclass(frozen=True)
class Draws:
    """Every random number of one loss, so that a test can supply them and a resumed run can repeat them.

    Args:
        current_u: (B,) uniform; the current frame's noise level is `current_noise * u`.
        current_noise: (B, C, h, w) normal.
        keep_u: (B,) uniform; tokens are kept where it exceeds `token_drop`.
        sigma_z: (B,) normal; sigma = exp(p_std z + p_mean).
        noise: (B, L, C, h, w) normal.
        history_z: (B, P) normal; each history frame's level is `history_noise * z` (signed).
        history_noise: (B, P, C, h, w) normal.
    """

    current_u: torch.Tensor
    current_noise: torch.Tensor
    keep_u: torch.Tensor
    sigma_z: torch.Tensor
    noise: torch.Tensor
    history_z: torch.Tensor
    history_noise: torch.Tensor

    @classmethod
    def sample(cls, shape: tuple[int, ...], history: int, generator: torch.Generator, device: torch.device) -> Draws:
        """New draws for clips of `shape` (B, N, C, h, w) from a CPU generator."""
        b, n, *frame = shape

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(b, *size, generator=generator).to(device, non_blocking=True)

        def uniform() -> torch.Tensor:
            return torch.rand(b, generator=generator).to(device, non_blocking=True)

        return cls(
            current_u=uniform(),
            current_noise=normal(*frame),
            keep_u=uniform(),
            sigma_z=normal(),
            noise=normal(n - history, *frame),
            history_z=normal(history),
            history_noise=normal(history, *frame),
        )

    @classmethod
    def by_clip(cls, shape: tuple[int, ...], history: int, seed: int, first: int, device: torch.device) -> Draws:
        """Draws of clips number ``first``, ``first`` + 1, ... of a run: the same in any batch and on any rank."""
        own = [
            cls.sample((1, *shape[1:]), history, generator("clip", seed, first + i), device) for i in range(shape[0])
        ]
        return cls(**{field.name: torch.cat([getattr(draws, field.name) for draws in own]) for field in fields(cls)})


def denoising_loss(
    model: WorldModel,
    latents: torch.Tensor,
    actions: torch.Tensor,
    text: torch.Tensor | None,
    draws: Draws,
    settings: PretrainSettings,
) -> torch.Tensor:
    """Loss of each item (B,): mean over the predicted frames of (s^2+1)/s^2 |D - x|^2.

    `latents` (B, N, C, h, w) clean, `actions` (B, N, D) normalised, `text` (B, E) or none. Raises PersistWorldError for
    data of another preset.
    """
    model.check_data(tuple(latents.shape[2:]), actions.shape[-1])
    history_count = draws.history_z.shape[1]
    history, future = latents[:, :history_count], latents[:, history_count:]
    tokens = model.tokens(actions, text)
    tokens = tokens * (draws.keep_u > settings.token_drop).to(tokens.dtype).view(-1, 1, 1)
    sigma = (settings.p_std * draws.sigma_z + settings.p_mean).exp()
    condition = Condition(
        history=noised_condition(
            history, (settings.history_noise * draws.history_z)[:, :, None, None, None], draws.history_noise
        ),
        current=noised_condition(
            future[:, 0], (settings.current_noise * draws.current_u).view(-1, 1, 1, 1), draws.current_noise
        ),
        tokens=tokens,
        noise_aug=settings.noise_aug,
    )
    noisy = future + sigma.view(-1, 1, 1, 1, 1) * draws.noise
    error = (model.denoise(noisy, sigma, condition).float() - future) ** 2
    return loss_weight(sigma) * error.flatten(1).mean(dim=1)


def clip_losses(
    model: WorldModel,
    batch: ClipBatch,
    options: PretrainSettings,
    seed: int,
    first: int,
    actions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Denoising loss (B,) of a batch's clips, of which the first is number ``first`` of the run (`Draws.by_clip`).

    Args:
        model: on its device.
        batch: clips.
        options: noise levels; whether the text encoder learns.
        seed: of the draws.
        first: number of the first clip.
        actions: (B, N, D) given in place of the batch's own.
    """
    device = model.device
    actions = batch.actions if actions is None else actions
    latents, actions = (part.to(device, non_blocking=True) for part in (batch.latents, actions))
    draws = Draws.by_clip(latents.shape, model.settings.num_history, seed, first, device)
    learns_text = "text_encoder" in options.parts and torch.is_grad_enabled()
    text = model.text_embeds(list(batch.texts), grad=learns_text) if model.settings.text_cond else None
    return denoising_loss(model, latents, actions, text, draws, options)
