"""What a weights file says of itself: short texts that travel inside the file, whatever it is called and copied to.

A safetensors file has a place for them in its header. What `torch.save` writes is a zip archive: a record of our own is
added to it, which torch's readers, weights-only and strict ones among them, never look at. See `tensor_writing`.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from safetensors import safe_open

from persistworld_cli.read_files import as_object, parse_json, reading

FORMAT = {"format": "pt"}  # of every safetensors file of tensors
_RECORD = "persistworld/notes.json"  # in a torch archive, under the archive's own folder


def sort_header(path: Path) -> None:
    """Put a safetensors file's texts in order: the library writes them in one that changes from run to run."""
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"{path}: the header has grown from {size} to {len(text)} bytes")
        file.seek(8)
        file.write(text.ljust(size))


def add_record(file: BinaryIO, notes: Mapping[str, str]) -> None:
    """Add notes to what `torch.save` wrote to a file that is open for reading and writing (``w+b``)."""
    if not notes:
        return
    file.flush()
    with zipfile.ZipFile(file, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        record = zipfile.ZipInfo(f"{folder}/{_RECORD}")  # dated 1980: the same bytes every time
        archive.writestr(record, json.dumps(dict(notes), sort_keys=True))


def read_notes(path: Path) -> dict[str, str]:
    """The notes of a weights file, without reading a tensor; {} where it has none.

    Raises:
        PersistWorldError: it cannot be read, or its notes are damaged.
    """
    with reading("the file is damaged", path, "fetch it again"):
        with path.open("rb") as file:
            head = file.read(9)
            if head.startswith(b"PK") and zipfile.is_zipfile(file):
                return _of_archive(file)
        if head[8:9] == b"{":
            with safe_open(str(path), "pt") as opened:
                return {name: text for name, text in (opened.metadata() or {}).items() if name not in FORMAT}
    return {}  # pickles of before 2020 have no place for notes; what is no weights file is refused by its reader


def _of_archive(file: BinaryIO) -> dict[str, str]:
    with zipfile.ZipFile(file) as archive:
        name = next((name for name in archive.namelist() if name.endswith(f"/{_RECORD}")), "")
        told = as_object(parse_json(archive.read(name).decode())) if name else {}
    return {str(key): str(text) for key, text in told.items()}
