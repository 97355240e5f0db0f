"""diffusers' ResNet blocks, as this model configures them, in fewer passes over memory on a CPU.

If the kernels support a block's weights, each convolution normalises and activates as it reads, and adds embedding and
residual as it writes (`native.convolve`); a temporal block's blend with its input becomes a gain on what it adds.
Otherwise normalisation and activation are one step (`native.norm`). There are no kernels for GPUs or for trainable
weights.

Shapes: B items, T frames, C channels, h, w image.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D, SpatioTemporalResBlock, TemporalResnetBlock
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional

from persistworld_cli.models.cpu.layers import effective_weight
from persistworld_cli.models.cpu.native.convolve import block_conv, fits, upsampled_conv
from persistworld_cli.models.cpu.native.norm import fits as norm_fits
from persistworld_cli.models.cpu.native.norm import norm_silu


def _weights(block: Any, x: torch.Tensor) -> list[torch.Tensor] | None:
    """Weights of a block's two convolutions; None unless the kernels support both for x (N, C, ...)."""
    learns = torch.is_grad_enabled() and (block.norm1.weight.requires_grad or block.norm2.weight.requires_grad)
    if learns or x.device.type != "cpu" or (block.training and block.dropout.p):
        return None
    weights = [effective_weight(conv) for conv in (block.conv1, block.conv2)]
    fitting = [w for w in weights if w is not None and fits(x, w)]
    return fitting if len(fitting) == len(weights) else None


def _conv(x: torch.Tensor, conv: Any, weight: torch.Tensor, norm: nn.GroupNorm, *rest: Any) -> torch.Tensor:
    out: torch.Tensor = block_conv(x, weight, conv.bias, norm.weight, norm.bias, norm.num_groups, norm.eps, *rest)
    return out


def _small(x: torch.Tensor) -> torch.Tensor:
    """x in autocast's type, if autocast is on."""
    return x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x


def _activated(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """silu(norm(x))."""
    return norm_silu(x, norm) if norm_fits(x, norm) else functional.silu(norm(x))


class FirstConv(nn.Conv2d):
    """A network's first convolution: on a CPU, later layers keep the memory layout that it sets."""

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ordered = x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x
        return super()._conv_forward(ordered, weight, bias)


class FusedResnet(ResnetBlock2D):
    """A block of images."""

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None = None, *args: Any) -> torch.Tensor:
        """(N, C, h, w) with embeddings (N, width) to (N, C', h, w)."""
        x, added = input_tensor, None
        if self.time_emb_proj is not None:
            added = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        rest = x
        if self.conv_shortcut is not None:
            copied = self.training and x.device.type == "cuda"  # as diffusers, for the strides of gradients
            rest = self.conv_shortcut(x.contiguous() if copied else x)
        if weights := _weights(self, x):
            x, rest = _small(x), _small(rest)
            hidden = _conv(x, self.conv1, weights[0], self.norm1, added)
            return _conv(hidden, self.conv2, weights[1], self.norm2, None, None, rest)
        hidden = self.conv1(_activated(self.norm1, x))
        hidden = hidden if added is None else hidden.add_(added[:, :, None, None])
        return self.conv2(self.dropout(_activated(self.norm2, hidden))).add_(rest)


class FusedTemporalResnet(TemporalResnetBlock):
    """A block over frames."""

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
        """(B, C, T, h, w) with embeddings (B, T, width) to (B, C', T, h, w)."""
        x = input_tensor
        if not norm_fits(x, self.norm1):
            return super().forward(x, temb)
        x = x.flatten(3)  # as rows: what is written to below must not be a view, or its gradient is copied
        hidden = self.conv1(_activated(self.norm1, x))
        if self.time_emb_proj is not None:
            hidden = hidden.add_(self.time_emb_proj(self.nonlinearity(temb)).transpose(1, 2)[..., None])
        hidden = self.conv2(self.dropout(_activated(self.norm2, hidden)))
        hidden = hidden.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))
        return hidden.unflatten(3, input_tensor.shape[3:])


class FusedVideoResnet(SpatioTemporalResBlock):
    """A block of images, then one over their frames, blended."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor | None = None,
        image_only_indicator: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B * T, C, h, w) with embeddings (B * T, width) and (B, T) to (B * T, C', h, w)."""
        block, mixer = self.temporal_res_block, self.time_mixer
        learns = torch.is_grad_enabled() and mixer.mix_factor.requires_grad
        weights = None if learns else _weights(block, hidden_states)
        if (
            image_only_indicator is None
            or not weights
            or block.conv_shortcut is not None
            or _small(hidden_states[:1]).dtype is not torch.float32
        ):
            return super().forward(hidden_states, temb, image_only_indicator)
        images = self.spatial_res_block(hidden_states, temb)
        frames, (channels, height) = image_only_indicator.shape[-1], images.shape[1:3]
        x = images.permute(0, 2, 3, 1).reshape(-1, frames, height * images.shape[3], channels).permute(0, 3, 1, 2)
        added = None if temb is None else block.time_emb_proj(block.nonlinearity(temb))
        hidden = _conv(x, block.conv1, weights[0], block.norm1, added)
        share = mixer.get_alpha(image_only_indicator, 3).reshape(-1).expand(len(images))  # of the images
        gain = share if mixer.switch_spatial_to_temporal_mix else 1 - share
        out = _conv(hidden, block.conv2, weights[1], block.norm2, None, gain, x)  # a x + (1 - a)(x + f) = x + (1 - a) f
        return out.permute(0, 2, 3, 1).reshape(len(images), height, -1, channels).permute(0, 3, 1, 2)


class FusedUpsample(Upsample2D):
    """Upsampling by 2, then a convolution, which reads the pixels without a copy."""

    def forward(self, hidden_states: torch.Tensor, output_size: Any = None, *args: Any) -> torch.Tensor:
        """(N, C, h, w) to (N, C', 2 h, 2 w)."""
        weight = effective_weight(self.conv)
        if weight is None or not fits(hidden_states, weight):
            return super().forward(hidden_states, output_size, *args)
        out: torch.Tensor = upsampled_conv(_small(hidden_states), weight, self.conv.bias)
        return out


RESNETS: dict[type, type] = {
    Upsample2D: FusedUpsample,
    ResnetBlock2D: FusedResnet,
    TemporalResnetBlock: FusedTemporalResnet,
    SpatioTemporalResBlock: FusedVideoResnet,
}
