"""Ways to damage a file, and the outcomes of reading it: the parts of `benchmarks.mutations` and of the project's test.

A mutation is a pure function of its number and a seed, so that a failure can be repeated by naming both.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import json
import random
import signal
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from persistworld_cli.errors import PersistWorldError

LIMIT_S = 10.0  # processor time that reading one damaged file may take
DEEP = 50_000  # levels of nesting
Mutation = Callable[[bytes, random.Random], bytes]

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 2**70, 10**400, 1e300, float("nan"), float("inf"), "", "x", "\x1b[2J\x00", "../../etc"),
    *("{0}", "{episode_index:2000000000d}", "{episode_index.__class__}", "{", [], {}, [[]], [None], [1, [2]], ["a", 1]),
    *({"(": 3}, {"a": {}}, [{}], [0] * 9, "\ud800"),
)


class Hang(BaseException):
    """Reading took too long; no BaseException that a reader could take for a damaged file."""


@contextmanager
def limited(seconds: float = LIMIT_S) -> Iterator[None]:
    """Raise Hang in the block after so much processor time (in the main thread; Unix)."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@dataclass(frozen=True)
class Outcome:
    """What came of one mutation: equal, error, changed, or BAD and why."""

    kind: str
    told: str = ""


def outcome(read: Callable[[], Any], expected: str, folder: Path, file: Path) -> Outcome:
    """Read a damaged file.

    Args:
        read: reads it, and what belongs to it.
        expected: fingerprint of what the whole file gives.
        folder: everything under it must stay there.
        file: the damaged file, which must stay as it is.
    """
    before, data = sorted(folder.rglob("*")), file.read_bytes()
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = read()
            found = Outcome("equal" if fingerprint(value) == expected else "changed")
    except PersistWorldError as error:
        lacking = [name for name in ("what", "where", "fix") if not getattr(error, name)]
        found = Outcome("BAD", f"an error without {', '.join(lacking)}: {error}") if lacking else Outcome("error")
    except Hang:
        found = Outcome("BAD", f"no end after {LIMIT_S:g} s")
    except (Exception, SystemExit) as error:
        found = Outcome("BAD", f"{type(error).__name__}: {str(error)[:200]}")
    if sorted(folder.rglob("*")) != before or file.read_bytes() != data:
        found = Outcome("BAD", "a file was lost or changed")
    return found


def fingerprint(value: Any) -> str:
    """A hash of anything that a reader gives."""
    digest = hashlib.sha256()
    _feed(digest.update, value)
    return digest.hexdigest()


def _feed(add: Callable[[bytes], None], value: Any) -> None:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, torch.Tensor):
        value = value.detach().float().numpy() if value.dtype == torch.bfloat16 else value.detach().numpy()
    if isinstance(value, np.ndarray):
        add(f"{value.dtype}{value.shape}".encode())
        add(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            add(f"{key!r}:".encode())
            _feed(add, entry)
    elif isinstance(value, list | tuple):
        add(f"{type(value).__name__}{len(value)}".encode())
        for entry in value:
            _feed(add, entry)
    else:
        add(f"{type(value).__name__}{value!r};".encode())


# -- any file ---------------------------------------------------------------------------------------------------------


def flip(data: bytes, draw: random.Random) -> bytes:
    """One to three bytes changed."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        out[draw.randrange(len(out))] ^= draw.randrange(1, 256)
    return bytes(out)


def cut(data: bytes, draw: random.Random) -> bytes:
    """The end missing."""
    return data[: draw.choice((0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, draw.randrange(len(data))))]


def zeroed(data: bytes, draw: random.Random) -> bytes:
    """A block of zeros: what a machine that lost power leaves."""
    if not draw.randrange(4):
        return bytes(len(data))
    begin = draw.randrange(len(data))
    size = draw.randint(1, max(1, len(data) - begin))
    return data[:begin] + bytes(size) + data[begin + size :]


def swapped(data: bytes, draw: random.Random) -> bytes:
    """Two blocks in each other's place."""
    a, b, c = sorted(draw.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def longer(data: bytes, draw: random.Random) -> bytes:
    """Something behind the end, or the file twice."""
    return data + (data if draw.randrange(2) else bytes(draw.randrange(256) for _ in range(20)))


def other_kind(data: bytes, draw: random.Random) -> bytes:
    """A file of another kind."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}q\x00.")
    header = b'{"__metadata__":{"format":"pt"}}'
    return draw.choice(
        (
            *(b"", b"\n", b"{}", b"[]", b"null", b'"x"', b"17", b"<html>not found</html>", b"PK\x05\x06" + bytes(18)),
            *(packed.getvalue(), b"\x80\x02c__builtin__\neval\nq\x00.", b"\x93NUMPY\x01\x00", b"PAR1PAR1"),
            *(struct.pack("<Q", len(header)) + header, b"version https://git-lfs.github.com/spec/v1\n", b"\x89PNG\r\n"),
        )
    )


ANY: tuple[Mutation, ...] = (flip, flip, cut, cut, zeroed, swapped, longer, other_kind)


# -- text -------------------------------------------------------------------------------------------------------------


def not_utf8(data: bytes, draw: random.Random) -> bytes:
    """A byte that no UTF-8 text has, or another encoding."""
    if not draw.randrange(3):
        return data.decode().encode("utf-16")
    at = draw.randrange(len(data) + 1)
    return data[:at] + b"\xff" + data[at:]


def _odd(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(ODD))


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where anything stands in a JSON value: of long lists the first and the last."""
    yield place
    if isinstance(value, dict):
        for key in value:
            yield from _places(value[key], (*place, key))
    elif isinstance(value, list):
        for index in sorted({0, len(value) - 1}) if value else ():
            yield from _places(value[index], (*place, index))


def changed_json(value: Any, draw: random.Random) -> str:
    """JSON with one value of another kind, left out, or nested deep."""
    place = draw.choice(list(_places(value)))
    what = draw.randrange(10)
    mark = "@DEEP@"
    new = mark if what == 0 else _odd(draw)
    if not place:
        value = new
    else:
        value = copy.deepcopy(value)
        holder = value
        for key in place[:-1]:
            holder = holder[key]
        if what == 1:
            del holder[place[-1]]
        else:
            holder[place[-1]] = new
    deep = "[" * DEEP + "]" * DEEP if draw.randrange(2) else '{"a":' * DEEP + "1" + "}" * DEEP
    return json.dumps(value).replace(f'"{mark}"', deep)


def json_values(data: bytes, draw: random.Random) -> bytes:
    """`changed_json` of a JSON file."""
    return changed_json(json.loads(data), draw).encode()


def json_line(data: bytes, draw: random.Random) -> bytes:
    """`changed_json` of a line of a JSONL file."""
    lines = data.decode().splitlines()
    at = draw.randrange(len(lines))
    lines[at] = changed_json(json.loads(lines[at]), draw)
    return "\n".join(lines).encode()


def toml_value(data: bytes, draw: random.Random) -> bytes:
    """A value of a TOML file of another kind, a line twice, or nested deep."""
    lines = data.decode().splitlines()
    at = draw.choice([number for number, line in enumerate(lines) if "=" in line])
    key = lines[at].partition("=")[0]
    odd = (
        '"x"',
        "-1",
        "0",
        "nan",
        "inf",
        "[]",
        "{}",
        "true",
        "1e300",
        "9" * 5000,
        "1979-05-27",
        '"\\u001b"',
        '[[1], "a"]',
    )
    new = draw.choice((*odd, "[" * DEEP + "]" * DEEP, "{a = " * 3000 + "1" + "}" * 3000, ""))
    lines[at] = lines[at] + "\n" + lines[at] if not new else f"{key}= {new}"
    return "\n".join(lines).encode()


def csv_value(data: bytes, draw: random.Random) -> bytes:
    """A cell of a CSV file changed."""
    rows = [line.split(",") for line in data.decode().splitlines()]
    row = draw.choice(rows)
    row[draw.randrange(len(row))] = draw.choice(("", "x", "nan", "-1", "1e999", '"', "9" * 5000, "\x00", "inf", "a,b"))
    return "\n".join(",".join(row) for row in rows).encode()


TEXT: tuple[Mutation, ...] = (*ANY, not_utf8)
JSON: tuple[Mutation, ...] = (*TEXT, *[json_values] * 12)
JSONL: tuple[Mutation, ...] = (*TEXT, *[json_line] * 12)
TOML: tuple[Mutation, ...] = (*TEXT, *[toml_value] * 6)
CSV: tuple[Mutation, ...] = (*TEXT, *[csv_value] * 6)


# -- tables -----------------------------------------------------------------------------------------------------------


def parquet_column(data: bytes, draw: random.Random) -> bytes:
    """A column of another type, with empty cells, left out, or twice; or no rows."""
    table = pq.read_table(io.BytesIO(data))
    at = draw.randrange(table.num_columns)
    name, rows = table.column_names[at], table.num_rows
    new: list[Any] = draw.choice(
        (
            *([None] * rows, ["x"] * rows, [[1.0], []] * rows, [-1] * rows, [2**62] * rows, [float("nan")] * rows),
            *([[None]] * rows, [["a"]] * rows, [{"a": 1}] * rows, [True] * rows, [1e300] * rows, [b"\xff"] * rows),
        )
    )[:rows]
    what = draw.randrange(8)
    if what == 0:
        table = table.remove_column(at)
    elif what == 1:
        table = table.slice(0, 0)
    elif what == 2:
        table = table.append_column(name, table.column(at))
    elif what == 3:
        table = table.take(list(range(rows))[::-1])
    else:
        table = table.set_column(at, name, pa.array(new))
    out = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(table.schema.metadata), out)
    return out.getvalue()


def parquet_note(data: bytes, draw: random.Random) -> bytes:
    """The notes (metadata) of a parquet file with other values."""
    table = pq.read_table(io.BytesIO(data))
    notes = {
        key: draw.choice((changed_json(json.loads(value), draw).encode(), b"\xff", b""))
        for key, value in (table.schema.metadata or {}).items()
    }
    out = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(notes), out)
    return out.getvalue()


PARQUET: tuple[Mutation, ...] = (*ANY, *[parquet_column] * 8)


# -- numbers ----------------------------------------------------------------------------------------------------------


def safetensors_header(data: bytes, draw: random.Random) -> bytes:
    """The header of a safetensors file with a value of another kind."""
    (size,) = struct.unpack("<Q", data[:8])
    text = changed_json(json.loads(data[8 : 8 + size]), draw).encode(errors="replace")
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def torch_content(data: bytes, draw: random.Random) -> bytes:
    """What `torch.save` wrote, with other members: compressed, left out, repeated, of other types."""
    if draw.randrange(2):
        return _torch_archive(data, draw)
    value = torch.load(io.BytesIO(data), weights_only=True)
    odd: tuple[Any, ...] = (
        *(None, 7, "x", [], {}, torch.zeros(1).expand(10**6, 10**6), torch.zeros(3, 3).to_sparse(), torch.zeros(())),
        *(torch.zeros(0), torch.zeros(2, 2).T, torch.full((2, 2), float("nan")), torch.zeros(2, dtype=torch.complex64)),
        *(torch.arange(6).reshape(2, 3)[:, ::2], {"state_dict": 1}, {"step": 1}, {"a": {"b": torch.zeros(2)}}),
    )
    new = draw.choice(odd)
    if isinstance(value, dict) and value and draw.randrange(4):
        key = draw.choice(list(value))
        value = {name: new if name == key else entry for name, entry in value.items()}
    else:
        value = new
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=bool(draw.randrange(4)))
    return out.getvalue()


def _torch_archive(data: bytes, draw: random.Random) -> bytes:
    """The same archive, compressed or with a member left out, emptied or cut."""
    out, what = io.BytesIO(), draw.randrange(4)
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        odd = draw.choice(old.namelist())
        for name in old.namelist():
            content = old.read(name)
            if name == odd and what:
                content = (b"", content[: len(content) // 2], flip(content or b"x", draw))[what - 1]
                if what == 1 and draw.randrange(2):
                    continue
            new.writestr(name, content, zipfile.ZIP_STORED if what else zipfile.ZIP_DEFLATED)
    return out.getvalue()


def _odd_array(draw: random.Random, array: Any) -> Any:
    """An array of another type or shape."""
    array = np.atleast_1d(array)
    odd: tuple[Any, ...] = (
        *(np.array(7.0), np.zeros(0), array.astype(">f8"), np.asfortranarray(array), array.astype("<U3"), array[:1]),
        *(
            np.array([b"x"]),
            np.full(array.shape, np.nan),
            np.zeros((2, 2), "datetime64[s]"),
            array.ravel(),
            array[None],
        ),
        *(np.array([{"a": 1}], dtype=object), np.zeros(3, dtype=[("a", "<f4")]), np.zeros((1, 0, 2))),
    )
    return draw.choice(odd)


def npy_content(data: bytes, draw: random.Random) -> bytes:
    """A .npy with another array, or a header that lies about it."""
    array, out = np.load(io.BytesIO(data)), io.BytesIO()
    if draw.randrange(2):
        np.save(out, _odd_array(draw, array))
        return out.getvalue()
    (size,) = struct.unpack("<H", data[8:10])
    shape = draw.choice(("(-1,)", "(99999999999, 9)", "()", "(2, 'a')", "None", "(" * 200, "(1e3, 2)", "(True,)"))
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(size)[:size].encode()
    return data[:10] + header + data[10 + size :]


def npz_content(data: bytes, draw: random.Random) -> bytes:
    """A .npz with arrays of another kind, left out, added, or none at all."""
    with np.load(io.BytesIO(data)) as file:
        arrays = dict(file)
    name, what = draw.choice(list(arrays)), draw.randrange(5)
    if what == 0:
        arrays = {}
    elif what == 1:
        del arrays[name]
    else:
        arrays[name if what < 4 else "another"] = _odd_array(draw, arrays[name])
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


SAFETENSORS: tuple[Mutation, ...] = (*ANY, *[safetensors_header] * 8)
TORCH: tuple[Mutation, ...] = (*ANY, *[torch_content] * 10)
NPY: tuple[Mutation, ...] = (*ANY, *[npy_content] * 6)
NPZ: tuple[Mutation, ...] = (*ANY, *[npz_content] * 6)
