"""Tensors into files, whole or not at all: what `torch.save` writes, and safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from persistworld_cli.files import whole_file


def save_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None, fix: str = ""
) -> None:
    """Write a safetensors file.

    Args:
        path: the file.
        tensors: contiguous; of any device.
        metadata: texts for its header.
        fix: what to do about a full disk.

    Raises:
        CannotWrite: the disk is full or closed to us.
    """
    with whole_file(path, fix) as partial:
        try:
            save_file(dict(tensors), str(partial), metadata=metadata)
        except SafetensorError as error:  # what it makes of every error of the file
            number = re.search(r"\(os error (\d+)\)", str(error))
            raise (OSError(int(number[1]), str(error)) if number else OSError(str(error))) from error


def save_torch(path: Path, value: Any, fix: str = "") -> None:
    """What `torch.save` writes. Arguments and errors as for `save_safetensors`."""
    with whole_file(path, fix) as partial, partial.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # raised by its archive's end, on top of the file's own error
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
