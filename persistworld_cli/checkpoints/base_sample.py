"""A few numbers of the weights that an adapter was trained on, saved with it: other weights of the same size are told.

An adapter is a change of one model's weights. Another model of the same shapes takes it without an error and predicts
something else. Eight of the UNet's matrices, 32 numbers each, are read; rounding to bf16 or fp16 moves them by 0.4%.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch
from torch import nn

from persistworld_cli.read_files import as_object, parse_json, reading

NOTE = "base_sample"  # in an adapter's notes: JSON, name of a matrix -> numbers
SAME = 0.02  # largest relative difference of the same weights
_MATRICES, _NUMBERS = 8, 32

BaseSample = Mapping[str, list[float]]


def sample_base(unet: nn.Module) -> BaseSample:
    """Numbers of a network's own weights, adapted by peft or not, evenly spread over its matrices and kernels."""
    own = ((name, p) for name, p in unet.named_parameters() if p.ndim > 1 and ".lora_" not in name)
    matrices = {name.replace(".base_layer.", "."): p for name, p in own}
    names = sorted(matrices)[:: math.ceil(len(matrices) / _MATRICES)]
    return {name: _numbers(matrices[name]) for name in names}


def _numbers(weight: torch.Tensor) -> list[float]:
    flat = weight.detach().flatten()
    numbers: list[float] = flat[:: math.ceil(len(flat) / _NUMBERS)].float().tolist()
    return numbers


def base_note(sample: BaseSample) -> dict[str, str]:
    """A sample as an adapter's note; {} for none."""
    return {NOTE: json.dumps(dict(sample))} if sample else {}


def noted_base(notes: Mapping[str, str], where: str) -> BaseSample:
    """The sample in an adapter's notes; {} if there is none. Raises PersistWorldError if it is damaged."""
    if NOTE not in notes:
        return {}
    with reading("the adapter is damaged", where, "fetch it again"):
        sample = as_object(parse_json(notes[NOTE]))
        return {str(name): [float(value) for value in values] for name, values in sample.items()}


def difference(unet: nn.Module, sample: BaseSample) -> float:
    """Relative difference of a network's numbers from a sample, inf if the network has other matrices."""
    matrices = dict(unet.named_parameters())
    apart = size = 0.0
    for name, then in sample.items():
        now = _numbers(matrices[name]) if name in matrices else []
        if len(now) != len(then):
            return math.inf
        apart += sum((a - b) ** 2 for a, b in zip(now, then, strict=True))
        size += sum(b**2 for b in then)
    return math.sqrt(apart / size) if size else 0.0
