"""Read tensors from files: names and shapes first, then one tensor after another, never a whole file in memory.

No code is run: safetensors hold none, and torch's `weights_only` reader refuses all but tensors and plain values.
numpy's scalars and arrays beside the weights are skipped without running any of numpy's code.
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

from persistworld_cli.checkpoints.compatibility import is_lora
from persistworld_cli.checkpoints.names import Naming, read_names
from persistworld_cli.checkpoints.saving import read_notes
from persistworld_cli.checkpoints.sources import WeightSource
from persistworld_cli.config.weight_names import report_reading
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.read_files import reading
from persistworld_cli.torch_files import load_torch, require_stored

WINDOW = 16 << 20  # bytes mapped at once: a mapped file's pages count as this process's memory until they are released
# Buffers that transformers before 4.31 saved; newer models do not have them in the state dict and refuse them.
DROPPED = "position_ids"

_OUTER = "."  # the entry for the tensors of a file that are in no dict of their own
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
    """All tensors of a checkpoint under a world model's names (`names`); an adapter's keep their own.

    Args:
        sources: their files; if several have a tensor of the same name, the last one counts.

    Attributes:
        info: name -> shape and type.
        metadata: the files' notes (`saving`).
        naming: what the names in the files mean.

    Raises:
        PersistWorldError: a damaged file, one that holds no state dict or several, or a pickle with code in it.
    """

    def __init__(self, *sources: WeightSource) -> None:
        self.info: dict[str, Info] = {}
        self.metadata: dict[str, str] = {}
        self._home: dict[str, tuple[int, str]] = {}  # name -> (file, name there)
        self._files: list[_Safetensors | _Torch] = []
        self._name, self._unread = sources[0].name, list[str]()
        for source in sources:
            for path, prefix in source.files:
                file = _open(path)
                self.metadata |= read_notes(path)
                for there, name in self._chosen(file, source).items():
                    if not name.endswith(DROPPED):
                        self.info[prefix + name] = file.info[there]
                        self._home[prefix + name] = (len(self._files), there)
                self._files.append(file)
        self.naming = Naming({}, [], {})
        if not is_lora(self.info):
            self.naming = read_names(self.info)
            self.rename(self.naming.names)

    def _chosen(self, file: _Safetensors | _Torch, source: WeightSource) -> dict[str, str]:
        """Names in a file -> names from now on: those of the named entry, or of the only set of weights in it."""
        groups = file.groups
        if source.entry:
            start = "" if source.entry == _OUTER else f"{source.entry}."
            own = file.info if start else groups.get("", [])
            names = {name: name.removeprefix(start) for name in own if name.startswith(start)}
            if names:
                return names
            held = ", ".join(dict.fromkeys(name.partition(".")[0] for name in file.info))
            raise PersistWorldError(f"no '{source.entry}' in the file", where=source.name, fix=f"it holds: {held}")
        sets = _weights_in(groups)
        together = [name for names in sets.values() for name in names]
        if len(sets) > 1 and read_names(together).unknown:
            places = [place or _OUTER for place in sets]
            raise PersistWorldError(
                f"{len(places)} sets of weights in the file: {', '.join(places)}",
                where=source.name,
                fix=f"name one: {file.path}:{places[0]}",
            )
        if not sets and isinstance(file, _Torch) and file.step:
            raise PersistWorldError(
                "this is the saved state of a training, to resume from",
                where=str(file.path),
                fix="its weights are in the run's folder under weights/",
            )
        if sets:
            rest = [name for place, names in groups.items() if place not in sets for name in names]
            self._unread += [*file.others, *(name.partition(".")[0] for name in rest)]
        return {name: name for name in together or file.info}

    def report(self) -> None:
        """Say, once, what the files have that a plain checkpoint does not."""
        if text := str(self.naming):
            report_reading(f"{self._name}: {text}")
        if unread := sorted(set(self._unread)):
            report_reading(f"{self._name}: skipped, beside the weights: {', '.join(unread)}")

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


def _weights_in(groups: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The groups of a file's names that are a model's or an adapter's; all, if there is only one."""
    if len(groups) < 2:
        return dict(groups)
    own = (place for place, names in groups.items() if is_lora(names) or len(read_names(names).unknown) < len(names))
    return {place: groups[place] for place in own}


class _Safetensors:
    """A safetensors file; opened again every `WINDOW` bytes, which releases what was mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(str(path), "pt") as file:
            self.order: list[str] = list(file.offset_keys())
            self.info = {name: Info.of(file.get_tensor(name)) for name in self.order}
        self.groups, self.others = {"": self.order}, list[str]()

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
    """A file of `torch.save`, memory-mapped unless it has the format used before 2020.

    Attributes:
        groups: place of a dict in the file ("" for the outermost) -> the full names of its tensors.
        others: outermost keys of what is no tensor.
        step: whether the file counts steps, as a training's saved state does.
    """

    def __init__(self, path: Path, *, mapped: bool) -> None:
        self.mapped = mapped
        self.path = path
        with torch.serialization.safe_globals(_INERT):
            content = load_torch(path, mapped=mapped)
        self.step = isinstance(content, dict) and "step" in content
        content = _policy(content) if self.step and "switch" in content else content
        self.tensors = tensors_in(content)
        self.groups: dict[str, list[str]] = {}
        for place, key in _places(content):
            self.groups.setdefault(place, []).append(f"{place}.{key}" if place else key)
        if not self.tensors and not self.step:
            raise PersistWorldError("the file holds no state dict", where=str(path), fix="give a file of named tensors")
        outer = {key: value for key, value in content.items() if not torch.is_tensor(value)}
        self.others = [str(key) for key, value in outer.items() if not _places(value)]
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


class _Inert:
    """What stands for numpy's scalars and arrays in a pickle; their values are not needed."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


_INERT: list[Any] = [
    (_Inert, name)
    for name in (
        *(f"numpy.{core}.multiarray.{made}" for core in ("_core", "core") for made in ("scalar", "_reconstruct")),
        "numpy.dtype",
        "numpy.ndarray",
    )
]


def _places(content: Any, place: str = "") -> dict[tuple[str, str], torch.Tensor]:
    """Tensors in nested dicts of names: (the keys that lead to the dict, joined by dots; the last key) -> tensor."""
    found: dict[tuple[str, str], torch.Tensor] = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(key, str) and torch.is_tensor(value):
            found[place, key] = value
        elif isinstance(key, str):
            found |= _places(value, f"{place}.{key}" if place else key)
    return found


def tensors_in(content: Any) -> dict[str, torch.Tensor]:
    """The tensors of what `torch.load` gives: of a module, or in nested dicts, under all keys joined by dots."""
    content = content.state_dict() if isinstance(content, torch.nn.Module) else content
    return {f"{place}.{key}" if place else key: tensor for (place, key), tensor in _places(content).items()}


def _policy(content: dict[str, Any]) -> dict[str, Any]:
    """The sampling policy of a post-training's state under the names of a PEFT folder; {} if it has none."""
    for key in _POLICY:
        content = content[key] if isinstance(content.get(key), dict) else {}
    return {re.sub(r"^unet\.", "base_model.model.", str(name)): value for name, value in content.items()}


def _damage(error: Exception) -> str:
    """What is wrong with a file: most often its end is missing."""
    said = str(error).splitlines()[0].partition(". ")[0] if str(error) else ""
    cut = not said or any(mark in said for mark in ("not fully covered", "invalid header length", "header too small"))
    return "its end is missing" if cut else said


def _rescue(path: Path, expression: str = "torch.load({}, weights_only=False)") -> str:
    """The command that writes the tensors of a file with objects in it to one of its own."""
    loaded = expression.format(f"{str(path)!r}, map_location='cpu'")
    new = str(path.with_name(f"{path.stem}-tensors.pt"))
    return (
        'python -c "import torch; from persistworld_cli.checkpoints.tensor_files import tensors_in; '
        f'torch.save(tensors_in({loaded}), {new!r})"'
    )


def _refuse_program(path: Path) -> None:
    """Raise PersistWorldError for an archive of TorchScript."""
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise PersistWorldError(
                "the file is a TorchScript program, not weights",
                where=str(path),
                fix=f"if you trust its author: {_rescue(path, 'torch.jit.load({}).state_dict()')}",
            )


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
            _refuse_program(path)
            return _Torch(path, mapped=True)
        if head.startswith(b"\x80"):
            return _Torch(path, mapped=False)
        if head[8:9] == b"{" or (head and path.suffix == ".safetensors"):
            return _Safetensors(path)
    except pickle.UnpicklingError as error:
        thing = re.search(r"GLOBAL (\S+)", str(error))
        raise PersistWorldError(
            f"the file holds more than tensors ({thing[1] if thing else 'an object'}, which could run code) and was "
            "not opened",
            where=str(path),
            fix=f"get a plain state dict, or safetensors; if you trust its author: {_rescue(path)}",
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
