"""Exported graphs of tiny models, and a session on one with its caches bound in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
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


class Run:
    """A sequence on the graph ``path``: caches of ``slots``, those of windowed layers of ``window_slots``."""

    def __init__(self, path: Path, slots: int = SLOTS, window_slots: int = SLOTS) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.shapes = {i.name: i.shape for i in self.session.get_inputs()}
        sizes = {"slots": slots, "window_slots": window_slots}
        self.caches = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros([sizes.get(n, n) for n in shape], np.float32)
            )
            for name, shape in self.shapes.items()
            if "." in name
        }

    def __call__(
        self,
        tokens: Sequence[int],
        position: int,
        outputs: Iterable[str] = ("logits",),
        rows: Sequence[int] | None = None,
        **more: Any,
    ) -> list[npt.NDArray[Any]]:
        """The ``outputs`` of a pass over ``tokens``, the first at ``position``; ``rows`` None: of all."""
        n = len(tokens)
        feeds = {
            "input_ids": np.array([tokens]),
            "positions": np.arange(position, position + n)[None],
            "filled": np.array([-1], np.int32),
            "rows": np.arange(n) if rows is None else np.array(rows, np.int64),
            "flash": np.array(False),
            "window_start": np.zeros(1, np.int32),
        }
        if "more_states" in self.shapes:
            feeds["more_states"] = np.zeros((1, 0, self.shapes["more_states"][2]), np.float32)
        feeds |= more
        binding = self.session.io_binding()
        for name, cache in self.caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace(".", "_out."), cache)
        for name in feeds.keys() & self.shapes.keys():
            binding.bind_cpu_input(name, feeds[name])
        for name in outputs:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()[len(self.caches) :]]
