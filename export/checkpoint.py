"""The tensors of a Hugging Face checkpoint: one ``model.safetensors``, or shards and their index.

A safetensors file is a u64 length (little-endian), that many bytes of JSON, and the data. The JSON has for
each tensor its dtype, shape and the range of its bytes, counted from the first one after the JSON; together
the ranges cover the data exactly once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from edgert.errors import ModelFileError, UnsupportedModelError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # the limit of the format's own reader
MAX_JSON = 256 << 20
# dtype -> bytes of a value; and those that weights may have, as numpy reads them.
_WIDTHS = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}
_WIDTHS |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
_KINDS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class Stored(NamedTuple):
    """``offset`` is that of the first byte in the file ``path``."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_json(path: Path, field: str) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ModelFileError, as all of this module."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ModelFileError(
                f"{path} is too large: expected at most {MAX_JSON} bytes", str(path), 0, field
            )
        text = path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}", str(path), -1, field) from error
    return _object(text, path, 0, field)


def _object(text: bytes, path: Path, offset: int, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(
            f"{path}: {field} is not JSON ({error}); the file is damaged, download it again",
            str(path),
            offset,
            field,
        ) from error
    if not isinstance(value, dict):
        raise ModelFileError(
            f"{path}: {field}: expected a JSON object, found {type(value).__name__}", str(path), offset, field
        )
    return value


class Checkpoint:
    """The tensors of the model in ``directory``, by their names. Opening reads and checks the headers."""

    def __init__(self, directory: Path) -> None:
        self._stack = ExitStack()
        self._files: dict[Path, BinaryIO] = {}
        self.tensors: dict[str, Stored] = {}
        try:
            for path in _files(directory):
                self._open(path)
            _check_index(directory, self.tensors)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def _open(self, path: Path) -> None:
        try:
            file = self._stack.enter_context(path.open("rb"))
            found = _header(file, path)
        except OSError as error:
            raise ModelFileError(f"cannot read {path}: {error.strerror}", str(path), -1, "weights") from error
        self._files[path] = file
        for name, stored in found.items():
            if name in self.tensors:
                other = self.tensors[name].path.name
                raise _bad(path, stored.offset, name, "every tensor once", f"it in {other} too")
            self.tensors[name] = stored

    def read(self, name: str, first: int, count: int) -> npt.NDArray[np.float32]:
        """``count`` values of tensor ``name`` from value ``first`` on, row by row, [count].

        Read and not mapped: a file that shrinks meanwhile is an error, not a crash."""
        stored = self.tensors[name]
        if stored.dtype not in _KINDS:
            raise UnsupportedModelError(
                f"{stored.path}: {name} is {stored.dtype}; expected {', '.join(_KINDS)}: save the model in "
                "one of these with transformers, unquantised"
            )
        size = _WIDTHS[stored.dtype]
        file, offset = self._files[stored.path], stored.offset + first * size
        try:
            file.seek(offset)
            data = file.read(count * size)
        except OSError as error:
            raise ModelFileError(
                f"cannot read {stored.path}: {error.strerror}", str(stored.path), offset, name
            ) from error
        if len(data) != count * size:
            raise _bad(stored.path, offset, name, f"{count * size} bytes", f"{len(data)}")
        values = np.frombuffer(data, _KINDS[stored.dtype])
        if stored.dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)  # the upper half of a float32
        return values.astype(np.float32)


def _files(directory: Path) -> list[Path]:
    """The files that hold the weights; one file wins over an index, as in transformers."""
    if (directory / WHOLE).exists():
        return [directory / WHOLE]
    if not (directory / INDEX).exists():
        raise ModelFileError(
            f"{directory} has neither {WHOLE} nor {INDEX}; download the weights, or save them in that format "
            "with transformers' save_pretrained",
            str(directory),
            -1,
            WHOLE,
        )
    return [directory / name for name in sorted(set(_weight_map(directory / INDEX).values()))]


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor -> name of its file, which lies in the directory of the index and nowhere else."""
    names = read_json(path, "the index").get("weight_map")
    if not isinstance(names, dict) or not names:
        raise _bad(path, 0, "weight_map", "a table of tensors and files", repr(names)[:40])
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise _bad(path, 0, "weight_map", "names of .safetensors files beside it", repr(name)[:60])
    return names


def _check_index(directory: Path, tensors: dict[str, Stored]) -> None:
    if (directory / WHOLE).exists():
        return
    for name, file in _weight_map(directory / INDEX).items():
        if name not in tensors or tensors[name].path.name != file:
            raise _bad(directory / file, -1, name, f"it in this file, as {INDEX} has it", "no such tensor")


def _header(file: BinaryIO, path: Path) -> dict[str, Stored]:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
        most = max(0, min(size - 8, MAX_HEADER))
        raise _bad(path, 0, "header length", f"2 to {most} bytes in a file of {size}", length)
    data = 8 + length
    entries = _object(file.read(length), path, 8, "header")
    entries.pop("__metadata__", None)
    ranges = sorted((*_range(path, name, entry), name) for name, entry in entries.items())
    _check_cover(path, data, size - data, ranges)
    return {
        name: Stored(path, entries[name]["dtype"], tuple(entries[name]["shape"]), data + begin)
        for begin, _, name in ranges
    }


def _range(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """First byte of a tensor in the data, and the one after its last; as many as dtype and shape need."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    width = _WIDTHS.get(str(dtype))
    if width is None:
        raise _bad(path, 8, name, f"a dtype, one of {', '.join(_KINDS)}", repr(dtype)[:40])
    if not _sizes(shape) or len(shape) > 8:
        raise _bad(path, 8, name, "a shape of at most 8 sizes", repr(shape)[:60])
    if not _sizes(offsets) or len(offsets) != 2:
        raise _bad(path, 8, name, "two data_offsets", repr(offsets)[:60])
    begin, end = offsets
    needed = math.prod(shape) * width
    if end - begin != needed:
        raise _bad(path, 8, name, f"{needed} bytes for {dtype} {shape}", f"data_offsets {offsets}")
    return begin, end


def _sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _check_cover(path: Path, data: int, size: int, ranges: Iterable[tuple[int, int, str]]) -> None:
    at = 0
    for begin, end, name in ranges:
        if begin != at:
            found = f"{begin}: tensors overlap" if begin < at else f"{begin}: bytes of no tensor"
            raise _bad(path, data + begin, name, f"data that begins at {at}", found)
        if end > size:
            raise _bad(path, data + begin, name, f"data up to byte {data + end}", f"the end at {data + size}")
        at = end
    if at != size:
        raise _bad(path, data + at, "data", f"its end at byte {data + at}", f"{size - at} bytes more")


def _bad(path: Path, offset: int, field: str, expected: object, found: object) -> ModelFileError:
    return ModelFileError(
        f"{path}: {field}: expected {expected}, found {found}; the file is damaged or incomplete, "
        "download it again",
        str(path),
        offset,
        field,
    )
