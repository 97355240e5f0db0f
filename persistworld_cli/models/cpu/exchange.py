"""Modules that compute in another way with the same weights: the class is exchanged, parameters and names stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

Classes = Mapping[type, type]


def exchange(model: nn.Module, classes: Classes) -> None:
    """Give every module whose class is a key that key's value as its class (subclasses of a key are left alone)."""
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]


@contextmanager
def exchanged(model: nn.Module, classes: Classes) -> Iterator[None]:
    """The same for a block; afterwards every module has its own class again."""
    own = [(module, type(module)) for module in model.modules() if type(module) in classes]
    exchange(model, classes)
    try:
        yield
    finally:
        for module, kind in own:
            module.__class__ = kind
