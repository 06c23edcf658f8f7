"""Writes a part of a sidecar and keeps the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from edgert.export.gguf_writer import Tensor, TensorType, Value, write_gguf

from edgert import _native
from edgert.download import file_sha256
from edgert.errors import EdgertError
from edgert.locate import find_sidecar
from edgert.session_file import fingerprint
from edgert.sidecar import VERSION, Sidecar


def write_part(
    target: Path, model: Path, part: str, metadata: Mapping[str, Value], tensors: Sequence[Tensor] = ()
) -> None:
    """Write the sidecar ``target`` of ``model`` with the keys ``metadata`` and the ``tensors`` of a part,
    whose names begin with "edgert.<part>." and "<part>.". What the sidecar there is has of other parts stays;
    one that is damaged or of another file counts for nothing. Raises OutputError."""
    keys: dict[str, Value] = {
        "general.architecture": "edgert",
        "edgert.version": VERSION,
        "edgert.base.bytes": model.stat().st_size,
        "edgert.base.fingerprint": fingerprint(model),
        "edgert.base.sha256": file_sha256(model),
    }
    others: list[Tensor] = []
    old = _open(target if target.exists() else find_sidecar(model), model)
    if old:
        for key in old.metadata_keys:
            if key not in keys and not key.startswith(f"edgert.{part}."):
                value = old.get(key)
                keys[key] = np.asarray(value, np.int32) if isinstance(value, list) else value
        others = [
            Tensor(t.name, cast(TensorType, t.type), t.shape, np.frombuffer(old.read(t.name), np.uint8))
            for t in old.tensors
            if not t.name.startswith(f"{part}.")
        ]
    write_gguf(target, {**keys, **metadata}, [*others, *tensors])


def _open(path: Path | None, model: Path) -> _native.GgufFile | None:
    """The sidecar at ``path`` if it is one of ``model``."""
    if path is None:
        return None
    try:
        return Sidecar(path, model).file
    except EdgertError:
        return None
