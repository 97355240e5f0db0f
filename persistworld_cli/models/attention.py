"""Attention for this model's two special cases: one context token, and very short sequences.

Every token sequence that is cross-attended has length 1 (method.md section 3): softmax over one key is 1, so the result
is `to_out(to_v(token))`, the same at every pixel, and is computed once a row. Temporal attention runs over 11 frames at
every pixel: a plain product is faster there than a fused kernel made for long sequences (CPU, bfloat16: one training
step of the tiny model 1.3 s instead of 1.7 s).
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from torch.nn import functional

SHORT = 256  # longest sequence taken by the plain product


class FewTokens:
    """A diffusers attention processor with the same numbers (to rounding) as its default one."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(rows, tokens, width) to the same shape; no mask and no time embedding is ever given by these blocks."""
        if attention_mask is not None:
            raise ValueError("this model's blocks use no attention mask")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        value = attn.to_v(context)
        if context.shape[1] == 1:
            return self._out(attn, value).expand(-1, hidden_states.shape[1], -1)

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(value)
        if k.shape[-2] <= SHORT and q.device.type == "cpu":
            weights = ((q * attn.scale) @ k.transpose(-1, -2)).softmax(dim=-1)
            out = weights.to(v.dtype) @ v
        else:
            out = functional.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        return self._out(attn, out.transpose(1, 2).flatten(2))

    @staticmethod
    def _out(attn: Attention, x: torch.Tensor) -> torch.Tensor:
        x = attn.to_out[1](attn.to_out[0](x))
        return x / attn.rescale_output_factor
