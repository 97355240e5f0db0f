"""Layout of a latent file, from its header alone and without torch: DROID has 287,000 such files.

Legend: T frames, C latent channels, h, w latent size of one camera.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from persistworld_cli.data.metadata.annotations import Unreadable
from persistworld_cli.read_files import reason

_STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "DoubleStorage": "float64",
    "BFloat16Storage": "bfloat16",
}
_LOCAL = struct.Struct("<26xHH")  # of a zip member's own header: lengths of its name and of its extra field


_Header = tuple[tuple[int, ...], str, int]  # shape, name of the type, and where the numbers begin (row-major)


class Layout(NamedTuple):
    """Position of the numbers in a latent file: frame t begins at ``offset + t * frame_bytes``."""

    suffix: str
    offset: int
    length: int  # T
    frame: tuple[int, int, int]  # C, h, w of one camera
    dtype: str

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame."""
        return math.prod(self.frame) * np.dtype(self.dtype).itemsize


def read_layout(path: Path) -> Layout:
    """Layout of a ``.npy``, or of a ``.pt`` that holds one tensor, from its header alone.

    Raises:
        Unreadable: no such file, damaged, cut off, or not float16 / float32 frames (T, C, h, w).
    """
    try:
        header = _npy(path) if path.suffix == ".npy" else _pt(path)
    except Exception as error:  # a damaged header raises many kinds
        raise Unreadable("unreadable latents", path, reason(error), "latent-unreadable") from error
    if header is None:
        fix = "load the file with torch.load and write it again with torch.save"
        raise Unreadable("latents are in torch's format from before version 1.6", path, "", "latent-old", fix)
    shape, dtype, offset = header
    if len(shape) != 4 or min(shape) < 1:
        raise Unreadable("latents are not of shape (T, C, h, w)", path, shape, "latent-shape")
    if dtype not in ("float16", "float32"):
        fix = "save them as float32, or extract again"
        raise Unreadable("latents are neither float16 nor float32", path, dtype, "latent-type", fix)
    return Layout(path.suffix, offset, shape[0], (shape[1], shape[2], shape[3]), dtype)


def _npy(path: Path) -> _Header:
    """Header of a ``.npy``; the file must be as long as the header says."""
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        begin, size = file.tell(), file.seek(0, io.SEEK_END)
    if dtype.hasobject or fortran or dtype.byteorder == ">":
        raise ValueError("not a plain row-major array of little-endian numbers")
    if size - begin < int(np.prod(shape)) * dtype.itemsize:
        raise ValueError("the file is cut off")
    return shape, dtype.name, begin


def _pt(path: Path) -> _Header | None:
    """torch's zip archive: ``data.pkl`` says how the tensor lies in the member ``data/0``; None for its old format."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(2) == b"\x80\x02":  # a bare pickle: torch's format before 1.6
                return None
        raise ValueError("not a tensor file, or truncated")
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: name for name in archive.namelist()}
        if "data.pkl" not in members:
            raise ValueError("an archive without a tensor")
        try:
            tensor = _Shapes(io.BytesIO(archive.read(members["data.pkl"]))).load()
        except (pickle.UnpicklingError, EOFError, IndexError, TypeError) as error:
            raise ValueError(f"not a single tensor ({error})") from error
        if not isinstance(tensor, _Tensor):
            raise ValueError("not a single tensor")
        member = archive.getinfo(members[f"data/{tensor.key}"])
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError("its numbers are compressed")
    itemsize = 2 if tensor.dtype.endswith("16") else 8 if tensor.dtype == "float64" else 4
    if member.file_size < (tensor.begin + int(np.prod(tensor.shape))) * itemsize:
        raise ValueError("the archive holds fewer numbers than its shape says")
    with path.open("rb") as file:
        file.seek(member.header_offset)
        lengths = _LOCAL.unpack(file.read(_LOCAL.size))
    return tensor.shape, tensor.dtype, member.header_offset + _LOCAL.size + sum(lengths) + tensor.begin * itemsize


@dataclass(frozen=True)
class _Tensor:
    """A tensor as its pickle describes it."""

    key: str
    dtype: str
    begin: int
    shape: tuple[int, ...]


class _Shapes(pickle.Unpickler):
    """Reads a tensor's pickle with harmless stand-ins: nothing that the file names is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        """The three names that a saved tensor uses."""
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        raise pickle.UnpicklingError(f"it holds {module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        """(member, type) of a storage."""
        return str(pid[2]), str(pid[1])


def _describe(
    storage: tuple[str, str], begin: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> _Tensor:
    """Stand-in for torch's function that builds a tensor."""
    rows = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    if any(have != want for have, want, size in zip(stride, rows, shape, strict=True) if size > 1):
        raise pickle.UnpicklingError("a tensor that is not row-major")
    return _Tensor(storage[0], storage[1], begin, tuple(shape))
