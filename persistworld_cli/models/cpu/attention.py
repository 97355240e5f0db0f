"""Attention for this model's special cases: one context token, very short sequences, and sequences along time.

Cross-attention to one token (method.md section 3) is `to_out(to_v(token))`, the same at every pixel: computed once per
row. Temporal attention runs over 11 frames at every pixel: a plain product is faster there than a fused kernel made for
long sequences (CPU, bfloat16: one training step of the tiny model 1.3 s instead of 1.7 s).

Shapes: B items, T frames, S pixels, C width, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn import functional

from persistworld_cli.models.cpu.layers import effective_weight
from persistworld_cli.models.cpu.native import attend as native_attend

SHORT = 256  # longest sequence taken by the plain product
MOST = 65_535  # sequences per call: CUDA's fused kernels put the batch on a grid's axis of this length


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale q k') v over (N, H, sequence, D)."""
    if k.shape[-2] > SHORT or q.device.type != "cpu":
        parts = zip(q.split(MOST), k.split(MOST), v.split(MOST), strict=True)
        outs = [functional.scaled_dot_product_attention(*part, scale=scale) for part in parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs)
    weights = ((q * scale) @ k.transpose(-1, -2)).softmax(dim=-1)
    return weights.to(v.dtype) @ v


def _kernel_fits(attn: Attention, q: torch.Tensor) -> bool:
    """Whether self-attention uses the kernel: not if policies are compared and one of them needs a gradient."""
    return native_attend.fits(q, attn.heads) and effective_weight(attn.to_q) is not None


def projected_out(attn: Attention, x: torch.Tensor) -> torch.Tensor:
    """The end of a diffusers attention: projection, dropout, rescaling."""
    x = attn.to_out[1](attn.to_out[0](x))
    return x if attn.rescale_output_factor == 1.0 else x / attn.rescale_output_factor


def across_frames(attn: Attention, x: torch.Tensor) -> torch.Tensor:
    """Self-attention of every pixel over its frames: (B, T, S, C) to the same shape.

    Projections do not depend on the order; only queries, keys and values are rearranged pixel by pixel.
    """

    def pixels(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (attn.heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # (B * S, H, T, D)

    q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    if _kernel_fits(attn, q):
        return projected_out(attn, native_attend.attend(q, k, v, attn.heads, attn.scale))
    q, k, v = pixels(q), pixels(k), pixels(v)
    out = attend(q, k, v, attn.scale).unflatten(0, (x.shape[0], -1))
    return projected_out(attn, out.permute(0, 3, 1, 2, 4).flatten(3))


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
            return projected_out(attn, value).expand(-1, hidden_states.shape[1], -1)

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k = attn.to_q(hidden_states), attn.to_k(context)
        if encoder_hidden_states is None and _kernel_fits(attn, q):
            return projected_out(attn, native_attend.attend(q, k, value, attn.heads, attn.scale))
        q, k, v = heads(q), heads(k), heads(value)
        return projected_out(attn, attend(q, k, v, attn.scale).transpose(1, 2).flatten(2))


@contextmanager
def diffusers_attention(unet: Any) -> Iterator[None]:
    """diffusers' own processor in the place of `FewTokens`: a query at every pixel, even for one token."""
    ours = dict(unet.attn_processors)
    unet.set_attn_processor(AttnProcessor2_0())
    try:
        yield
    finally:
        unet.set_attn_processor(ours)
