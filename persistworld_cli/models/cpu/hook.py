"""The only entry to this package: diffusers' blocks with the same weights and numbers (to rounding), faster on a CPU.

Other packages import only this module. Without it every model computes the same with diffusers' own blocks.
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
from persistworld_cli.models.cpu.native.build import available, obstacle


def speed_up(model: nn.Module) -> None:
    """Replace a model's blocks, attention and LoRA layers by this package's; call it again after adding adapters."""
    if isinstance(model, UNetSpatioTemporalConditionModel):
        model.set_attn_processor(FewTokens())
    for name, module in model.named_modules():
        if name.endswith("conv_in") and type(module) is nn.Conv2d:
            module.__class__ = FirstConv
    swap_classes(model, {**FUSED, **FUSED_LORA})


@contextmanager
def as_diffusers(unet: UNetSpatioTemporalConditionModel) -> Iterator[None]:
    """Use diffusers' own blocks and attention inside the block: to count FLOPs or to compare speed."""
    with diffusers_attention(unet), swapped_classes(unet, DIFFUSERS):
        yield


def kernels_in_use() -> bool:
    """Whether this machine runs the C++ kernels."""
    return available()


def kernels() -> str:
    """``used``, or why this machine does not run the C++ kernels."""
    return "used" if available() else f"not used: {obstacle() or 'they do not compile'}"
