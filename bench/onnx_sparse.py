"""Sparse keys and values of an ONNX export against the same graph with all slots: ``python -m
edgert.bench.onnx_sparse DIR``.

Documents are read up to their last positions by a graph with slots for all of them, and go on from there in
steps of one token: with all slots, and with a working set (edgert/engines/onnx_sparse.py). Their steps take
turns, so that both see the same machine. Two tables: the time of a step and what it copies at each length, and
at the longest what is lost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
from edgert.bench.attention_quality import TURN, Text
from edgert.bench.context import build
from edgert.bench.eval_texts import Document, make_documents
from edgert.bench.onnx_run import Run

from edgert import _native
from edgert.engines.onnx_sparse import VOTERS, WorkingSet, full_layers
from edgert.models import ModelSpec
from edgert.tier import IN_MEMORY, Tier
from edgert.tokenizer import Tokenizer
from edgert.whole_file import write_whole

Rows = npt.NDArray[np.float32]
PASS = 256  # tokens of a pass over a prompt


class SparseRun:
    """A sequence of at most ``context`` tokens on the graph ``path`` with a working set of ``slots``."""

    def __init__(
        self, path: Path, spec: ModelSpec, context: int, slots: int, threads: int, tier: Tier = IN_MEMORY
    ) -> None:
        self.run = Run(path, 1, context, threads)
        self.set = WorkingSet(spec, context, slots, threads, tier)
        self.seconds = [0.0, 0.0, 0.0]  # of the last step: the set, the graph, the store with its votes
        self._bind()

    def _bind(self) -> None:
        bind(self.run, self.set.arrays)

    def read(self, tokens: Sequence[int]) -> Rows:
        """Append tokens, which see everything; returns the logits of the last, [vocab]."""
        filled = self.set.whole(len(tokens))
        try:
            self._bind()
            for at in range(0, len(tokens), PASS):
                part = tokens[at : at + PASS]
                # Rows are of the last pass.
                rows = range(max(0, len(part) - VOTERS), len(part)) if at + PASS >= len(tokens) else ()
                logits = self._pass(part, filled + at, rows)
            return logits[-1]
        finally:
            self.set.back()
            self._bind()

    def step(self, token: int) -> Rows:
        """Append a token, which sees the working set; returns its logits, [vocab]."""
        began = time.perf_counter()
        filled = self.set.step()
        self.seconds[0] = time.perf_counter() - began
        return self._pass([token], filled, [0])[-1]

    def _pass(self, tokens: Sequence[int], filled: int, rows: Sequence[int]) -> Rows:
        began = time.perf_counter()
        more = {"filled": np.array([filled], np.int32)}
        logits, queries = self.run(tokens, self.set.length, ("logits", "queries"), rows, **more)
        between = time.perf_counter()
        self.set.append(filled, len(tokens), queries[0])
        self.seconds[1:] = between - began, time.perf_counter() - between
        return logits[0]


def bind(run: Run, arrays: dict[str, Rows]) -> None:
    """Let ``run`` use these caches."""
    for name, array in arrays.items():
        run.caches[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)


@dataclass
class Length:
    """What was found with documents of one length."""

    tokens: int
    full: list[float] = field(default_factory=list)  # seconds of steps
    sparse: list[float] = field(default_factory=list)
    parts: list[list[float]] = field(default_factory=list)  # of these: the set, the graph, the store
    pages: list[int] = field(default_factory=list)  # copied by a step
    texts: dict[str, Text] = field(default_factory=dict)


class Bench:
    def __init__(self, directory: Path, slots: int, threads: int, tier: Tier = IN_MEMORY) -> None:
        self._path, self._slots, self._threads, self._tier = directory / "model.onnx", slots, threads, tier
        self.about = json.loads((directory / "edgert.json").read_text())
        self.spec = ModelSpec.from_dict(self.about["spec"])
        self.tokenizer = Tokenizer.from_gguf(_native.GgufFile(str(directory / "tokenizer.gguf")).metadata)

    def measure(self, document: Document, positions: int, found: Length) -> None:
        """Steps over the last ``positions`` of a document but its very last token, a target alone."""
        tokens, start = document.tokens, len(document.tokens) - positions - 1
        sparse = SparseRun(self._path, self.spec, len(tokens), self._slots, self._threads, self._tier)
        full = Run(self._path, 1, len(tokens), self._threads)
        everything = sparse.set.whole_arrays(len(tokens))
        del everything
        raise NotImplementedError
