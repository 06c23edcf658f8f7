"""The dense baseline with an int8 head: a copy of the model whose head is Q8_0, made for one run.

A head of fewer bits reads less and one of more bits reads more, so a FlashHead is compared with both. The
copy's bytes are the model's own but for the entry of one tensor, which is given another type and the place
behind the old end of the file, where its new values stand; the old ones stay, unread.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from edgert.bench.measure import say
from edgert.bench.request import HEAD_TENSORS
from edgert.bench.settings import Setting
from edgert.bench.suite import Request

from edgert import _native
from edgert.locate import cache_dir

Q8_0, BLOCK = 8, 32
ROWS = 8192  # quantised at a time


@contextmanager
def with_int8_head(request: Request) -> Iterator[Request]:
    """``request`` with an int8 baseline behind each dense head of another type. Where none can be made, a
    line on stderr says why and the request stays as it is."""
    dense = [s for s in request.settings if s.engine == "edgert" and s.head == "dense"]
    if not dense or request.reference.variant == "Q8_0":
        yield request
        return
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(prefix="int8-head-", dir=cache_dir())
    except OSError as error:
        say(f"no int8 baseline: cannot write to {cache_dir()}: {error.strerror}")
        yield request
        return
    with place as directory:
        copy = Path(directory) / request.model.name
        try:
            requantise(request.model, copy)
        except (OSError, ValueError) as error:
            say(f"no int8 baseline: {error}")
            yield request
            return
        settings: list[Setting] = []
        for setting in request.settings:
            settings.append(setting)
            if setting in dense:
                settings.append(replace(setting, source=str(copy), variant="Q8_0 (baseline)"))
        yield replace(request, settings=tuple(settings))


def requantise(model: Path, copy: Path) -> None:
    """Write ``copy``. Raises ValueError for a model whose head cannot be Q8_0, and OSError."""
    file = _native.GgufFile(str(model))
    head = next(t for name in HEAD_TENSORS for t in file.tensors if t.name == name)
    if any(t.shard for t in file.tensors):
        raise ValueError("the model is split into several files")
    if len(head.shape) != 2 or head.shape[1] % BLOCK:
        raise ValueError(f"{head.name} {list(head.shape)} has rows that are no multiple of {BLOCK} long")
    say(f"making a copy of the model with an int8 head ({head.name} is {head.type})")
    entry = struct.pack("<Q", len(head.name)) + head.name.encode()
    entry += struct.pack("<I2Q", 2, head.shape[1], head.shape[0])
    shutil.copyfile(model, copy)
    with copy.open("r+b") as out:
        header = out.read(min(t.offset for t in file.tensors))
        at = header.rfind(entry) + len(entry)
        if at < len(entry):
            raise ValueError(f"{head.name} is not where the file's header ends")
        (relative,) = struct.unpack_from("<Q", header, at + 4)
        data = head.offset - relative
        alignment = int(file.get("general.alignment", 32))
        end = out.seek(0, 2)
        start = end + (data - end) % alignment
        out.write(bytes(start - end))
        values = file.dequantize(head.name)
        for row in range(0, len(values), ROWS):
            out.write(q8_0(values[row : row + ROWS]).tobytes())
        out.seek(at)
        out.write(struct.pack("<IQ", Q8_0, start - data))


def q8_0(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Rows as GGUF's Q8_0: blocks of 32 values, an f16 scale and int8 codes. Bit for bit the exporter's."""
    blocks = x.reshape(-1, BLOCK)
    scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    wide = scale.astype(np.float32)
    inverse = np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)
    codes = np.clip(np.rint(blocks * inverse), -127, 127).astype(np.int8)
    return np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], 1)
