"""What a sequence on ONNX Runtime remembers: keys and values in slots, and the states of convolutions.

Every cache is bound to a pass as input and as output in one and the same memory (export/onnx_model.py), so
that a pass writes its new rows and copies nothing.

On the processor a cache has all its slots from the start as memory that the system gives when it is first
written to: what is in use is what counts, and no cache ever moves. A device gives all of it at once, which
keeps shapes and addresses fixed, as CUDA graphs want them.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgert.errors import EngineError
from edgert.models import ModelSpec

Rows = npt.NDArray[np.floating[Any]]
DTYPES: dict[str, type[np.floating[Any]]] = {"f32": np.float32, "f16": np.float16}  # of keys and values

# Positions that a windowed layer keeps beyond its window when its slots are full, for going back. Exact
# blocks are 16 tokens long.
SPARE = 64
STATES = 32  # states of convolutions that are kept, of as many passes


class Buffer:
    """Zeros of float32 or float16, ``kind`` "f32" or "f16", [*shape] on ``device``, "cpu" or "cuda"."""

    def __init__(self, runtime: Any, shape: tuple[int, ...], device: str, kind: str = "f32") -> None:
        self.dtype = np.dtype(DTYPES[kind])
        self._own: Rows | None = None
        if device == "cpu":
            pages = mmap.mmap(-1, self.dtype.itemsize * math.prod(shape))
            self._own = np.frombuffer(pages, self.dtype).reshape(shape)
            self.value = runtime.OrtValue.ortvalue_from_numpy(self._own)
        else:
            self.value = runtime.OrtValue.ortvalue_from_numpy(np.zeros(shape, self.dtype), device, 0)

    def read(self) -> Rows:
        """What is in it: the memory itself on the processor, else a copy."""
        if self._own is not None:
            return self._own
        copy: Rows = self.value.numpy()
        return copy

    def write(self, rows: Rows) -> None:
        """Take over ``rows``, the array of :meth:`read` with other values."""
        if self._own is None:
            self.value.update_inplace(rows)


class Caches(Protocol):
    """Caches of the layers that see everything: by the names of the graph's inputs, bytes of a slot of all of
    them, and what a snapshot has of them."""

    buffers: dict[str, Buffer]

    @property
    def row_bytes(self) -> int: ...

    def parts(self, length: int) -> Iterator[tuple[Buffer, tuple[int, ...]]]: ...

    def clear(self) -> None: ...


class Slots:
    """Keys and values of attention layers with the same number of slots, those with a window or those
    without: of type ``kv`` [1, KV heads, slots, head dim] each. Slot s has position ``start + s``. With a
    ``window`` there are slots for that, for :data:`SPARE` and for one pass of ``longest`` tokens."""

    def __init__(
        self,
        runtime: Any,
        spec: ModelSpec,
        kv: str,
        windowed: bool,
        positions: int,
        longest: int,
        device: str,
    ) -> None:
        layers = [
            (i, layer)
            for i, layer in enumerate(spec.layers)
            if layer.kind == "attention" and (layer.window > 0) == windowed
        ]
        self._seen = max((layer.window for _, layer in layers), default=1) - 1  # before a token
        self._kept = self._seen + SPARE
        self.slots = min(positions, self._kept + longest) if windowed and layers else positions
        self.start = 0
        self.buffers = {
            f"{c}.{i}": Buffer(runtime, (1, layer.n_kv_heads, self.slots, spec.head_dim), device, kv)
            for i, layer in layers
            for c in "kv"
        }
        width = sum(2 * layer.n_kv_heads * spec.head_dim for _, layer in layers)
        self._row_bytes = np.dtype(DTYPES[kv]).itemsize * width

    @property
    def row_bytes(self) -> int:
        return self._row_bytes

    def make_room(self, length: int, new: int) -> None:
        """See to slots for ``new`` tokens after ``length`` positions: those that the window has left go."""
        if length - self.start + new <= self.slots:
            return
        start = length - self._kept
        for buffer in self.buffers.values():
            rows = buffer.read()
            rows[:, :, : self._kept] = rows[:, :, start - self.start : length - self.start]
            buffer.write(rows)
        self.start = start

    def reaches(self, length: int) -> bool:
        """Whether what a token at ``length`` sees is there."""
        return self.start == 0 or length - self.start >= self._seen

    def clear(self) -> None:
        self.buffers.clear()

    def parts(self, length: int) -> Iterator[tuple[Buffer, tuple[int, ...]]]:
        """Buffers, and the shape of their rows in use with ``length`` positions."""
        for buffer in self.buffers.values():
            _, heads, _, dim = buffer.value.shape()
            yield buffer, (heads, length - self.start, dim)


class States:
    """States of convolutions, float32 [1, dim, taps - 1] a layer, after each of the last passes. A pass reads
    the one and writes the next, so that none is lost when it is interrupted. All of it does nothing for a
    model without convolutions."""

    def __init__(self, runtime: Any, spec: ModelSpec, device: str) -> None:
        layers = [i for i, layer in enumerate(spec.layers) if layer.kind == "conv"]
        shape = (1, spec.dim, spec.conv_kernel - 1)
        # The first one is never written: zeros, the state before any token.
        self._sets = [
            {f"conv.{i}": Buffer(runtime, shape, device) for i in layers}
            for _ in range(1 + STATES if layers else 0)
        ]
        self._positions = [0] + [-1] * STATES  # that each comes after; -1: none
        self._at = self._written = 0

    def read(self, length: int) -> dict[str, Buffer]:
        """The states after ``length`` positions, which must be there; later ones are forgotten."""
        if self.rewind(length) != length:
            raise EngineError(f"the states of convolutions at position {length} are lost")
        return self._sets[self._at] if self._sets else {}

    def write(self) -> dict[str, Buffer]:
        """Where a pass that read the latest states may write: over the oldest."""
        self._written = self._at % STATES + 1
        self._positions[self._written] = -1
        return self._sets[self._written] if self._sets else {}

    def keep(self, length: int) -> None:
        """What was written are the states after ``length`` positions."""
        self._positions[self._written], self._at = length, self._written

    def rewind(self, length: int) -> int:
        """Forget states after ``length``; returns the latest position there is one for."""
        if not self._sets:
            return length
        self._positions = [p if p <= length else -1 for p in self._positions]
        self._at = int(np.argmax(self._positions))
        return self._positions[self._at]

    def clear(self) -> None:
        self._sets.clear()
