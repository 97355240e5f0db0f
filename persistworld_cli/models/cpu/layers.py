"""Shared by the faster blocks: change a module's class but not its weights, and get a layer's weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Classes = Mapping[type, type]


def swap_classes(model: nn.Module, classes: Classes) -> None:
    """Change the class of every module from a key of ``classes`` to its value (subclasses of keys stay)."""
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]


@contextmanager
def swapped_classes(model: nn.Module, classes: Classes) -> Iterator[None]:
    """`swap_classes` while the block runs."""
    own = [(module, type(module)) for module in model.modules() if type(module) in classes]
    swap_classes(model, classes)
    try:
        yield
    finally:
        for module, kind in own:
            module.__class__ = kind


def effective_weight(layer: nn.Module) -> torch.Tensor | None:
    """The weight of a layer that is a single product; None for other layers.

    Layers that are not plain torch layers have a method of this name.
    """
    own: Any = layer
    weight: torch.Tensor | None = None
    if hasattr(own, "effective_weight"):
        weight = own.effective_weight()
    elif isinstance(own, nn.Linear | nn.Conv2d | nn.Conv3d):
        weight = own.weight
    return weight
