"""openpi's message encoding: msgpack with numpy arrays (method.md section 6).

An array is a map with the byte-string keys `__ndarray__` (true), `data` (its bytes, C order), `dtype` (numpy's string),
`shape`; a numpy scalar has `__npgeneric__`, `data`, `dtype`. Everything else is plain msgpack; nothing is unpickled.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np

from persistworld_cli.errors import PersistWorldError

_KINDS = "biufSU"  # booleans, numbers, strings: types that are plain bytes (no objects, no structures)


def pack(message: Any) -> bytes:
    """A message (maps, lists, numbers, strings, numpy arrays and scalars) -> bytes. Raises PersistWorldError."""
    try:
        packed: bytes = msgpack.packb(message, default=_encode)
    except (TypeError, ValueError, OverflowError) as error:
        fix = "send numbers, text and numpy arrays"
        raise PersistWorldError(f"cannot encode a policy message: {error}", fix=fix) from error
    return packed


def unpack(data: bytes) -> Any:
    """Bytes -> message; arrays become writable numpy arrays of their shape and type.

    Raises:
        PersistWorldError: not msgpack, or an array whose bytes, shape and type do not agree.
    """
    try:
        return msgpack.unpackb(data, object_hook=_decode, strict_map_key=False)
    except PersistWorldError:
        raise
    except Exception as error:  # msgpack raises a dozen unrelated types for damaged bytes
        raise PersistWorldError(
            f"not a policy message (msgpack): {error!r}",
            fix="check that the other side uses openpi's websocket protocol",
        ) from error


def _encode(value: Any) -> dict[bytes, Any]:
    """msgpack's hook for other types."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in _KINDS:
        raise TypeError(f"numpy type '{value.dtype}' cannot be sent")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"'{type(value).__name__}' cannot be sent")


def _decode(entry: dict[Any, Any]) -> Any:
    """msgpack's hook for every map: decodes those that encode arrays and scalars."""
    if b"__ndarray__" in entry:
        dtype = _dtype(entry)
        shape = tuple(int(size) for size in entry.get(b"shape", ()))
        data = entry.get(b"data", b"")
        if not isinstance(data, bytes) or min(shape, default=0) < 0 or len(data) != dtype.itemsize * math.prod(shape):
            raise PersistWorldError(f"an array of shape {shape} and type '{dtype}' came with {len(data)} bytes")
        return np.frombuffer(data, dtype=dtype).reshape(shape).copy()
    if b"__npgeneric__" in entry:
        dtype, value = _dtype(entry), entry.get(b"data")
        # Some writers send a scalar's bytes, openpi sends its value.
        if isinstance(value, bytes) and dtype.kind != "S":
            return np.frombuffer(value, dtype=dtype)[0]
        return dtype.type(value)
    return entry


def _dtype(entry: dict[Any, Any]) -> np.dtype[Any]:
    """The entry's numpy type; refuses those that could hold Python objects."""
    text = entry.get(b"dtype")
    dtype = np.dtype(text.decode() if isinstance(text, bytes) else str(text))
    if dtype.kind not in _KINDS:
        raise PersistWorldError(f"an array of numpy type '{dtype}' is refused")
    return dtype
