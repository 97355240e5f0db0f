"""The one way into this folder: diffusers' blocks with the same weights and numbers (to rounding), faster on a CPU.

The rest of the package imports this file alone. Without it models are diffusers' own, save that temporal attention then
sees the first frame's token only (`show_all_tokens`), and that a CPU's bfloat16 gradients of temporal convolutions are
NaN (`convolutions`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import nn

from persistworld_cli.models.cpu.attention import FewTokens, diffusers_attention
from persistworld_cli.models.cpu.convolutions import fold_temporal_convs, put_channels_last
from persistworld_cli.models.cpu.exchange import exchanged
from persistworld_cli.models.cpu.lean_blocks import DIFFUSERS, LeanTransformer, make_blocks_lean
from persistworld_cli.models.cpu.lean_lora import make_lean
from persistworld_cli.models.cpu.linears import make_linears_fast
from persistworld_cli.models.cpu.native.build import available


def speed_up_unet(unet: UNetSpatioTemporalConditionModel) -> None:
    """Let a UNet's attention, blocks, convolutions and linear layers compute by this folder."""
    unet.set_attn_processor(FewTokens())
    make_blocks_lean(unet)
    fold_temporal_convs(unet)
    put_channels_last(unet)
    make_linears_fast(unet)


def speed_up_vae(vae: AutoencoderKLTemporalDecoder) -> None:
    """Let a VAE's blocks and convolutions compute by this folder."""
    make_blocks_lean(vae)
    fold_temporal_convs(vae)
    put_channels_last(vae)


def speed_up_adapters(model: nn.Module) -> None:
    """Let peft's LoRA layers of a model compute by this folder."""
    make_lean(model)


def show_all_tokens(unet: nn.Module) -> None:
    """Let temporal cross-attention see every frame's token of the item, not only the first frame's."""
    for module in unet.modules():
        if isinstance(module, LeanTransformer):
            module.all_tokens = True


@contextmanager
def as_diffusers(unet: UNetSpatioTemporalConditionModel) -> Iterator[None]:
    """diffusers' own blocks and attention for a block of code: to count or to measure against."""
    with diffusers_attention(unet), exchanged(unet, DIFFUSERS):
        yield


def kernels_in_use() -> bool:
    """Whether this machine runs the C++ kernels."""
    return available()
