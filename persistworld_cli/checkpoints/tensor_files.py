"""Tensors in files: what is there without reading it, then one tensor after another, never a whole file in memory.

No code is run: safetensors hold none, and pickles are read by torch's `weights_only` reader, which refuses all but
tensors and plain values.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import pickle
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open

from persistworld_cli.checkpoints.notes import read_notes
from persistworld_cli.checkpoints.sources import WeightSource
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.read_files import reading
from persistworld_cli.torch_files import load_torch, require_stored

# A mapped file's pages count as this process's memory until they are let go of: so much of it may be mapped at once.
WINDOW = 16 << 20  # bytes
# Buffers that transformers before 4.31 wrote; models of today hold them outside the state dict and refuse them.
DROPPED = "position_ids"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_POLICY = ("switch", "old")  # where a post-training's state holds the sampling policy


class Info(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class _File(Protocol):
    """One file: names with what they hold, and the tensors, each valid only until the next one is asked for."""

    info: dict[str, Info]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]: ...


class WeightFiles:
    """All tensors of a checkpoint under their names there (with the prefix that the source gives a file).

    Args:
        sources: where they lie; a name in several of them counts once, the last one.

    Attributes:
        info: name -> shape and type.
        metadata: what the files say of themselves (`notes`).

    Raises:
        PersistWorldError: a damaged file, one that holds no state dict, or a pickle with code in it.
    """

    def __init__(self, *sources: WeightSource) -> None:
        self.info: dict[str, Info] = {}
        self.metadata: dict[str, str] = {}
        self._home: dict[str, tuple[int, str]] = {}  # name -> (file, name there)
        self._files: list[_File] = []
        for path, prefix in (entry for source in sources for entry in source.files):
            file = _open(path)
            self.metadata |= read_notes(path)
            for name, info in file.info.items():
                if not name.endswith(DROPPED):
                    self.info[prefix + name] = info
                    self._home[prefix + name] = (len(self._files), name)
            self._files.append(file)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: info.shape for name, info in self.info.items()}

    def rename(self, names: Mapping[str, str]) -> None:
        """Keep only the tensors in `names` (name now -> name from now on)."""
        self.info = {new: self.info[old] for old, new in names.items()}
        self._home = {new: self._home[old] for old, new in names.items()}

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor with its name, file by file; on the CPU, to be copied before the next one is asked for."""
        for number, file in enumerate(self._files):
            own = {there: name for name, (home, there) in self._home.items() if home == number}
            for there, tensor in file.read(own):
                yield own[there], tensor

    def load(self) -> dict[str, torch.Tensor]:
        """All tensors at once, copied: for what is small."""
        return {name: tensor.clone() for name, tensor in self.read()}


def fill(targets: Mapping[str, torch.Tensor], files: WeightFiles) -> None:
    """Copy every tensor of `files` into the one of its name in `targets`, whose type and device it takes."""
    with torch.no_grad():
        for name, tensor in files.read():
            targets[name].copy_(tensor)


class _Safetensors:
    """A safetensors file; opened anew every `WINDOW` bytes, which lets go of what was mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(str(path), "pt") as file:
            self.order: list[str] = list(file.offset_keys())
            self.info = {name: self._info(file, name) for name in self.order}

    @staticmethod
    def _info(file: Any, name: str) -> Info:
        part = file.get_slice(name)
        dtype = _DTYPES.get(part.get_dtype())
        return Info(tuple(part.get_shape()), file.get_tensor(name).dtype if dtype is None else dtype)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """In the file's order."""
        wanted = set(names)
        todo = [name for name in self.order if name in wanted]
        while todo:
            with safe_open(str(self.path), "pt") as file:
                mapped = 0
                while todo and mapped < WINDOW:
                    name = todo.pop(0)
                    tensor = file.get_tensor(name)
                    mapped += tensor.nbytes
                    yield name, tensor
                    del tensor


class _Torch:
    """What `torch.save` wrote; memory-mapped but for the format of before 2020."""

    def __init__(self, path: Path, *, mapped: bool) -> None:
        self.mapped = mapped
        self.path = path
        content = load_torch(path, mapped=mapped)
        self.tensors: dict[str, torch.Tensor] = _state_dict(content, path)
        self.info = {name: Info(tuple(t.shape), t.dtype) for name, t in self.tensors.items()}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """In the file's order."""
        wanted = set(names)
        for name, tensor in self.tensors.items():
            if name in wanted:
                with reading("the file is damaged", self.path, "fetch it again"):
                    require_stored(name, tensor)
                yield name, tensor
                if self.mapped:
                    _let_go(tensor)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _let_go(tensor: torch.Tensor) -> None:
    """Tell Linux that a mapped tensor's pages, which nobody wrote to, can go; other systems decide by themselves."""
    if sys.platform != "linux":
        return
    storage = tensor.untyped_storage()
    begin = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = storage.data_ptr() + storage.nbytes() - begin
    _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), ctypes.c_int(mmap.MADV_DONTNEED))


def _state_dict(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle: a state dict, one under "state_dict", or a post-training's sampling policy."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    elif isinstance(content, dict) and "step" in content:
        return _policy(content, path)
    if not isinstance(content, dict) or not content:
        raise PersistWorldError("the file holds no state dict", where=str(path), fix="give a file of named tensors")
    _require_tensors(content, path)
    return content


def _require_tensors(content: dict[Any, Any], path: Path) -> None:
    other = [name for name, value in content.items() if not (isinstance(name, str) and torch.is_tensor(value))]
    if other:
        raise PersistWorldError(
            f"no state dict: {len(other)} of its {len(content)} entries are no tensors (first: {other[0]})",
            where=str(path),
            fix="give a file of named tensors",
        )


def _policy(content: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """The sampling policy of a post-training's state under the names of a PEFT folder."""
    for key in _POLICY:
        if not isinstance(content.get(key), dict):
            raise PersistWorldError(
                "this is the saved state of a training, to resume from",
                where=str(path),
                fix="its weights lie in the run's folder under weights/",
            )
        content = content[key]
    _require_tensors(content, path)
    names = {name: name.replace("unet.", "base_model.model.", 1) for name in content if name.startswith("unet.")}
    return {names.get(name, name): tensor for name, tensor in content.items()}


def _damage(error: Exception) -> str:
    """What is wrong with a file, in few words: most often that its end is missing."""
    said = str(error).splitlines()[0].partition(". ")[0] if str(error) else ""
    cut = not said or any(mark in said for mark in ("not fully covered", "invalid header length", "header too small"))
    return "its end is missing" if cut else said


def _open(path: Path) -> _File:
    """A file by what its first bytes say, not by its name.

    Raises:
        PersistWorldError: as `WeightFiles`.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise PersistWorldError(f"cannot be read: {error.strerror}", where=str(path), fix="fetch it again") from error
    try:
        if head.startswith(b"PK"):
            if not zipfile.is_zipfile(path):  # its table of contents stands at the end
                raise EOFError
            return _Torch(path, mapped=True)
        if head.startswith(b"\x80"):
            return _Torch(path, mapped=False)
        if head[8:9] == b"{" or (head and path.suffix == ".safetensors"):
            return _Safetensors(path)
    except pickle.UnpicklingError as error:
        raise PersistWorldError(
            "the file holds more than tensors (a pickle that could run code) and was not opened",
            where=str(path),
            fix="get a plain state dict, or safetensors",
        ) from error
    except PersistWorldError:
        raise
    except Exception as error:  # safetensors, torch, zipfile and pickle share no base class
        raise PersistWorldError(
            f"the file is damaged: {_damage(error)}", where=str(path), fix="fetch it again"
        ) from error
    what, fix = f"not a weights file: it begins with {head[:16]!r}", "give safetensors or what torch.save wrote"
    if not head:
        what, fix = "the file is empty", "fetch it again"
    if head.startswith(b"version https://git-lfs"):
        what, fix = "a git-lfs pointer, not the weights", "fetch them: git lfs pull, or hf download"
    raise PersistWorldError(what, where=str(path), fix=fix)
