"""The world model: all parts, under the names of Ctrl-World's checkpoints, and the methods that other packages call.

Shapes: B batch, N = P + L frames (P history, L predicted), C latent channels, h = V * latent height, w latent width,
T token width, D action numbers. Latents are scaled (unit variance, roughly).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from persistworld_cli.config.settings import ModelSettings, SamplingSettings, WorldSettings
from persistworld_cli.config.sizes import latent_size
from persistworld_cli.config.weight_names import PASSTHROUGH
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models.diffusion import precondition
from persistworld_cli.models.layers import set_norm_groups
from persistworld_cli.models.precision import small_products
from persistworld_cli.models.text import load_tokenizer, tokenize
from persistworld_cli.models.tokens import ActionEncoder
from persistworld_cli.models.unet import FrameLevelUNet
from persistworld_cli.models.vae import build_vae, decode, encode_images, unstack_cameras
from persistworld_cli.read_files import reading
from persistworld_cli.stages import stage

# Images decoded at once; of small images, as many as have this many pixels in total (on two cores, 120 images of
# 48 x 80 at once took 1 to 20% less time than in three calls)
DECODE_ROWS, DECODE_PIXELS = 48, 2**19


@dataclass(frozen=True)
class Condition:
    """What a clip is predicted from.

    Attributes:
        history: (B, P, C, h, w) latents of the past, oldest first; already noised in training if requested.
        current: (B, C, h, w) latent of the current frame.
        tokens: (B, N, T) one conditioning token per frame.
        noise_aug: the third of SVD's added ids (0.0 in training, 0.02 at sampling).
    """

    history: torch.Tensor
    current: torch.Tensor
    tokens: torch.Tensor
    noise_aug: float


class WorldModel(nn.Module):
    """UNet, VAE, text and action encoder. `build_world_model` builds, `checkpoints.loading.load_world_model` loads."""

    def __init__(self, settings: ModelSettings, world: WorldSettings) -> None:
        super().__init__()
        self.settings, self.world = settings, world
        with _building("model.unet", "UNetSpatioTemporalConditionModel"):
            self.unet = FrameLevelUNet(**settings.unet)
            set_norm_groups(self.unet, settings.norm_groups)
        self.unet.frame_level = settings.frame_level
        self.unet.all_tokens = settings.temporal_token == "all"
        with _building("model.vae", "AutoencoderKLTemporalDecoder"):
            self.vae = build_vae(settings.vae, settings.norm_groups)
        if settings.image:
            with _building("model.image", "CLIPVisionConfig"):
                self.image_encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**settings.image))
        with _building("model.text", "CLIPTextConfig"):
            self.text_encoder = CLIPTextModelWithProjection(CLIPTextConfig(**settings.text))
        self.action_encoder = ActionEncoder(settings.action_dim, settings.token_dim)
        self._tokenizer: CLIPTokenizer | None = None
        self._text_cache: dict[str, torch.Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the UNet's weights are."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the UNet's weights."""
        return self.unet.conv_in.weight.dtype

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """Loaded on first use."""
        if self._tokenizer is None:
            from persistworld_cli.config.bundled import resolve_path

            self._tokenizer = load_tokenizer(str(resolve_path(self.settings.tokenizer)))
        return self._tokenizer

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one frame, cameras stacked."""
        channels, rows, columns = latent_size(self.vae.config, self.world.height, self.world.width)
        return channels, len(self.world.cameras) * rows, columns

    @property
    def decode_rows(self) -> int:
        """Images that go through the decoder at once."""
        return max(DECODE_ROWS, DECODE_PIXELS // (self.world.height * self.world.width))

    def drop_passthrough(self) -> None:
        """Remove the unused image encoder."""
        if hasattr(self, PASSTHROUGH):
            delattr(self, PASSTHROUGH)

    def cast_for_sampling(self, sampling: SamplingSettings) -> WorldModel:
        """Cast the weights to the type of ``sampling`` (``sampling.cast = "model"``); returns itself.

        SVD's VAE overflows in float16: it stays in float32, as with diffusers' ``force_upcast``.
        """
        dtype = sampling_dtype(sampling)
        self.to(dtype)
        if dtype is torch.float16:
            self.vae.float()
        return self

    def check_data(self, latent: tuple[int, ...], numbers: int) -> None:
        """Raise PersistWorldError for data of another preset: other latents (C, h, w), or poses of other width."""
        world, width = self.world, self.settings.action_dim
        if tuple(latent) != self.latent_shape:
            cameras = f"{len(world.cameras)} cameras of {world.height}x{world.width}"
            what = f"latents are {tuple(latent)} per frame, this preset's model takes {self.latent_shape} ({cameras})"
            fix = "use the preset that the dataset was extracted with (--preset), or extract it with this one"
        elif numbers != width:
            what = f"poses have {numbers} numbers, this preset's model takes {width}"
            fix = f"set model.action_dim = {numbers} (weights of another width do not fit), or use another dataset"
        else:
            return
        raise PersistWorldError(f"the dataset's {what}", where="world.dataset and the preset's [model]", fix=fix)

    # -- images -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @stage("encoding")
    def encode_frames(self, frames_u8: torch.Tensor) -> torch.Tensor:
        """uint8 images (N, V, H, W, 3) to latents (N, C, h, w), float32."""
        return encode_images(self.vae, frames_u8, self.device, self.settings.posterior)

    @torch.no_grad()
    @stage("decoding")
    def decode_latents(self, latents: torch.Tensor, chunk: int = 0) -> torch.Tensor:
        """Latents (N, C, h, w) or (B, N, C, h, w) to images (..., V, 3, H, W) in [0, 1].

        An item's rows are ordered camera by camera and decoded in runs of `chunk` (0: all frames of one camera).
        """
        batched = latents if latents.ndim == 5 else latents[None]
        b, n = batched.shape[:2]
        v = len(self.world.cameras)
        split = unstack_cameras(batched.flatten(0, 1), v).unflatten(0, (b, n))
        flat = split.transpose(1, 2).flatten(0, 2)  # (B * V * N, C, h1, w): item, camera, frame
        chunk = chunk or n
        if (v * n) % chunk == 0:
            images = decode(self.vae, flat, chunk, max(1, self.decode_rows // chunk))
        else:
            images = torch.cat([decode(self.vae, item, chunk) for item in flat.split(v * n)])
        images = images.float().unflatten(0, (b, v, n)).transpose(1, 2)
        images = (images / 2 + 0.5).clamp(0, 1)
        return images if latents.ndim == 5 else images[0]

    def draw(self, latents: torch.Tensor, sampling: SamplingSettings) -> torch.Tensor:
        """`decode_latents` with the chunk size and type of ``sampling``."""
        with small_products(self.device, getattr(torch, sampling.decode_dtype), self.vae.dtype):
            return self.decode_latents(latents, sampling.decode_chunk)

    # -- conditioning ---------------------------------------------------------------------------------------------

    def text_embeds(self, texts: list[str], *, grad: bool = False) -> torch.Tensor:
        """Embeddings (B, E) of instructions; cached unless `grad`."""
        unknown = sorted({t for t in texts if grad or t not in self._text_cache})
        if unknown:
            ids, mask = (part.to(self.device, non_blocking=True) for part in tokenize(self.tokenizer, unknown))
            with torch.set_grad_enabled(grad):
                made = self.text_encoder(input_ids=ids, attention_mask=mask).text_embeds
            if grad:
                return made[[unknown.index(t) for t in texts]]
            self._text_cache.update(zip(unknown, made, strict=True))
        return torch.stack([self._text_cache[t] for t in texts])

    def forget_texts(self) -> None:
        """Forget embeddings: the text encoder's weights have changed."""
        self._text_cache.clear()

    def tokens(self, actions: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        """Conditioning tokens (B, N, T) of normalised actions (B, N, D) and text embeddings (B, E)."""
        actions = actions.to(self.action_encoder.dtype)
        return self.action_encoder(actions, text if self.settings.text_cond else None)

    # -- the network ----------------------------------------------------------------------------------------------

    @stage("network")
    def network(self, x: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Raw output F (B, L, C, h, w) for noisy frames x (B, L, C, h, w) at levels sigma (B,), in x's type.

        Without autocast the network computes in the type of its weights, whatever x has; noise levels keep their type.
        """
        settings, dtype = self.settings, self.dtype
        scale = precondition(sigma)
        frames = torch.cat([condition.history, scale.c_in.view(-1, 1, 1, 1, 1) * x], dim=1)
        current = condition.current / self.vae.config.scaling_factor
        still = current[:, None].repeat(1, frames.shape[1], 1, 1, 1)
        if settings.history_cond_zero:
            still[:, : condition.history.shape[1]] = 0
        ids = (settings.fps_id, settings.motion_bucket_id, condition.noise_aug)
        out: Any = self.unet(
            torch.cat([frames, still], dim=2).to(dtype),
            scale.c_noise,
            condition.tokens.to(dtype),
            added_time_ids=torch.cat([x.new_full((x.shape[0], 1), value) for value in ids], dim=1),
            return_dict=False,
        )
        return out[0][:, condition.history.shape[1] :].to(x.dtype)

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Clean prediction D = c_skip x + c_out F, (B, L, C, h, w), at levels sigma (B,)."""
        scale = precondition(sigma.view(-1, 1, 1, 1, 1))
        return scale.c_skip * x + scale.c_out * self.network(x, sigma, condition)

    def denoise_guided(
        self, x: torch.Tensor, sigma: torch.Tensor, condition: Condition, guidance: float
    ) -> torch.Tensor:
        """`denoise` with classifier-free guidance whose weight rises over the L frames from 1 to `guidance`."""
        if guidance == 1.0:
            return self.denoise(x, sigma, condition)
        weight = torch.linspace(1, guidance, x.shape[1], device=x.device, dtype=x.dtype).view(1, -1, 1, 1, 1)
        both = Condition(
            history=condition.history.repeat(2, 1, 1, 1, 1),
            current=condition.current.repeat(2, 1, 1, 1),
            tokens=torch.cat([torch.zeros_like(condition.tokens), condition.tokens]),
            noise_aug=condition.noise_aug,
        )
        without, given = self.denoise(x.repeat(2, 1, 1, 1, 1), sigma.repeat(2), both).chunk(2)
        return without + weight * (given - without)


def sampling_dtype(sampling: SamplingSettings) -> torch.dtype:
    """The type of the weights while sampling: float32 with autocast."""
    dtype: torch.dtype = getattr(torch, sampling.dtype)
    return dtype if sampling.cast == "model" else torch.float32


def _building(table: str, kind: str) -> AbstractContextManager[None]:
    """Turn what a library raises for impossible sizes into one error that names their table."""
    fix = f"give arguments of {kind}; lists in brackets: [32, 64, 128]; widths are multiples of 32"
    return reading("no such network can be built", table, fix)


def build_world_model(settings: ModelSettings, world: WorldSettings) -> WorldModel:
    """A model with random weights (under `torch.device("meta")`: shapes only)."""
    return WorldModel(settings, world)
