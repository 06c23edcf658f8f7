"""A copy of a model whose file says that it was made for more positions than it was: edgert refuses a longer
context than that, and what is measured past it is speed and memory alone."""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgert import _native
from edgert.locate import cache_dir

UINT32 = 4  # GGUF's number for the type


@contextmanager
def stretched(model: Path, context: int) -> Iterator[Path]:
    """``model``, or where it was made for less than ``context`` positions a copy that says otherwise."""
    if _trained(model) >= context:
        yield model
        return
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="long-", dir=cache_dir()) as directory:
        copy = Path(directory) / model.name
        shutil.copyfile(model, copy)
        set_context(copy, context)
        yield copy


def set_context(model: Path, context: int) -> None:
    """Make the file say that its model was made for ``context`` positions."""
    key = f"{_native.GgufFile(str(model)).get('general.architecture')}.context_length".encode()
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<I", UINT32)
    with model.open("r+b") as file:
        header = file.read(1 << 16)
        at = header.index(entry) + len(entry)
        file.seek(at)
        file.write(struct.pack("<I", context))


def _trained(model: Path) -> int:
    file = _native.GgufFile(str(model))
    return int(file.get(f"{file.get('general.architecture')}.context_length"))
