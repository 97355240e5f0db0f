"""Reading files of `torch.save` safely: no code runs, and every tensor is fully stored."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch


def load_torch(path: Path, *, mapped: bool = False) -> Any:
    """A file of `torch.save`, on the CPU, without running code in it; call it inside `reading`.

    Args:
        path: the file.
        mapped: memory-map the tensors instead of reading them (zip format only).

    Raises:
        ValueError: a compressed archive, whose bytes torch would read as numbers.
        Exception: whatever torch raises for a damaged file, or one with other objects than tensors and plain values.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("its tensors are compressed, which torch does not read")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def require_stored(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError for a tensor with more elements than its file holds (a stride of 0 repeats one)."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ValueError(f"'{name}' is not a plain tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"'{name}' of shape {tuple(tensor.shape)} is not fully stored")
