"""SVD's spatio-temporal UNet with one conditioning token a frame (Ctrl-World, arXiv 2510.10125).

Shapes: B batch, N frames, C channels, h, w latent size, T token width.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch import nn

from persistworld_cli.models.cpu.hook import show_all_tokens, speed_up_unet


class FrameLevelUNet(UNetSpatioTemporalConditionModel):
    """diffusers' UNet, its blocks computed leanly; only what each frame's cross-attention sees differs.

    diffusers repeats an item's whole token sequence for every frame: row (b, n) of the repeated context holds all N
    tokens of item b. Frame-level conditioning keeps token n alone there. The blocks' temporal cross-attention takes the
    context of each item's first frame, which then is token 0 (as measured on Ctrl-World).
    """

    frame_level: bool = True

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        speed_up_unet(self)
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            if getattr(block, "has_cross_attention", False):
                block.register_forward_pre_hook(self._own_token, with_kwargs=True)

    def _own_token(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        context_bnnt = kwargs["encoder_hidden_states"]
        num_frames = context_bnnt.shape[1]
        if not self.frame_level or num_frames != kwargs["image_only_indicator"].shape[1]:
            return None
        own = context_bnnt.unflatten(0, (-1, num_frames)).diagonal(dim1=1, dim2=2)  # (B, T, N)
        return args, {**kwargs, "encoder_hidden_states": own.transpose(1, 2).flatten(0, 1).unsqueeze(1)}

    def show_all_tokens(self) -> None:
        """Let temporal cross-attention see every frame's token of the item, not only the first frame's."""
        show_all_tokens(self)

    def forward(
        self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """See diffusers. `sample` (B, N, 2C, h, w), `encoder_hidden_states` (B, N, T) frame-level, else (B, any, T)."""
        if self.frame_level and encoder_hidden_states.shape[1] != sample.shape[1]:
            raise ValueError(f"{encoder_hidden_states.shape[1]} tokens for {sample.shape[1]} frames")
        return super().forward(sample, timestep, encoder_hidden_states, *args, **kwargs)
