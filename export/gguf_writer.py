"""Writes GGUF version 3: what a sidecar needs of it.

Layout, integers little-endian: "GGUF", u32 3, u64 tensors, u64 keys; each key as string, u32 type, value;
each tensor as name, u32 number of dimensions, u64 each (the contiguous one first), u32 type, u64 offset;
then the tensors' data, each at a multiple of :data:`ALIGNMENT`, offsets counted from the first. A string is
u64 length and UTF-8 bytes; an array u32 element type, u64 count, values.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.errors import EdgertError
from edgert.whole_file import write_whole

ALIGNMENT = 32
_U32, _I32, _STRING, _ARRAY, _U64 = 4, 5, 8, 9, 10
TensorType = Literal["F32", "Q4_0", "Q8_0"]
_TENSOR_TYPES: dict[TensorType, int] = {"F32": 0, "Q4_0": 2, "Q8_0": 8}

# Strings are strings, integers u64 where u32 is too small, arrays int32.
Value = str | int | npt.NDArray[np.int32]


class Tensor(NamedTuple):
    """``shape``: outermost dimension first, in values; ``data``: the bytes of ``type``."""

    name: str
    type: TensorType
    shape: Sequence[int]
    data: npt.NDArray[np.uint8]


class OutputError(EdgertError):
    """A file that could not be written; what was there before is still there."""


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: Sequence[Tensor]) -> None:
    """Write ``path``, whole or not at all. Raises OutputError."""
    header = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        header += [_string(key), _value(value)]
    offset = 0
    for t in tensors:
        dims = list(reversed(t.shape))
        header.append(_string(t.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        header.append(struct.pack("<IQ", _TENSOR_TYPES[t.type], offset))
        offset += t.data.size + _padding(t.data.size)
    head = b"".join(header)
    parts: list[Any] = [head, bytes(_padding(len(head)))]
    for t in tensors:
        parts += [np.ascontiguousarray(t.data).data, bytes(_padding(t.data.size))]
    try:
        write_whole(path, parts)
        path.chmod(0o644)  # like the model it lies beside, for every user of the machine
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}; choose another place with --output"
        ) from error


def _padding(size: int) -> int:
    return -size % ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value) if value < 2**32 else struct.pack("<IQ", _U64, value)
    return struct.pack("<IIQ", _ARRAY, _I32, value.size) + value.astype("<i4").tobytes()
