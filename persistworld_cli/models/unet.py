"""SVD's spatio-temporal UNet with one conditioning token per frame (Ctrl-World, arXiv 2510.10125).

Shapes: B batch, N frames, C channels, h, w latent size, T token width.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from persistworld_cli.models.cpu.hook import speed_up
from persistworld_cli.models.layers import fold_temporal_convs


class FrameLevelUNet(UNetSpatioTemporalConditionModel):
    """diffusers' UNet, except for the tokens that each frame's cross-attention sees.

    diffusers repeats an item's whole token sequence for every frame: row (b, n) of the repeated context holds all N
    tokens of item b. Frame-level conditioning keeps only token n in that row. Temporal cross-attention takes the
    context of each item's first frame: token 0 (as measured on Ctrl-World). With `all_tokens` only the spatial blocks
    are reduced to token n, and temporal cross-attention sees all tokens.
    """

    frame_level, all_tokens = True, False

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        widths, heads = self.config["block_out_channels"], self.config["num_attention_heads"]
        for width, count in zip(widths, [heads] * len(widths) if isinstance(heads, int) else heads, strict=True):
            if width % count:
                raise ValueError(f"{width} channels (block_out_channels) in {count} heads (num_attention_heads)")
        fold_temporal_convs(self)
        speed_up(self)
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            if getattr(block, "has_cross_attention", False):
                for module in (block, *(m for m in block.modules() if isinstance(m, BasicTransformerBlock))):
                    module.register_forward_pre_hook(self._keep_own_token, with_kwargs=True)

    def _keep_own_token(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.frame_level or isinstance(module, BasicTransformerBlock) != self.all_tokens:
            return None
        # a spatial block's third argument where gradients are checkpointed
        context = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]  # (B * N, N, T)
        own = context.unflatten(0, (-1, context.shape[1])).diagonal(dim1=1, dim2=2)  # (B, T, N)
        return args[:2], {**kwargs, "encoder_hidden_states": own.transpose(1, 2).flatten(0, 1).unsqueeze(1)}

    def forward(
        self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """See diffusers. `sample` (B, N, 2C, h, w), `encoder_hidden_states` (B, N, T) frame-level, else (B, any, T)."""
        if self.frame_level and encoder_hidden_states.shape[1] != sample.shape[1]:
            raise ValueError(f"{encoder_hidden_states.shape[1]} tokens for {sample.shape[1]} frames")
        return super().forward(sample, timestep, encoder_hidden_states, *args, **kwargs)
