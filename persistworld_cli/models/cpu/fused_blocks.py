"""diffusers' spatio-temporal blocks with fewer passes over memory: a small network moves as much as it multiplies.

- Images keep their channels last through the whole network, so that a convolution, a transformer and a temporal
  convolution each read them without reordering (diffusers' transformer ends with a copy to channels first).
- Temporal blocks leave their activations (item, frame, pixel, channel): only queries, keys and values are rearranged
  pixel by pixel.
- Cross-attention to one token is one addition, without its norm. The temporal blocks' token is projected once per item,
  not once per pixel.
- Two branches are blended in one pass.

Shapes: B items, T frames, S pixels, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.resnet import AlphaBlender
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import nn

from persistworld_cli.models.cpu.attention import across_frames
from persistworld_cli.models.cpu.fused_resnets import RESNETS, FirstConv
from persistworld_cli.models.cpu.layers import effective_weight
from persistworld_cli.models.cpu.native import feed_forward as native_ff
from persistworld_cli.models.cpu.native import gate as native_gate


class FusedBlender(AlphaBlender):
    """a x + (1 - a) y, in one pass."""

    def forward(
        self, x_spatial: torch.Tensor, x_temporal: torch.Tensor, image_only_indicator: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Both (..., C) or (B, C, T, h, w), to the same shape."""
        if x_spatial.dtype is not x_temporal.dtype:
            return super().forward(x_spatial, x_temporal, image_only_indicator)
        alpha = self.get_alpha(image_only_indicator, x_spatial.ndim).to(x_spatial.dtype)
        ends = (x_spatial, x_temporal) if self.switch_spatial_to_temporal_mix else (x_temporal, x_spatial)
        return torch.lerp(*ends, alpha)


def _cross(block: Any, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
    """x (rows, tokens, C) plus its cross-attention to (rows, N, width): for one token, the norm is not needed."""
    if block.attn2 is None or context is None:
        return x
    query = x if context.shape[1] == 1 else block.norm2(x)
    added: torch.Tensor = block.attn2(query, encoder_hidden_states=context)
    return x + added


def _feed_forward(ff: Any, norm: nn.LayerNorm, x: torch.Tensor, residual: bool) -> torch.Tensor:
    """[x +] ff(norm(x)); all or only its gate in one pass, if there is a kernel for it."""
    gated, dropout, last = ff.net
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        w1, w2 = effective_weight(gated.proj), effective_weight(last)
        if w1 is not None and w2 is not None and native_ff.fits(x, w1, w2):
            out: torch.Tensor = native_ff.feed_forward(
                x, norm.weight, norm.bias, norm.eps, w1, gated.proj.bias, w2, last.bias, residual
            )
            return out
    both = gated.proj(norm(x))
    if native_gate.fits(both):
        hidden = native_gate.gate(both)
    else:
        value, gate = both.chunk(2, dim=-1)
        hidden = value * gated.gelu(gate)
    wide: torch.Tensor = last(dropout(hidden))
    return x + wide if residual else wide


class FusedSpatialBlock(BasicTransformerBlock):
    """Attention over an image's pixels, its token, feed-forward."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        *args: Any,
    ) -> torch.Tensor:
        """(B * T, S, C) with tokens (B * T, N, width), to the same shape."""
        x = hidden_states + self.attn1(self.norm1(hidden_states))
        x = _cross(self, x, encoder_hidden_states)
        return _feed_forward(self.ff, self.norm3, x, residual=True)


class FusedTemporalBlock(TemporalBasicTransformerBlock):
    """Attention over a pixel's frames, the item's token, feed-forward."""

    def forward(
        self, hidden_states: torch.Tensor, num_frames: int, encoder_hidden_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B * T, S, C) with tokens (B, N, width), to the same shape."""
        shape = hidden_states.shape
        x = _feed_forward(self.ff_in, self.norm_in, hidden_states, self.is_res).unflatten(0, (-1, num_frames))
        x = (x + across_frames(self.attn1, self.norm1(x))).flatten(1, 2)  # (B, T * S, C)
        x = _cross(self, x, encoder_hidden_states)
        return _feed_forward(self.ff, self.norm3, x, self.is_res).reshape(shape)


class FusedTransformer(TransformerSpatioTemporalModel):
    """Spatial and temporal blocks in turn, blended, around a residual."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        image_only_indicator: torch.Tensor,
        return_dict: bool = True,
    ) -> tuple[torch.Tensor]:
        """(B * T, C, h, w) with tokens (B * T, N, width), to the same shape in a tuple."""
        height, frames = hidden_states.shape[2], image_only_indicator.shape[-1]
        context = encoder_hidden_states.unflatten(0, (-1, frames))[:, 0]
        x = self.proj_in(self.norm(hidden_states).flatten(2).transpose(1, 2))
        place = self.time_proj(torch.arange(frames, device=x.device)).to(x.dtype)
        place = self.time_pos_embed(place).repeat(len(context), 1)[:, None]
        for spatial, temporal in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(spatial, x, None, encoder_hidden_states)
            else:
                x = spatial(x, encoder_hidden_states=encoder_hidden_states)
            mixed = temporal(x + place, num_frames=frames, encoder_hidden_states=context)
            x = self.time_mixer(x_spatial=x, x_temporal=mixed, image_only_indicator=image_only_indicator)
        images = self.proj_out(x).transpose(1, 2).unflatten(2, (height, -1))
        if images.device.type != "cpu":  # elsewhere diffusers' layout stays
            images = images.contiguous()
        return (images + hidden_states,)


FUSED: dict[type, type] = {
    AlphaBlender: FusedBlender,
    BasicTransformerBlock: FusedSpatialBlock,
    TemporalBasicTransformerBlock: FusedTemporalBlock,
    TransformerSpatioTemporalModel: FusedTransformer,
    **RESNETS,
}

# To count or to measure against
DIFFUSERS: dict[type, type] = {FirstConv: nn.Conv2d, **{fused: own for own, fused in FUSED.items()}}
