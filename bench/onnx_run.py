"""One sequence on the graph of an ONNX export, its caches bound in place: what the benchmarks of graphs
run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from edgert.engines.onnx_caches import DTYPES


class Run:
    """The graph in the file ``path`` (export/onnx_model.py has its inputs and outputs) with caches of
    ``slots``, those of windowed layers of ``window_slots``."""

    def __init__(self, path: Path, slots: int, window_slots: int, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = self.session.get_inputs()
        self.shapes: dict[str, list[Any]] = {i.name: i.shape for i in inputs}
        self.kv = "f16" if any(i.type == "tensor(float16)" for i in inputs) else "f32"
        sizes = {"slots": slots, "window_slots": window_slots}
        self.caches = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros([sizes.get(n, n) for n in shape], DTYPES[self.kv if name[0] in "kv" else "f32"])
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
        **more: npt.NDArray[Any],
    ) -> list[npt.NDArray[Any]]:
        """The ``outputs`` of a pass over ``tokens``, the first at ``position``, for ``rows`` (None: all).
        ``more`` are inputs with other values than those of a plain sequence by the dense head."""
        n = len(tokens)
        feeds = {
            "input_ids": np.array([tokens]),
            "positions": np.arange(position, position + n)[None],
            "filled": np.array([-1], np.int32),
            "rows": np.arange(n) if rows is None else np.array(rows, np.int64),
            "more_states": np.zeros((1, 0, self.shapes["more_states"][2]), np.float32),
            "flash": np.array(False),
            "window_start": np.zeros(1, np.int32),
            **more,
        }
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
