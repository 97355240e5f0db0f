"""Save tensors atomically, as safetensors or by `torch.save`, with notes in the same file.

Notes are short texts that stay with the file when it is renamed or copied. A safetensors file has them in its header.
`torch.save` writes a zip archive, to which a record is added that torch's readers (weights-only and strict ones too)
ignore.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from persistworld_cli.files import whole_file
from persistworld_cli.read_files import as_object, parse_json, reading

_FORMAT = {"format": "pt"}  # of every safetensors file of tensors
_RECORD = "persistworld/notes.json"  # in a torch archive, under the archive's own folder
_NO_NOTES: Mapping[str, str] = {}


def save_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, str] = _NO_NOTES, fix: str = ""
) -> None:
    """Write a safetensors file, the same bytes every time.

    Args:
        path: the file.
        tensors: contiguous; of any device.
        notes: name -> text.
        fix: what to do about a full disk.

    Raises:
        CannotWrite: the disk is full or not writable.
    """
    with whole_file(path, fix) as partial:
        try:
            save_file(dict(tensors), str(partial), metadata={**_FORMAT, **notes})
        except SafetensorError as error:  # raised for every file error
            number = re.search(r"\(os error (\d+)\)", str(error))
            raise (OSError(int(number[1]), str(error)) if number else OSError(str(error))) from error
        _sort_header(partial)


def _sort_header(path: Path) -> None:
    """Sort a safetensors file's notes: the library's order changes from run to run."""
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"{path}: the header has grown from {size} to {len(text)} bytes")
        file.seek(8)
        file.write(text.ljust(size))


def save_torch(path: Path, value: Any, notes: Mapping[str, str] = _NO_NOTES, fix: str = "") -> None:
    """Write what `torch.save` writes. Arguments and errors as for `save_safetensors`."""
    with whole_file(path, fix) as partial, partial.open("w+b") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # raised by its archive's end, on top of the file's own error
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        if notes:
            file.flush()
            with zipfile.ZipFile(file, "a") as archive:
                folder = archive.namelist()[0].partition("/")[0]
                record = zipfile.ZipInfo(f"{folder}/{_RECORD}")  # dated 1980: the same bytes every time
                archive.writestr(record, json.dumps(dict(notes), sort_keys=True))


def read_notes(path: Path) -> dict[str, str]:
    """The notes of a weights file, without reading a tensor; {} if it has none.

    Raises:
        PersistWorldError: it cannot be read, or its notes are damaged.
    """
    with reading("the file is damaged", path, "fetch it again"):
        with path.open("rb") as file:
            head = file.read(9)
            if head.startswith(b"PK") and zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    records = [name for name in archive.namelist() if name.endswith(f"/{_RECORD}")]
                    found = as_object(parse_json(archive.read(records[0]).decode())) if records else {}
                return {str(key): str(text) for key, text in found.items()}
        if head[8:9] == b"{":
            with safe_open(str(path), "pt") as opened:
                return {name: text for name, text in (opened.metadata() or {}).items() if name not in _FORMAT}
    return {}  # pickles from before 2020 cannot have notes; the file's reader refuses other files
