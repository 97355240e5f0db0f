"""peft's LoRA layers without the passes over memory that one adapter at a time does not need.

peft's forward casts the input to the adapter's float32 (which autocast undoes), multiplies the low-rank output by the
scale and adds it to a copy of the layer's own: four passes over activations that are the largest of the network (the
tiny preset's post-training spends a fifth of an update on them). Here the low-rank product is added as it is made.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Conv3d, Linear
from torch import nn

from persistworld_cli.models.exchange import exchange


class _Lean:
    """What both kinds of layers share; everything unusual is left to peft."""

    merging = False  # while nothing learns: one product with the sum of both weights, made for each call

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As peft's forward (to rounding) where one plain adapter is active."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        plain = len(active) == 1 and not (args or kwargs or self.merged or self.disable_adapters)
        if not plain or active[0] in self.lora_variant or not isinstance(self.lora_dropout[active[0]], nn.Identity):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        name = active[0]
        if self.merging and not torch.is_grad_enabled() and hasattr(self.base_layer, "compute"):
            merged: torch.Tensor = self.base_layer.compute(x, self._merged(name))
            return merged
        low = self.lora_A[name](x)
        added: torch.Tensor = self._added(self.base_layer(x), low, self.lora_B[name], self.scaling[name])
        return added

    def _merged(self: Any, name: str) -> torch.Tensor:
        """W + s B A, of W's shape."""
        down, up, own = self.lora_A[name].weight, self.lora_B[name].weight, self.base_layer.weight
        kind = own.device.type
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            sum_ = torch.addmm(own.flatten(1), up.flatten(1), down.flatten(1), alpha=self.scaling[name])
        return sum_.view_as(own)


class LeanLinear(_Lean, Linear):
    """x W' + b + s (x A') B'."""

    def _added(self, out: torch.Tensor, low: torch.Tensor, up: nn.Linear, scale: float) -> torch.Tensor:
        weight = up.weight.to(low.dtype)
        return out.view(-1, out.shape[-1]).addmm_(low.flatten(0, -2), weight.t(), alpha=scale).view_as(out)


class _LeanConv(_Lean):
    def _added(self, out: torch.Tensor, low: torch.Tensor, up: nn.Module, scale: float) -> torch.Tensor:
        return torch.add(out, up(low), alpha=scale)


class LeanConv2d(_LeanConv, Conv2d):
    """The same for a two-dimensional convolution."""


class LeanConv3d(_LeanConv, Conv3d):
    """The same for a three-dimensional convolution."""


LEAN: dict[type, type] = {Linear: LeanLinear, Conv2d: LeanConv2d, Conv3d: LeanConv3d}


def make_lean(model: nn.Module) -> None:
    """Let peft's LoRA layers of a model compute leanly; parameters and names stay."""
    exchange(model, LEAN)
