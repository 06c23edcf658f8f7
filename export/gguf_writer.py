"""Writes GGUF version 3: models and sidecars.

Layout, integers little-endian: "GGUF", u32 3, u64 tensors, u64 keys; each key as string, u32 type, value;
each tensor as name, u32 number of dimensions, u64 each (the contiguous one first), u32 type, u64 offset;
then the tensors' data, each at a multiple of :data:`ALIGNMENT`, offsets counted from the first. A string is
u64 length and UTF-8 bytes; a boolean one byte; an array u32 element type, u64 count, values.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.errors import EdgertError
from edgert.whole_file import write_whole

ALIGNMENT = 32
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64 = 4, 5, 6, 7, 8, 9, 10
TensorType = Literal["F32", "F16", "Q4_0", "Q8_0"]
# Type -> its number in a file, values of a block, bytes of a block.
_TENSOR_TYPES: dict[TensorType, tuple[int, int, int]] = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q8_0": (8, 32, 34),
}

# Strings are strings, integers u64 where u32 is too small, numbers f32; arrays of integers i32. A list
# holds one type.
Value = str | int | float | npt.NDArray[np.int32] | list[str] | list[int] | list[float] | list[bool]


class Tensor(NamedTuple):
    """``shape``: outermost dimension first, in values; ``data``: the bytes of ``type``."""

    name: str
    type: TensorType
    shape: Sequence[int]
    data: npt.NDArray[np.uint8]


class Streamed(NamedTuple):
    """A tensor whose bytes are made while the file is written: ``parts()`` gives them in order."""

    name: str
    type: TensorType
    shape: Sequence[int]
    parts: Callable[[], Iterable[npt.NDArray[np.uint8]]]


class OutputError(EdgertError):
    """A file that could not be written; what was there before is still there."""


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: Sequence[Tensor | Streamed]) -> None:
    """Write ``path``, whole or not at all. Raises OutputError, and what ``parts`` of a tensor raise."""
    header = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        header += [_string(key), _value(value)]
    offset = 0
    for t in tensors:
        dims = list(reversed(t.shape))
        header.append(_string(t.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        header.append(struct.pack("<IQ", _TENSOR_TYPES[t.type][0], offset))
        size = tensor_bytes(t.type, t.shape)
        offset += size + _padding(size)
    try:
        write_whole(path, _parts(b"".join(header), tensors))
        path.chmod(0o644)  # like the model it lies beside, for every user of the machine
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}; choose another place with --output"
        ) from error


def tensor_bytes(type: TensorType, shape: Sequence[int]) -> int:
    _, block, size = _TENSOR_TYPES[type]
    return math.prod(shape) // block * size


def _parts(head: bytes, tensors: Iterable[Tensor | Streamed]) -> Iterator[Any]:
    yield head
    yield bytes(_padding(len(head)))
    for t in tensors:
        size, expected = 0, tensor_bytes(t.type, t.shape)
        for data in (t.data,) if isinstance(t, Tensor) else t.parts():
            size += data.size
            yield np.ascontiguousarray(data).data
        # The offsets of all that follows are in the header already.
        if size != expected:
            raise ValueError(f"{t.name}: expected {expected} bytes of {t.type}, found {size}")
        yield bytes(_padding(size))


def _padding(size: int) -> int:
    return -size % ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value) if value < 2**32 else struct.pack("<IQ", _U64, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    kind, data = _elements(value)
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + data


def _elements(values: npt.NDArray[np.int32] | list[Any]) -> tuple[int, bytes]:
    """Element type and bytes of an array."""
    if isinstance(values, np.ndarray):
        return _I32, values.astype("<i4").tobytes()
    first = values[0] if values else ""
    if isinstance(first, str):
        return _STRING, b"".join(map(_string, values))
    if isinstance(first, bool):
        return _BOOL, bytes(values)
    kind, dtype = (_F32, "<f4") if isinstance(first, float) else (_I32, "<i4")
    return kind, np.array(values, dtype).tobytes()
