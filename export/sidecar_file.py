"""Writes a part of a model's sidecar and keeps the others that it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from edgert.export.gguf_writer import Tensor, TensorType, Value, write_gguf

from edgert.download import file_sha256
from edgert.errors import ModelFileError
from edgert.session_file import fingerprint
from edgert.sidecar import VERSION, Sidecar


def write_part(
    path: Path, model: Path, keys: str, prefix: str, metadata: Mapping[str, Value], tensors: Sequence[Tensor]
) -> None:
    """Write ``metadata``, whose keys begin with ``keys``, and ``tensors``, whose names begin with ``prefix``,
    into the sidecar at ``path``, whole or not at all. What an older sidecar of the same model holds beside
    them stays; one that is damaged or of another model is replaced. Raises OutputError."""
    old: dict[str, Value] = {}
    kept: list[Tensor] = []
    try:
        file = Sidecar(path, model).file if path.exists() else None
    except ModelFileError:
        file = None
    if file:
        for key in file.metadata_keys:
            if not key.startswith((keys, "general.", "edgert.version", "edgert.base.")):
                value = file.get(key)
                old[key] = np.asarray(value, np.int32) if isinstance(value, list) else value
        for t in file.tensors:
            if not t.name.startswith(prefix):
                data = np.frombuffer(file.read(t.name), np.uint8)
                kept.append(Tensor(t.name, cast(TensorType, t.type), t.shape, data))
    base: dict[str, Value] = {
        "general.architecture": "edgert",
        "edgert.version": VERSION,
        "edgert.base.bytes": model.stat().st_size,
        "edgert.base.fingerprint": fingerprint(model),
        "edgert.base.sha256": file_sha256(model),
    }
    write_gguf(path, {**base, **old, **metadata}, [*kept, *tensors])
