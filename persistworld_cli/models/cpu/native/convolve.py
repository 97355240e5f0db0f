"""Convolutions of a ResNet block with norm, activation and residual, by the C++ kernels (`winograd.cpp`, `norm.cpp`).

    out = residual + gain (conv(silu(group_norm(x))) + bias + added)

Equal to torch's to rounding: Winograd's filtering has about five times a direct convolution's error in float32 (1e-6 of
an output of size 1).

Shapes: spatial x (N, C, H, W), temporal x (B, C, T, S), both with channels last in memory.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch.nn import functional

from persistworld_cli.models.cpu.native.build import available
from persistworld_cli.models.cpu.native.calls import (
    LANES,
    derived,
    native,
    operation,
    packed,
    plain,
    pointer,
    require_channels,
    sizes,
)
from persistworld_cli.models.cpu.native.norm import affine, norm_silu_backward

MOST = 512  # channels; transformed weights take four times the memory
FEWEST = 256  # pixels times images for which the call is not what takes the time
TILES = (3, 4)  # outputs computed together in a direction, F(3, 3) and F(4, 3)


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "scale", "shift", "u", "bias", "added", "gain", "residual", "out")),
        *((name, ctypes.c_int64) for name in ("n", "h", "w", "cin", "cout", "activate", "halved")),
    ]


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a convolution of stride 1 by `weight` (C', C, 3, 3) or (C', C, 3, 1[, 1]) can go to the kernels.

    Not for a trainable weight: there is no gradient for it.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if tuple(weight.shape[2:]) not in ((3, 3), (3, 1), (3, 1, 1)) or (torch.is_grad_enabled() and weight.requires_grad):
        return False
    wide = all(n % LANES == 0 and n <= MOST for n in weight.shape[:2])
    return wide and x.numel() >= FEWEST * x.shape[1] and available()


def tile(height: int, width: int, taps: int) -> int:
    """The one of `TILES` that needs fewer products."""
    if taps == 1:
        return min(TILES, key=lambda m: -(-height // m) * (m + 2))
    return min(TILES, key=lambda m: -(-height // m) * -(-width // m) * (m + 2) ** 2)


def block_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    groups: int = 1,
    eps: float = 1e-6,
    added: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """One convolution, of which `fits` holds, to x's type and layout.

    Args:
        x: (N, C, H, W) or (B, C, T, S).
        weight: (C', C, 3, 3) or (C', C, 3, 1[, 1]); padded by one zero at each end.
        bias: (C',).
        norm_weight, norm_bias: (C,); group normalisation and SiLU before, neither without them.
        groups, eps: of the normalisation, over (C / groups, H, W) or (C / groups, T, S).
        added: (N, C') or (B * T, C'), to every pixel of an image.
        gain: (N,) or (B * T,), on everything but the residual.
        residual: as the result.
    """
    out: torch.Tensor = _block_conv(x, weight, bias, norm_weight, norm_bias, groups, eps, added, gain, residual)
    return out


@operation
def _block_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    groups: int,
    eps: float,
    added: torch.Tensor | None,
    gain: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    x, dtype = x.contiguous(memory_format=torch.channels_last), x.dtype
    n, cin, height, width = x.shape
    cout, taps = weight.shape[0], weight.shape[3]
    out = torch.empty((n, cout, height, width), dtype=dtype, memory_format=torch.channels_last)
    scale = shift = None
    if norm_weight is not None and norm_bias is not None:
        scale, shift, _ = affine(x, norm_weight, norm_bias, groups, eps)
    size = tile(height, width, taps)
    rest = None if residual is None else residual.to(dtype).contiguous(memory_format=torch.channels_last)
    kept = [x, scale, shift, _packed(weight, cin, size), plain(bias), plain(added), plain(gain), rest, out]
    call = _Call(*(pointer(t) for t in kept), n, height, width, cin, cout, int(norm_weight is not None), 0)
    native().pw_convolve(ctypes.byref(call), size, int(taps == 1), int(dtype is torch.bfloat16))
    return out


@_block_conv.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, _, norm_weight, norm_bias, ctx.groups, ctx.eps, _, gain, _ = inputs
    ctx.save_for_backward(x, weight, norm_weight, norm_bias, gain)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """To x, `added` and `residual`; everything else is frozen."""
    x, weight, norm_weight, norm_bias, gain = ctx.saved_tensors
    spatial = weight.shape[3] == 3
    by_image = (grad.shape[0], 1, 1, 1) if spatial else (grad.shape[0], 1, grad.shape[2], 1)
    inner = grad if gain is None else grad * gain.view(by_image).to(grad)
    grad_x = grad_added = None
    if ctx.needs_input_grad[0]:
        grad_x = input_gradient(inner, weight)
        if norm_weight is not None:
            own = x.contiguous(memory_format=torch.channels_last)
            grad_x = norm_silu_backward(grad_x, own, norm_weight, norm_bias, ctx.groups, ctx.eps)
    if ctx.needs_input_grad[7]:
        grad_added = inner.sum((2, 3)) if spatial else inner.sum(3).transpose(1, 2).flatten(0, 1)
    return grad_x, None, None, None, None, None, None, grad_added, None, grad if ctx.needs_input_grad[9] else None


_block_conv.register_autograd(_backward, setup_context=_keep)


def input_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient to x of a convolution by `weight`, from that to its result: one by (C, C', ...), taps in reverse."""
    turned = derived(weight, "turned", lambda w: w.detach().flip(2, 3).transpose(0, 1).contiguous())
    return block_conv(grad, turned)


@operation
def upsampled_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A 3 x 3 convolution, of which `fits` holds, of x (N, C, H, W) with each pixel repeated: (N, C', 2 H, 2 W)."""
    x, dtype = x.contiguous(memory_format=torch.channels_last), x.dtype
    n, cin, height, width = x.shape
    cout, height, width = weight.shape[0], 2 * height, 2 * width
    out = torch.empty((n, cout, height, width), dtype=dtype, memory_format=torch.channels_last)
    size = tile(height, width, 3)
    kept = [x, None, None, _packed(weight, cin, size), plain(bias), None, None, None, out]
    call = _Call(*(pointer(t) for t in kept), n, height, width, cin, cout, 0, 1)
    native().pw_convolve(ctypes.byref(call), size, 0, int(dtype is torch.bfloat16))
    return out


@upsampled_conv.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    shape = (x.shape[0], weight.shape[0], 2 * x.shape[2], 2 * x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _keep_upsampled(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _upsampled_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """To x: four pixels' gradients are summed."""
    (weight,) = ctx.saved_tensors
    return 4 * functional.avg_pool2d(input_gradient(grad, weight), 2), None, None


upsampled_conv.register_autograd(_upsampled_backward, setup_context=_keep_upsampled)


def _packed(weight: torch.Tensor, channels: int, size: int) -> torch.Tensor:
    """Transformed weights in the kernels' order, for an input of so many channels."""
    require_channels(weight, channels)
    cout, cin, _, taps = weight.shape[:4]
    points = (size + 2) ** 2 if taps == 3 else size + 2
    return packed(weight, size, points * cin * cout, "pw_pack", *sizes(cout, cin), taps, size)
