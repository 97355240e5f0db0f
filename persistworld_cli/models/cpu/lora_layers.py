"""peft's LoRA layers (Hu et al., arXiv 2106.09685, section 4.1) with fewer passes over activations.

    y = W' x + b,  W' = W + s B A
    dx = W'^T dy,  dA = s (B^T dy) x^T,  dB = s dy (A x)^T

peft casts the input to the adapter's float32 (which autocast undoes), multiplies the low-rank output by the scale and
adds it to a copy of the layer's own: four passes over the largest activations of the network. Here:

- In float32 on a CPU the layer is one product by W', forward and backward. W' is small beside the activations and kept
  until W, A or B is written to. In bfloat16 W' would lose what A and B add to it.
- Otherwise the low-rank product is added in place while it is computed.
- While a policy only samples (`merging`), W' is the layer's weight in every type; a GPU makes it once per update.
- If the layer holds W rounded to bfloat16 (`PolicySwitch`), W' is made from W in float32 (`exact`) and rounded once.

Shapes: x (..., C), W (C', C), A (r, C), B (C', r); for convolutions x (N, C, H, W) with channels last in memory,
W (C', C, 3, k[, 1]), A (r, C, 3, k[, 1]), B (C', r, 1, 1[, 1]), k 1 or 3.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Conv3d, Linear
from torch import nn
from torch.nn import functional

from persistworld_cli.models.cpu.native import convolve
from persistworld_cli.models.cpu.native import linear as native_linear
from persistworld_cli.models.cpu.native import outer as native_outer
from persistworld_cli.models.cpu.native.calls import derived

KEPT = 2**20  # numbers of a merged weight on a CPU; kernels keep up to four times as many


class _FusedLora:
    """Shared by all kinds of layers; peft handles several adapters at once, dropout and LoRA variants."""

    merging = False  # whether the active policy only samples

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As peft's forward, to rounding."""
        name = None if args or kwargs else self._adapter()
        if name is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        weight = self.effective_weight()
        if weight is not None:
            out: torch.Tensor = self._by_weight(x, weight)
        elif self._exact(x):
            out = self._merged(x, self.base_layer.weight, self.base_layer.bias, *self._factors(name))
        else:
            out = self._added(self.base_layer(x), self.lora_A[name](x), self.lora_B[name], self.scaling[name])
        return out

    def effective_weight(self: Any) -> torch.Tensor | None:
        """W' (W while adapters are off) while a policy only samples, else None.

        In bfloat16, policies that are compared must be computed alike, so that equal weights give equal numbers.
        """
        if not self.merging or torch.is_grad_enabled() or self.merged:
            return None
        own: torch.Tensor = self.base_layer.weight
        if self.disable_adapters:
            return own
        name = self._adapter()
        if name is None:
            return None
        down, up, scale = self._factors(name)
        exact = getattr(self, "exact", None)  # W in float32, if the layer holds it rounded
        return merged_weight(own, down, up, scale, exact)

    def _adapter(self: Any) -> str | None:
        """The adapter's name if one plain adapter is active, else None."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or self.merged or self.disable_adapters or active[0] in self.lora_variant:
            return None
        return active[0] if isinstance(self.lora_dropout[active[0]], nn.Identity) else None

    def _factors(self: Any, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A, B and s."""
        return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]

    def _exact(self: Any, x: torch.Tensor) -> bool:
        """Whether the product is computed in float32 on a CPU."""
        both = x.dtype is torch.float32 and self.base_layer.weight.dtype is torch.float32
        return both and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


class FusedLoraLinear(_FusedLora, Linear):
    """x W' + b, over rows: what is written to must not be a view, or its gradient is copied for each product."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., C) to (..., C')."""
        if args or kwargs:
            return super().forward(x, *args, **kwargs)
        return super().forward(x.flatten(0, -2)).view(*x.shape[:-1], -1)

    def _by_weight(self: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _product(x, weight, self.base_layer.bias)

    def _merged(self, *arguments: Any) -> torch.Tensor:
        out: torch.Tensor = _MergedLinear.apply(*arguments)
        return out

    def _added(self, out: torch.Tensor, low: torch.Tensor, up: Any, scale: float) -> torch.Tensor:
        return out.addmm_(low, up.weight.to(low.dtype).t(), alpha=scale)


class _FusedLoraConv(_FusedLora):
    def _by_weight(self: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base_layer._conv_forward(x, weight, self.base_layer.bias)
        return out

    def _exact(self: Any, x: torch.Tensor) -> bool:
        """Also whether the kernels have such a convolution: of stride 1, to the same size."""
        conv = self.base_layer
        unit = {*conv.stride, *conv.dilation, conv.groups} == {1} and conv.padding_mode == "zeros"
        same_size = unit and conv.padding == tuple(taps // 2 for taps in conv.kernel_size)
        return same_size and super()._exact(x) and convolve.fits(x.flatten(3), conv.weight)

    def _merged(self: Any, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        out: torch.Tensor = _MergedConv.apply(x.flatten(3), *arguments)
        return out if x.ndim == 4 else out.unflatten(3, x.shape[3:])

    def _added(self, out: torch.Tensor, low: torch.Tensor, up: Any, scale: float) -> torch.Tensor:
        if not out.movedim(1, -1).is_contiguous():
            return torch.add(out, up(low), alpha=scale)
        added: torch.Tensor = _AddLowRank.apply(out, low, up.weight.flatten(1).to(low.dtype), scale)
        return added


class FusedLoraConv2d(_FusedLoraConv, Conv2d):
    """A two-dimensional convolution."""


class FusedLoraConv3d(_FusedLoraConv, Conv3d):
    """A three-dimensional convolution."""


FUSED_LORA: dict[type, type] = {Linear: FusedLoraLinear, Conv2d: FusedLoraConv2d, Conv3d: FusedLoraConv3d}


@torch.no_grad()
def merged_weight(
    own: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float, exact: torch.Tensor | None = None
) -> torch.Tensor:
    """W + s B A, of W's shape and type, never computed in autocast's type; from ``exact``, if W is rounded.

    It is kept until one of them is written to, on a CPU with what kernels made of it and where it is not large.
    """
    source = own if exact is None else exact

    def make(down: torch.Tensor) -> torch.Tensor:
        kind = own.device.type
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            merged = torch.addmm(source.flatten(1), up.flatten(1), down.flatten(1), alpha=scale)
            return merged.to(own.dtype).view_as(own)

    if own.device.type == "cpu" and own.numel() > KEPT:
        return make(down)
    stamps = (scale, own.data_ptr(), own._version, up.data_ptr(), up._version)
    return derived(down, ("merged", *stamps), make)


class _MergedLinear(torch.autograd.Function):
    """x (n, C) by W'; gradients to x, A and B."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, own: Any, bias: Any, down: Any, up: Any, scale: float) -> torch.Tensor:
        ctx.save_for_backward(x, own, down, up)
        ctx.scale = scale
        return _product(x, merged_weight(own, down, up, scale), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, own, down, up = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad, native_linear.transposed(merged_weight(own, down, up, ctx.scale)))
        of_down = ctx.scale * _outer(_product(grad, native_linear.transposed(up)), x)
        return grad_x, None, None, of_down, ctx.scale * _outer(_product(x, down), grad).t(), None


class _MergedConv(torch.autograd.Function):
    """A convolution by W', of which `convolve.fits` holds; gradients to x, A and B."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, own: Any, bias: Any, down: Any, up: Any, scale: float) -> torch.Tensor:
        ctx.save_for_backward(x, own, down, up)
        ctx.scale = scale
        return convolve.block_conv(x, merged_weight(own, down, up, scale), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, own, down, up = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = convolve.input_gradient(grad, merged_weight(own, down, up, ctx.scale))
        taps = down.detach().flatten(3)
        padding = (1, taps.shape[3] // 2)
        low = convolve.block_conv(x, taps) if convolve.fits(x, taps) else functional.conv2d(x, taps, padding=padding)
        rows, last = _rows(grad), grad.movedim(1, -1).shape[:-1]
        of_low = ctx.scale * _product(rows, up.detach().flatten(1).t().contiguous()).view(*last, -1)
        of_down = native_outer.conv_weight_gradient(of_low, x.movedim(1, -1), (taps.shape[2], taps.shape[3]))
        of_up = ctx.scale * _outer(_rows(low), rows).t()
        return grad_x, None, None, of_down.view_as(down), of_up.reshape(up.shape), None


class _AddLowRank(torch.autograd.Function):
    """out += s low B' over the channels of out (N, C', ...) and low (N, r, ...), both with channels last in memory."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, low: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.mark_dirty(out)
        ctx.save_for_backward(low, up)
        ctx.scale = scale
        _rows(out).addmm_(_rows(low), up.t(), alpha=scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low, up = ctx.saved_tensors
        of_rows = _rows(grad)
        of_low = (ctx.scale * (of_rows @ up)).view(*low.movedim(1, -1).shape).movedim(-1, 1)
        return grad, of_low, ctx.scale * (of_rows.t() @ _rows(low)), None


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W' + b."""
    by: Any = native_linear.linear if native_linear.fits(x, weight) else functional.linear
    out: torch.Tensor = by(x, weight, bias)
    return out


def _outer(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """t' x."""
    return native_outer.outer(t, x) if native_outer.fits(t, x) else t.t() @ x


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(N, C, ...) as (rows, C); a view where channels are last."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])
