"""Exported graphs of tiny models, and sequences on them."""

from __future__ import annotations

from pathlib import Path

from edgert.bench import onnx_run
from edgert.export.onnx_model import build

from edgert import _native
from edgert.engines import native_spec
from edgert.sidecar import Sidecar

SLOTS = 96


def export(model: Path, directory: Path, quant: str = "f32", sidecar: Path | None = None) -> Path:
    """Write the graph of a GGUF file to ``directory``/model.onnx."""
    directory.mkdir(exist_ok=True)
    file = _native.GgufFile(str(model))
    spec = native_spec(file, file.metadata)
    with (directory / "model.onnx.data").open("wb") as data:
        side = Sidecar(sidecar, model) if sidecar else None
        graph, _ = build(file, spec, quant, side, data, "model.onnx.data", lambda n: None)
    (directory / "model.onnx").write_bytes(graph.SerializeToString())
    return directory / "model.onnx"


class Run(onnx_run.Run):
    def __init__(self, path: Path, slots: int = SLOTS, window_slots: int = SLOTS, threads: int = 1) -> None:
        super().__init__(path, slots, window_slots, threads)
