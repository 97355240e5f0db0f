"""The one way into this folder: diffusers' blocks with the same weights and numbers (to rounding), faster on a CPU.

The rest of the package imports this file alone. Without it every model computes the same by diffusers' own blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import UNetSpatioTemporalConditionModel
from torch import nn

from persistworld_cli.models.cpu.attention import FewTokens, diffusers_attention
from persistworld_cli.models.cpu.fused_blocks import DIFFUSERS, FUSED
from persistworld_cli.models.cpu.fused_resnets import FirstConv
from persistworld_cli.models.cpu.layers import swap_classes, swapped_classes
from persistworld_cli.models.cpu.lora_layers import FUSED_LORA
from persistworld_cli.models.cpu.native.build import available


def speed_up(model: nn.Module) -> None:
    """Let a model's blocks, attention and LoRA layers compute by this folder; again where adapters were added."""
    if isinstance(model, UNetSpatioTemporalConditionModel):
        model.set_attn_processor(FewTokens())
    for name, module in model.named_modules():
        if name.endswith("conv_in") and type(module) is nn.Conv2d:
            module.__class__ = FirstConv
    swap_classes(model, {**FUSED, **FUSED_LORA})


@contextmanager
def as_diffusers(unet: UNetSpatioTemporalConditionModel) -> Iterator[None]:
    """diffusers' own blocks and attention for a block of code: to count or to measure against."""
    with diffusers_attention(unet), swapped_classes(unet, DIFFUSERS):
        yield


def kernels_in_use() -> bool:
    """Whether this machine runs the C++ kernels."""
    return available()
