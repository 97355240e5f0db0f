"""The episode index: one file, its states memory-mapped.

``<dataset>/meta/index.safetensors``: safetensors' container (a JSON header, then plain arrays), which any reader of
that format opens. The header has a checksum of each array, compared when the array is first used. One row per
annotation, splits one after another, episodes in natural order. Legend: E annotations, N frames of all usable ones,
D numbers of a state, U different instructions.

    states (N, D) float32, or float64 where float32 would lose precision;  lengths (E,)  0: not usable
    ids, texts, problems        bytes of JSON lists: E ids, U instructions, reasons ("" = usable)
    text_of, problem_of (E,)    rows of these;  splits: bytes of a JSON list, split_of (E,) its rows
    size, mtime, videos, latents (E,)   `scan.AnnotationStat`;  success (E,) 1, 0 or -1 (unknown)
    facts (E, 6)                `scan.Facts`
    motion (R, 2, J), motion_of (K,), motion_length (K,)   raw joints and velocities that the adapter is fitted on
    starts, starts_of (K,)      only with Ctrl-World's own lists: start frames and their rows

Needs no torch.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import whole_file, writing
from persistworld_cli.read_files import as_object, parse_json, read_json, reading, whole_number

INDEX_FILE = "index.safetensors"
FORMAT = "persistworld-index-1"
REBUILD = "run persistworld build-meta again"
_NO_ROOM = "free some disk and run persistworld build-meta again"
_CLOSED = (
    "for a read-only dataset, make a folder with links to its folders annotation/, videos/ and latent_videos/, "
    "and use that folder"
)
_SUMS = "crc32"  # of the metadata: JSON, name of an array -> 8 hex digits
_SUMMED = 1 << 22  # bytes read at once
_BLOCK = 1 << 18  # rows of states read at once
_CODES = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1"}
_NAMES = {np.dtype(code): name for name, code in _CODES.items()}


_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ActionStat:
    """1st and 99th percentile (D,) of the training states, by which poses are scaled to [-1, 1].

    ``names``: of the D numbers, for messages.
    """

    p01: NDArray[np.float64]
    p99: NDArray[np.float64]
    names: tuple[str, ...] = ()

    def normalise(self, pose: ArrayLike) -> NDArray[np.float32]:
        """``clip(2 (a - p01) / (p99 - p01 + 1e-8) - 1, -1, 1)`` of (..., D), computed in float64 (method.md 1).

        Raises:
            PersistWorldError: poses of another width.
        """
        value = np.asarray(pose, dtype=np.float64)
        if value.shape[-1:] != self.p01.shape:
            raise PersistWorldError(
                f"states have {value.shape[-1]} numbers, the percentiles {len(self.p01)}",
                where="model.stat, or the dataset's stat.json",
                fix="they are of another robot: leave model.stat empty, and run persistworld build-meta on the dataset",
            )
        scaled = 2 * (value - self.p01) / (self.p99 - self.p01 + 1e-8) - 1
        return np.clip(scaled, -1, 1).astype(np.float32)

    @classmethod
    def load(cls, path: Path) -> ActionStat:
        """Read a stat.json with ``state_01`` and ``state_99``. Raises PersistWorldError: missing or unreadable file."""
        what, fix = "unreadable percentiles", "run persistworld build-meta on it"
        if not path.is_file():
            raise PersistWorldError("percentiles of the states are missing", where=str(path), fix=fix)
        with reading(what, path, REBUILD):
            return cls.of(read_json(path, what, REBUILD))

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> ActionStat:
        """From the content of a stat.json. Raises ValueError, KeyError or TypeError for other content."""
        p01, p99 = (np.asarray(data[key], dtype=np.float64) for key in ("state_01", "state_99"))
        if p01.shape != p99.shape or p01.ndim != 1 or not p01.size:
            raise ValueError("state_01 and state_99 differ in shape")
        if not np.isfinite([p01, p99]).all():
            raise ValueError("the percentiles hold NaN or infinite values")
        return cls(p01, p99)


@dataclass(frozen=True)
class EpisodeIndex:
    """The episodes of one split, as clip drawing needs them. Episode e owns rows offsets[e]:offsets[e+1] of states.

    ``states`` is memory-mapped. ``starts``: only with imported lists of Ctrl-World; the start frames to draw from,
    ascending, ``starts[start_offsets[e]:start_offsets[e+1]]``. None: every frame with enough frames after it.
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    lengths: NDArray[np.int64]
    offsets: NDArray[np.int64]
    states: NDArray[np.floating[Any]]
    starts: NDArray[np.int32] | None = None
    start_offsets: NDArray[np.int64] | None = None


class NoEpisodes(PersistWorldError):
    """A split without usable episodes, in an intact index."""


class IndexFile:
    """An index on disk, memory-mapped. Raises PersistWorldError: absent, damaged, or of another version."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise PersistWorldError("dataset has no index", where=str(path), fix="run persistworld build-meta on it")
        self.path = path
        with reading("the index is damaged", path, REBUILD):
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                text = file.read(length).decode() if length < 1 << 24 else ""
            header = as_object(parse_json(text))
            self.info: dict[str, str] = as_object(header.pop("__metadata__"))
            self._begin, self._entries = 8 + length, header
            whole = self._begin + max((_checked(name, entry) for name, entry in header.items()), default=0)
        self._sound: set[str] = set()
        if self.info.get("format") != FORMAT:
            raise PersistWorldError("the index is of another version", where=str(path), fix=REBUILD)
        if whole != path.stat().st_size:
            raise PersistWorldError("the index is cut off", where=str(path), fix=REBUILD)

    def array(self, name: str) -> NDArray[Any]:
        """An array, memory-mapped. Raises PersistWorldError if it is absent or its checksum differs."""
        dtype, shape, offset = self._place(name)
        return np.memmap(self.path, dtype, "r", offset, shape) if math.prod(shape) else np.empty(shape, dtype)

    def states(self) -> StateRows:
        """The states, to be read block by block without being mapped. Raises PersistWorldError as `array`."""
        return StateRows(self.path, *self._place("states"))

    def _place(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...], int]:
        """Type, shape and offset in the file of an array, once its checksum is verified."""
        if name not in self._entries:
            raise PersistWorldError(f"the index is damaged: no array '{name}'", where=str(self.path), fix=REBUILD)
        self._check(name)
        entry = self._entries[name]
        return np.dtype(_CODES[entry["dtype"]]), tuple(entry["shape"]), self._begin + entry["data_offsets"][0]

    def check(self) -> None:
        """Verify all arrays. Raises PersistWorldError if a checksum differs."""
        for name in self._entries:
            self._check(name)

    def _check(self, name: str) -> None:
        """Compare an array with its checksum, once; indexes of older versions have no checksums."""
        if name in self._sound:
            return
        with reading("the index is damaged", self.path, REBUILD):
            sums = as_object(parse_json(self.info.get(_SUMS, "{}")))
        if not sums:
            return
        begin, end = self._entries[name]["data_offsets"]
        if _sum_of(self.path, self._begin + begin, end - begin) != sums.get(name):
            raise PersistWorldError(
                f"the index is damaged: the checksum of '{name}' differs", where=str(self.path), fix=REBUILD
            )
        self._sound.add(name)

    def names(self, name: str) -> list[str]:
        """A list of texts. Raises PersistWorldError if it is not one."""
        with reading("the index is damaged", self.path, REBUILD):
            texts = parse_json(self.array(name).tobytes().decode())
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise TypeError(f"'{name}' is not a list of texts")
            return texts

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(E + 1,) where each row's states begin."""
        return running(self.array("lengths"))

    def require_whole(self) -> None:
        """Raise if arrays that belong together do not match: numpy would wrap or cut them silently."""
        lengths, ids = np.asarray(self.array("lengths")), self.names("ids")
        codes = {"split_of": len(self.names("splits")), "text_of": len(self.names("texts"))}
        if lengths.ndim != 1 or len(ids) != len(lengths) or (lengths < 0).any():
            raise ValueError("ids and lengths do not match")
        if int(lengths.sum()) != self._entries["states"]["shape"][0]:
            raise ValueError("lengths and states do not match")
        for name, count in codes.items():
            rows = np.asarray(self.array(name))
            if rows.shape != lengths.shape or ((rows < 0) | (rows >= max(1, count))).any():
                raise ValueError(f"'{name}' does not match the lengths")

    def split(self, name: str) -> EpisodeIndex:
        """The usable episodes of a split. Raises NoEpisodes: it has none; PersistWorldError: the index is damaged."""
        with reading("the index is damaged", self.path, REBUILD):
            self.require_whole()
            splits, lengths = self.names("splits"), np.asarray(self.array("lengths"))
            usable = lengths > 0
            mine = (self.array("split_of") == splits.index(name)) if name in splits else np.zeros(len(lengths), bool)
            rows = np.flatnonzero(mine & usable)
            if not len(rows):
                known = sorted({splits[code] for code in np.unique(self.array("split_of")[usable])})
                raise NoEpisodes(
                    f"split '{name}' has no episodes", where=str(self.path), fix=f"take one of: {', '.join(known)}"
                )
            first, last = int(self.offsets[rows[0]]), int(self.offsets[rows[-1] + 1])
            ids, texts, text_of = self.names("ids"), self.names("texts"), self.array("text_of")[rows].tolist()
            starts, start_offsets = self._starts(rows)
            return EpisodeIndex(
                ids=tuple(ids[row] for row in rows.tolist()),
                texts=tuple(texts[code] for code in text_of),
                lengths=lengths[rows],
                offsets=running(lengths[rows]),
                states=self.array("states")[first:last],
                starts=starts,
                start_offsets=start_offsets,
            )

    def _starts(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32] | None, NDArray[np.int64] | None]:
        """Imported start frames of some rows, if there are any."""
        if "starts" not in self._entries:
            return None, None
        of = self.array("starts_of")
        low, high = (np.searchsorted(of, [rows[0], rows[-1]], side=side) for side in ("left", "right"))
        begin, end = int(low[0]), int(high[1])
        return self.array("starts")[begin:end], np.append(np.searchsorted(of[begin:end], rows), end - begin)


def _checked(name: str, entry: Any) -> int:
    """End of an array, from its header entry. Raises if type, shape and offsets disagree."""
    begin, end = (whole_number(at, "data_offsets") for at in entry["data_offsets"])
    shape = [whole_number(size, "shape") for size in entry["shape"]]
    if end - begin != math.prod(shape) * np.dtype(_CODES[entry["dtype"]]).itemsize:
        raise ValueError(f"'{name}' is not as long as its shape says")
    return end


@dataclass(frozen=True)
class StateRows:
    """States (N, D) in a file, read by blocks: a mapping of ten million rows would count as this process's memory."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int = 0

    def read(self, begin: int, end: int) -> NDArray[np.floating[Any]]:
        """Rows begin:end."""
        width = self.shape[1]
        at = self.offset + begin * width * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, (end - begin) * width, offset=at).reshape(-1, width)

    def blocks(self) -> list[tuple[int, int]]:
        """(begin, end) of blocks that cover all rows."""
        return [(at, min(at + _BLOCK, self.shape[0])) for at in range(0, self.shape[0], _BLOCK)]


class StateWriter:
    """States appended to a file beside the index, as float64. Raises PersistWorldError: it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path, self._width, self._count, self._lossless = path, 0, 0, True
        with writing(path.parent, _NO_ROOM, closed=_CLOSED):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = path.open("wb")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the states in the index: float32 if that is lossless."""
        return np.dtype("<f4" if self._lossless else "<f8")

    def append(self, states: NDArray[np.floating[Any]]) -> None:
        """Append states (T, D); D is the same in every call."""
        self._lossless = self._lossless and np.array_equal(states.astype("<f4"), states)
        self._width, self._count = states.shape[1], self._count + len(states)
        with writing(self.path.parent, _NO_ROOM):
            self._file.write(np.ascontiguousarray(states, "<f8").data)

    def rows(self) -> StateRows:
        """The states written so far."""
        with writing(self.path.parent, _NO_ROOM):
            self._file.flush()
        return StateRows(self.path, np.dtype("<f8"), (self._count, self._width))

    def close(self) -> None:
        """Close and remove the file, and its folder if nothing else is in it."""
        with suppress(OSError):  # unwritten data is no longer needed
            self._file.close()
        self.path.unlink(missing_ok=True)
        with suppress(OSError):  # the folder holds other files
            self.path.parent.rmdir()


def write_index(
    path: Path, columns: Mapping[str, NDArray[Any]], states: StateRows, dtype: np.dtype[Any], info: Mapping[str, str]
) -> None:
    """Write an index atomically, its states as ``dtype``; wider types come first, for alignment."""

    def parts(name: str) -> Iterator[memoryview]:
        if name != "states":
            yield np.ascontiguousarray(columns[name]).data
            return
        for begin, end in states.blocks():
            yield states.read(begin, end).astype(dtype).data

    sizes = {name: (array.dtype, array.shape) for name, array in columns.items()} | {"states": (dtype, states.shape)}
    sums = {name: f"{functools.reduce(lambda crc, part: zlib.crc32(part, crc), parts(name), 0):08x}" for name in sizes}
    ordered = sorted(sizes, key=lambda name: (-sizes[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, _SUMS: json.dumps(sums), **info}}
    at = 0
    for name in ordered:
        kind, shape = sizes[name]
        end = at + int(np.prod(shape)) * kind.itemsize
        header[name] = {"dtype": _NAMES[kind], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as partial, partial.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in ordered:
            for part in parts(name):
                out.write(part)


def _sum_of(path: Path, offset: int, size: int) -> str:
    """CRC-32 of a part of a file, read by blocks."""
    value = 0
    with path.open("rb") as file:
        file.seek(offset)
        while size > 0 and (block := file.read(min(size, _SUMMED))):
            value, size = zlib.crc32(block, value), size - len(block)
    return f"{value:08x}"


def as_bytes(names: list[str]) -> NDArray[np.uint8]:
    """Texts as the bytes of a JSON list: numpy's text arrays give every text the size of the longest."""
    return np.frombuffer(json.dumps(names).encode(), dtype=np.uint8)


def running(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """0, then the running sums: the offsets of consecutive parts with these lengths, and the end."""
    out = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=out[1:])
    return out
