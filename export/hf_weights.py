"""The weights of a checkpoint as GGUF has them: names, order of rows, types.

They are read, changed and quantised in pieces while a file is written: memory holds a few pieces, never a
tensor.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from edgert.export.checkpoint import Checkpoint
from edgert.export.gguf_writer import TensorType
from edgert.export.quantise import Codes, Matrix, q4_0, q8_0
from edgert.models import FAMILIES, ModelSpec

from edgert.errors import ModelFileError, UnsupportedModelError

# Largest value a type holds: that of an f16, times the largest code where there is a scale.
_LARGEST = {"F32": math.inf, "F16": 65504.0, "Q8_0": 65504.0 * 127, "Q4_0": 65504.0 * 6}
_PIECE = 1 << 20  # values read and quantised at once


@dataclass(frozen=True)
class Weight:
    """A tensor of the file, ``source`` in the checkpoint. ``halves``: rows of a head whose two halves are
    dealt alternately, 0 where rows keep their place; ``plus``: is added to every value."""

    name: str
    source: str
    type: TensorType
    shape: tuple[int, ...]
    halves: int
    plus: float


def find_weights(
    spec: ModelSpec, checkpoint: Checkpoint, directory: Path, matrices: TensorType
) -> list[Weight]:
    """What the file will hold, with matrices as ``matrices`` where rows allow it. Raises ModelFileError and
    UnsupportedModelError when the checkpoint's tensors are not those of ``spec``."""
    names: dict[str, str] = FAMILIES[spec.family].hf_tensor_names(spec)
    shapes = spec.tensor_shapes()
    missing = [source for source in names.values() if source not in checkpoint.tensors]
    if missing:
        raise ModelFileError(
            f"{directory}: the checkpoint lacks {len(missing)} tensors of this {spec.family} model: "
            f"{', '.join(missing[:5])}; download all of its files, and the config.json that belongs to them",
            str(directory),
            -1,
            missing[0],
        )
    for name, source in names.items():
        _check_shape(checkpoint, source, shapes[name], "shortconv.conv" in name)
    known = {*names.values(), *(["lm_head.weight"] if spec.tied_head else [])}
    # Old checkpoints keep the rope's frequencies, which the config gives.
    extra = [n for n in checkpoint.tensors if n not in known and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        raise UnsupportedModelError(
            f"{directory}: tensors not implemented for {spec.family}: {', '.join(sorted(extra)[:5])}; "
            "the model without them would be another"
        )
    return [_weight(spec, name, source, shapes[name], matrices) for name, source in names.items()]


def _check_shape(checkpoint: Checkpoint, source: str, shape: tuple[int, ...], conv: bool) -> None:
    stored = checkpoint.tensors[source]
    expected = (shape[0], 1, shape[1]) if conv else shape
    if stored.shape != expected:
        raise ModelFileError(
            f"{stored.path}: {source}: expected shape {list(expected)} by config.json, found "
            f"{list(stored.shape)}; use the config.json that belongs to these weights",
            str(stored.path),
            stored.offset,
            source,
        )


def _weight(spec: ModelSpec, name: str, source: str, shape: tuple[int, ...], matrices: TensorType) -> Weight:
    kind = matrices
    if len(shape) == 1 or "shortconv.conv" in name:
        kind = "F32"
    elif matrices in ("Q8_0", "Q4_0") and shape[-1] % 32:
        kind = "F16"
    permuted = spec.family == "llama" and (".attn_q." in name or ".attn_k." in name)
    # The Hugging Face code adds this 1 when it runs.
    plus = 1.0 if spec.family == "gemma3" and name.endswith("norm.weight") else 0.0
    return Weight(name, source, kind, shape, spec.head_dim if permuted else 0, plus)


def encoded(
    weight: Weight, checkpoint: Checkpoint, pool: ThreadPoolExecutor, done: Callable[[int], None]
) -> Iterator[Codes]:
    """The bytes of ``weight`` in pieces, read in turn and quantised by ``pool``; ``done`` counts values."""
    ahead = os.cpu_count() or 1
    cols = weight.shape[-1]
    rows = math.prod(weight.shape) // cols
    unit = weight.halves or 1
    step = max(1, _PIECE // (cols * unit)) * unit
    running: deque[Future[Codes]] = deque()
    for first in range(0, rows, step):
        count = min(step, rows - first)
        x = checkpoint.read(weight.source, first * cols, count * cols).reshape(count, cols)
        running.append(pool.submit(_piece, weight, x, checkpoint.tensors[weight.source].path))
        if len(running) > ahead:
            yield running.popleft().result()
        done(count * cols)
    while running:
        yield running.popleft().result()


def _piece(weight: Weight, x: Matrix, path: Path) -> Codes:
    if weight.halves:
        # Pair i of a head is rows (i, i + half) there and (2 i, 2 i + 1) in GGUF's llama.
        heads = x.reshape(-1, 2, weight.halves // 2, x.shape[1])
        x = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(x.shape)
    if weight.plus:
        x = x + np.float32(weight.plus)
    largest = float(np.abs(x).max())
    if not largest <= _LARGEST[weight.type] or math.isinf(largest):
        found = f"{largest:g}" if math.isfinite(largest) else "NaN or infinity"
        raise ModelFileError(
            f"{path}: {weight.source}: expected values up to {_LARGEST[weight.type]:g} for {weight.type}, "
            f"found {found}; " + ("use --quant f32" if math.isfinite(largest) else "the weights are damaged"),
            str(path),
            -1,
            weight.source,
        )
    if weight.type == "Q8_0":
        return q8_0(x)
    if weight.type == "Q4_0":
        return q4_0(x)
    return (x.astype(np.float16) if weight.type == "F16" else x).view(np.uint8)
