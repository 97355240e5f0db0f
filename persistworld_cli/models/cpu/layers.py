"""What the faster blocks share: swapping a module's class under its weights, and asking a layer for its weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Classes = Mapping[type, type]


def swap_classes(model: nn.Module, classes: Classes) -> None:
    """Give every module whose class is a key that key's value as its class (subclasses of a key are left alone)."""
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]


@contextmanager
def swapped_classes(model: nn.Module, classes: Classes) -> Iterator[None]:
    """`swap_classes` for a block of code."""
    own = [(module, type(module)) for module in model.modules() if type(module) in classes]
    swap_classes(model, classes)
    try:
        yield
    finally:
        for module, kind in own:
            module.__class__ = kind


def effective_weight(layer: nn.Module) -> torch.Tensor | None:
    """The one weight that a layer multiplies by; None where there is more to it than one product.

    A layer that is not simply torch's answers through a method of this name.
    """
    own: Any = layer
    weight: torch.Tensor | None = None
    if hasattr(own, "effective_weight"):
        weight = own.effective_weight()
    elif isinstance(own, nn.Linear | nn.Conv2d | nn.Conv3d):
        weight = own.weight
    return weight
