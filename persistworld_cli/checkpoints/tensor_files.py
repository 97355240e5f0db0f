"""Read tensors from files: names and shapes first, then one tensor after another, never a whole file in memory.

No code is run: safetensors hold none, and torch's `weights_only` reader refuses all but tensors and plain values.
"""

from __future__ import annotations

import ctypes
import mmap
import pickle
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from persistworld_cli.checkpoints.saving import read_notes
from persistworld_cli.checkpoints.sources import WeightSource
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.read_files import reading
from persistworld_cli.torch_files import load_torch, require_stored

WINDOW = 16 << 20  # bytes mapped at once: a mapped file's pages count as this process's memory until they are released
# Buffers that transformers before 4.31 saved; newer models do not have them in the state dict and refuse them.
DROPPED = "position_ids"

_POLICY = ("switch", "old")  # where a post-training's state holds the sampling policy


class Info(NamedTuple):
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Info:
        """The info of a tensor; mapped data is not read."""
        return cls(tuple(tensor.shape), tensor.dtype)


class WeightFiles:
    """All tensors of a checkpoint under their names in its files, with the file's prefix.

    Args:
        sources: their files; if several have a tensor of the same name, the last one counts.

    Attributes:
        info: name -> shape and type.
        metadata: the files' notes (`saving`).

    Raises:
        PersistWorldError: a damaged file, one that holds no state dict, or a pickle with code in it.
    """

    def __init__(self, *sources: WeightSource) -> None:
        self.info: dict[str, Info] = {}
        self.metadata: dict[str, str] = {}
        self._home: dict[str, tuple[int, str]] = {}  # name -> (file, name there)
        self._files: list[_Safetensors | _Torch] = []
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
        """Every tensor with its name, file by file; on the CPU, valid until the next one is read."""
        for number, file in enumerate(self._files):
            own = {there: name for name, (home, there) in self._home.items() if home == number}
            for there, tensor in file.read(own):
                yield own[there], tensor

    def load(self) -> dict[str, torch.Tensor]:
        """All tensors at once, copied; for small files."""
        return {name: tensor.clone() for name, tensor in self.read()}


def fill(targets: Mapping[str, torch.Tensor], files: WeightFiles) -> None:
    """Copy every tensor of `files` into the target of the same name, in the target's type and device."""
    with torch.no_grad():
        for name, tensor in files.read():
            targets[name].copy_(tensor)


class _Safetensors:
    """A safetensors file; opened again every `WINDOW` bytes, which releases what was mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(str(path), "pt") as file:
            self.order: list[str] = list(file.offset_keys())
            self.info = {name: Info.of(file.get_tensor(name)) for name in self.order}

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
    """A file of `torch.save`, memory-mapped unless it has the format used before 2020."""

    def __init__(self, path: Path, *, mapped: bool) -> None:
        self.mapped = mapped
        self.path = path
        content = load_torch(path, mapped=mapped)
        self.tensors: dict[str, torch.Tensor] = _state_dict(content, path)
        self.info = {name: Info.of(tensor) for name, tensor in self.tensors.items()}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """In the file's order."""
        wanted = set(names)
        for name, tensor in self.tensors.items():
            if name in wanted:
                with reading("the file is damaged", self.path, "fetch it again"):
                    require_stored(name, tensor)
                yield name, tensor
                if self.mapped:
                    _release(tensor)


def _release(tensor: torch.Tensor) -> None:
    """Tell Linux that a mapped tensor's pages are no longer needed; other systems decide by themselves."""
    if sys.platform != "linux":
        return
    storage = tensor.untyped_storage()
    begin = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = storage.data_ptr() + storage.nbytes() - begin
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), ctypes.c_int(mmap.MADV_DONTNEED))


def _state_dict(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle: a state dict, one under "state_dict", or a post-training's sampling policy."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    elif isinstance(content, dict) and "step" in content:
        content = _policy(content, path)
    what = "" if isinstance(content, dict) and content else "the file holds no state dict"
    other = [] if what else [k for k, value in content.items() if not (isinstance(k, str) and torch.is_tensor(value))]
    if other:
        what = f"not a state dict: {len(other)} of its {len(content)} entries are not tensors (first: {other[0]})"
    if what:
        raise PersistWorldError(what, where=str(path), fix="give a file of named tensors")
    return content


def _policy(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The sampling policy of a post-training's state under the names of a PEFT folder."""
    for key in _POLICY:
        if not isinstance(content.get(key), dict):
            raise PersistWorldError(
                "this is the saved state of a training, to resume from",
                where=str(path),
                fix="its weights are in the run's folder under weights/",
            )
        content = content[key]
    return {re.sub(r"^unet\.", "base_model.model.", str(name)): value for name, value in content.items()}


def _damage(error: Exception) -> str:
    """What is wrong with a file: most often its end is missing."""
    said = str(error).splitlines()[0].partition(". ")[0] if str(error) else ""
    cut = not said or any(mark in said for mark in ("not fully covered", "invalid header length", "header too small"))
    return "its end is missing" if cut else said


def _open(path: Path) -> _Safetensors | _Torch:
    """Open a file by its first bytes, not by its name.

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
            if not zipfile.is_zipfile(path):  # its table of contents is at the end
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
