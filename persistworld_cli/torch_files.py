"""The one way to read what `torch.save` wrote: no code is run, and no bytes are taken for numbers that are none."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch


def load_torch(path: Path, *, mapped: bool = False) -> Any:
    """What `torch.save` wrote, on the CPU, without running code that a file may hold; call it inside `reading`.

    Args:
        path: the file.
        mapped: map the numbers instead of reading them (the zip format alone).

    Raises:
        ValueError: an archive whose members are compressed: torch would take the compressed bytes for numbers.
        Exception: whatever torch raises for a damaged file, or one with more than tensors and plain values.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("its numbers are compressed, which torch does not read")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def require_stored(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError for a tensor with more numbers than its file holds (a stride of 0 repeats one for ever)."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ValueError(f"'{name}' is no plain tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"'{name}' of shape {tuple(tensor.shape)} is not stored whole")
