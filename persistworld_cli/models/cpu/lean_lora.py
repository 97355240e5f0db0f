"""peft's LoRA layers without the passes over memory that one adapter at a time does not need.

peft's forward casts the input to the adapter's float32 (which autocast undoes), multiplies the low-rank output by the
scale and adds it to a copy of the layer's own: four passes over activations that are the largest of the network (the
tiny preset's post-training spends a fifth of an update on them). Here the low-rank product is added as it is made; in
float32 on a CPU it is part of the layer's own weight (`merged_lora`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Conv3d, Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from persistworld_cli.models.cpu.exchange import exchange
from persistworld_cli.models.cpu.linears import product
from persistworld_cli.models.cpu.merged_lora import exact, merged_conv, merged_linear, merged_weight, rows_of
from persistworld_cli.models.cpu.native import convolve


class _Lean:
    """What both kinds of layers share; everything unusual is left to peft."""

    merging = False  # while nothing learns: one product with the sum of both weights, made for each call

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As peft's forward (to rounding) where one plain adapter is active."""
        name = None if args or kwargs else self.plain()
        if name is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if self.merging and not torch.is_grad_enabled() and hasattr(self.base_layer, "compute"):
            merged: torch.Tensor = self.base_layer.compute(x, self._merged(name))
            return merged
        if self.one_product(x):
            exactly: torch.Tensor = self.multiplied(x, name, self.base_layer.bias)
            return exactly
        return self.adapted(self.base_layer, x, name)

    def plain(self: Any) -> str | None:
        """The adapter, where it is one and an ordinary one."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or self.merged or self.disable_adapters or active[0] in self.lora_variant:
            return None
        return active[0] if isinstance(self.lora_dropout[active[0]], nn.Identity) else None

    def adapted(self: Any, own: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, name: str) -> torch.Tensor:
        """`own(x)`, and what the adapter adds to it."""
        added: torch.Tensor = self._added(own(x), self.lora_A[name](x), self.lora_B[name], self.scaling[name])
        return added

    def factors(self: Any, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A, B and their scale."""
        return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]

    def _merged(self: Any, name: str) -> torch.Tensor:
        """W + s B A, of W's shape."""
        return merged_weight(self.base_layer.weight, *self.factors(name))


class LeanLinear(_Lean, Linear):
    """x W' + b + s (x A') B'."""

    def one_product(self: Any, x: torch.Tensor) -> bool:
        """Whether it is taken as one product, also while it learns (`merged_lora`)."""
        return exact(x, self.base_layer.weight)

    def multiplied(self: Any, x: torch.Tensor, name: str, bias: torch.Tensor | None) -> torch.Tensor:
        """As one product; as rows, for the same rounding as without an adapter."""
        out = merged_linear(x.flatten(0, -2), self.base_layer.weight, bias, *self.factors(name))
        return out.view(*x.shape[:-1], -1)

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As peft's forward (to rounding); without an adapter on rows too, for the same rounding."""
        if self.disable_adapters and not (args or kwargs or self.merged):
            off: torch.Tensor = self.base_layer(x.flatten(0, -2))
            return off.view(*x.shape[:-1], -1)
        return super().forward(x, *args, **kwargs)

    def adapted(self: Any, own: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, name: str) -> torch.Tensor:
        """As rows (n, C): what is written to must not be a view, or its gradient is copied, once for each product."""
        rows = x.flatten(0, -2)
        out, low = own(rows), self.lora_A[name](rows)
        weight = self.lora_B[name].weight.to(low.dtype)
        sum_: torch.Tensor = out.addmm_(low, weight.t(), alpha=self.scaling[name])
        return sum_.view(*x.shape[:-1], -1)


class _LowRank(torch.autograd.Function):
    """out += s low B' over the channels of out (N, C', ...) and low (N, r, ...), both with channels last in memory."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, low: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.mark_dirty(out)
        ctx.save_for_backward(low, up)
        ctx.scale = scale
        rows_of(out).addmm_(rows_of(low), up.t(), alpha=scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low, up = ctx.saved_tensors
        of_rows = rows_of(grad)
        of_low = (ctx.scale * (of_rows @ up)).view(*low.movedim(1, -1).shape).movedim(-1, 1)
        return grad, of_low, ctx.scale * (of_rows.t() @ rows_of(low)), None


class _LeanConv(_Lean):
    def one_product(self: Any, x: torch.Tensor) -> bool:
        """Whether it is taken as one product, also while it learns (`merged_lora`)."""
        base = self.base_layer
        usual = getattr(base, "same_size", False) and exact(x, base.weight)
        return usual and convolve.fits(x.flatten(3), base.weight)

    def multiplied(self: Any, x: torch.Tensor, name: str, bias: torch.Tensor | None) -> torch.Tensor:
        """As one product."""
        out = merged_conv(x.flatten(3), self.base_layer.weight, bias, *self.factors(name))
        return out if x.ndim == 4 else out.unflatten(3, x.shape[3:])

    def _added(self, out: torch.Tensor, low: torch.Tensor, up: Any, scale: float) -> torch.Tensor:
        if not out.movedim(1, -1).is_contiguous():
            sum_: torch.Tensor = torch.add(out, up(low), alpha=scale)
            return sum_
        weight = up.weight.flatten(1).to(low.dtype)  # 1 x 1
        added: torch.Tensor = _LowRank.apply(out, low, weight, scale)
        return added


class LeanConv2d(_LeanConv, Conv2d):
    """The same for a two-dimensional convolution."""


class LeanConv3d(_LeanConv, Conv3d):
    """The same for a three-dimensional convolution."""


def sampling_alone(layer: Any) -> bool:
    """Whether a layer has no adapter, or one that is merged or off while nothing is compared with another policy.

    In bfloat16, policies whose predictions are compared are computed alike: equal weights give equal numbers. In
    float32 what kernels without a gradient and merged weights change is below 1e-6.
    """
    return not isinstance(layer, BaseTunerLayer) or (getattr(layer, "merging", False) and not torch.is_grad_enabled())


def weight_in_use(layer: Any) -> torch.Tensor | None:
    """The one weight that a layer multiplies by, where `sampling_alone` holds; None for an unusual adapter too."""
    own: torch.Tensor | None = None
    if not isinstance(layer, BaseTunerLayer):
        own = layer.weight
    elif sampling_alone(layer) and not layer.merged:
        tuned: Any = layer
        if tuned.disable_adapters:
            own = tuned.base_layer.weight
        elif (name := tuned.plain()) is not None:
            own = tuned._merged(name)
    return own


def without_bias(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """What a linear layer, adapted or not, gives less its bias; None where an unusual adapter is on it."""
    weight = weight_in_use(layer)
    if weight is not None:
        return product(x, weight, None)
    if not isinstance(layer, LeanLinear) or layer.merged:
        return None
    base: Any = layer.base_layer
    plainly = partial(product, weight=base.weight, bias=None)
    if layer.disable_adapters:
        return plainly(x)
    name = layer.plain()
    if name is None:
        return None
    return layer.multiplied(x, name, None) if layer.one_product(x) else layer.adapted(plainly, x, name)


LEAN: dict[type, type] = {Linear: LeanLinear, Conv2d: LeanConv2d, Conv3d: LeanConv3d}


def make_lean(model: nn.Module) -> None:
    """Let peft's LoRA layers of a model compute leanly; parameters and names stay."""
    exchange(model, LEAN)
