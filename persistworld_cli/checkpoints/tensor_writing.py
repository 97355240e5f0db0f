"""Tensors into files, whole or not at all: what `torch.save` writes, and safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from persistworld_cli.checkpoints.notes import FORMAT, add_record, sort_header
from persistworld_cli.files import whole_file

NO_NOTES: Mapping[str, str] = {}


def save_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, str] = NO_NOTES, fix: str = ""
) -> None:
    """Write a safetensors file, the same bytes every time.

    Args:
        path: the file.
        tensors: contiguous; of any device.
        notes: what it says of itself (`notes`).
        fix: what to do about a full disk.

    Raises:
        CannotWrite: the disk is full or closed to us.
    """
    with whole_file(path, fix) as partial:
        try:
            save_file(dict(tensors), str(partial), metadata={**FORMAT, **notes})
        except SafetensorError as error:  # what it makes of every error of the file
            number = re.search(r"\(os error (\d+)\)", str(error))
            raise (OSError(int(number[1]), str(error)) if number else OSError(str(error))) from error
        sort_header(partial)


def save_torch(path: Path, value: Any, notes: Mapping[str, str] = NO_NOTES, fix: str = "") -> None:
    """What `torch.save` writes. Arguments and errors as for `save_safetensors`."""
    with whole_file(path, fix) as partial, partial.open("w+b") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # raised by its archive's end, on top of the file's own error
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        add_record(file, notes)
