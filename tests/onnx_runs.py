"""Exported graphs of tiny models, which lie in one temporary directory until the process ends, and sequences
on them."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from edgert.bench import onnx_run
from edgert.export.onnx_model import build
from tiny_models import tiny

from edgert import _native
from edgert.engines import native_spec
from edgert.sidecar import Sidecar

SLOTS = 96
_DIRECTORY = tempfile.TemporaryDirectory(prefix="edgert-onnx-")


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a part of the largest of what is expected."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def new_directory() -> Path:
    return Path(tempfile.mkdtemp(dir=_DIRECTORY.name))


def export(
    model: Path, directory: Path, quant: str = "f32", sidecar: Path | None = None, kv: str = "f32"
) -> Path:
    """Write the graph of a GGUF file to ``directory``/model.onnx."""
    directory.mkdir(exist_ok=True)
    file = _native.GgufFile(str(model))
    spec = native_spec(file, file.metadata)
    with (directory / "model.onnx.data").open("wb") as data:
        side = Sidecar(sidecar, model) if sidecar else None
        graph, _ = build(file, spec, quant, kv, side, data, "model.onnx.data", lambda n: None)
    (directory / "model.onnx").write_bytes(graph.SerializeToString())
    return directory / "model.onnx"


@cache
def exported(name: str, quant: str = "f32", file: str = "F32", kv: str = "f32") -> Path:
    """The graph of a tiny model."""
    return export(tiny(name, file).path, new_directory(), quant, kv=kv)


class Run(onnx_run.Run):
    def __init__(
        self,
        path: Path,
        slots: int = SLOTS,
        window_slots: int = SLOTS,
        threads: int = 1,
        integers: bool = True,
    ) -> None:
        super().__init__(path, slots, window_slots, threads, integers)
