"""The vocabulary heads of an ONNX graph: the dense one, and with it, when there is one, the FlashHead of a sidecar.

Both are branches of an ``If``: of two outputs of one graph ONNX Runtime computes both, whichever is asked for.

A FlashHead scores clusters of tokens cheaply, takes the best, and scores their tokens with the dense head's own rows
(FlashHead, arXiv 2603.14591). With routers a cluster's score is a product with the router's row; with low-rank rows it is
the largest score of its tokens in a space of low rank, and a cluster is a unit of 16 tokens. A sidecar that has both,
to read fewer low-rank rows, is used here without routers: a product with all of them at once is cheaper for
ONNX Runtime than gathering some.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from edgert.export.clusters import UNIT
from edgert.export.onnx_graph import Graph, value_info
from edgert.export.onnx_weights import Stored, Weights
from edgert.models import ModelSpec

from edgert.sidecar import Sidecar

# Added to a score so that no other comes near, and still a finite number.
_ALWAYS = 1e30


@dataclass(frozen=True)
class Flash:
    """``tokens`` [clusters, size], -1 where a cluster has fewer; ``chosen`` clusters are scored exactly, among them
    ``special`` ones, always."""

    sidecar: Sidecar
    tokens: npt.NDArray[np.int64]
    special: npt.NDArray[np.int64]
    chosen: int

    @classmethod
    def of(cls, sidecar: Sidecar) -> Flash:
        low = "lowrank" in sidecar.recipe
        size = UNIT if low else sidecar.cluster_size
        flat = np.asarray(sidecar.file.get("edgert.head.tokens"), np.int64)
        tokens = flat.reshape(-1, size)
        always = np.asarray(sidecar.file.get("edgert.head.special"), np.int64)
        special = np.unique(np.nonzero(np.isin(flat, always))[0] // size)
        chosen = (sidecar.keep if low else sidecar.probes) + len(special)
        return cls(sidecar, tokens, special, min(chosen, len(tokens)))

    def scores(self, g: Graph, w: Weights, states: str) -> str:
        """Of each cluster, [1, R + E, clusters]."""
        if "lowrank" in self.sidecar.recipe:
            image = w.product(states, self._matrix(w, "head.projection"), (1, "S"))
            each = w.product(image, self._matrix(w, "head.rows"), (1, "S"))
            apart = g.node("Reshape", each, g.constant(np.array([1, -1, len(self.tokens), UNIT], np.int64)))
            return g.node("ReduceMax", apart, g.constant(np.array([3], np.int64)), keepdims=0)
        bias = self._read(w, "head.bias").view(np.float32)
        bias_name = g.weight("head.bias", "float32", bias.shape, [bias])
        return w.product(states, self._matrix(w, "head.routers"), (1, "S"), bias_name)

    def _matrix(self, w: Weights, name: str) -> Stored:
        info = next(t for t in self.sidecar.file.tensors if t.name == name)
        data = self._read(w, name).reshape(info.shape[0], -1)
        return w.coded(name, data, info.type, info.shape[1])

    def _read(self, w: Weights, name: str) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self.sidecar.file.read(name), np.uint8)


def add_heads(g: Graph, w: Weights, spec: ModelSpec, head: Stored, states: str, flash: Flash | None) -> None:
    """``states`` [1, R + E, dim]: normalised. ``head`` [vocab, dim] lies by row where there is a FlashHead."""
    if flash is None:
        g.node("Identity", w.product(states, head, (1, "S")), name="logits")
    else:
        _alternatives(g, w, spec, head, states, flash)
        g.output("flash_ids", "int64", (1, "flash_rows", flash.tokens.shape[1] * flash.chosen))
        g.output("flash_logits", "float32", (1, "flash_rows", flash.tokens.shape[1] * flash.chosen))
    g.output("logits", "float32", (1, "dense_rows" if flash else "S", spec.vocab_size))


def _alternatives(g: Graph, w: Weights, spec: ModelSpec, head: Stored, states: str, flash: Flash) -> None:
    n, v = flash.tokens.shape[1] * flash.chosen, spec.vocab_size
    g.input("flash", "bool", (), np.array(False))
    branches: list[Any] = []
    with g.branch(branches, "flash_head") as outputs:
        ids, logits = _flash_head(g, w, spec, head, states, flash)
        none = g.node("Identity", g.constant(np.zeros((1, 0, v), np.float32)))
        outputs += [value_info(ids, "int64", (1, "S", n)), value_info(logits, "float32", (1, "S", n))]
        outputs.append(value_info(none, "float32", (1, 0, v)))
    with g.branch(branches, "dense_head") as outputs:
        no_ids = g.node("Identity", g.constant(np.zeros((1, 0, n), np.int64)))
        no_logits = g.node("Identity", g.constant(np.zeros((1, 0, n), np.float32)))
        dense = w.product(states, head, (1, "S"))
        outputs += [value_info(no_ids, "int64", (1, 0, n)), value_info(no_logits, "float32", (1, 0, n))]
        outputs.append(value_info(dense, "float32", (1, "S", v)))
    names = ["flash_ids", "flash_logits", "logits"]
    g.nodes("If", ["flash"], names, then_branch=branches[0], else_branch=branches[1])


def _flash_head(
    g: Graph, w: Weights, spec: ModelSpec, head: Stored, states: str, flash: Flash
) -> tuple[str, str]:
    """(ids, logits), [1, R + E, N] both."""
    clusters, size = flash.tokens.shape
    n = flash.chosen * size
    scores = flash.scores(g, w, states)
    if len(flash.special):
        extra = np.zeros(clusters, np.float32)
        extra[flash.special] = _ALWAYS
        scores = g.node("Add", scores, g.weight("flash.special", "float32", (clusters,), [extra]))
    count = g.constant(np.array([flash.chosen], np.int64))
    _, best = g.nodes("TopK", [scores, count], ["best_scores", "best_clusters"], axis=-1, sorted=0)
    tokens = g.weight("flash.tokens", "int64", flash.tokens.shape, [flash.tokens])
    found = g.node("Reshape", g.node("Gather", tokens, best), g.constant(np.array([1, -1, n], np.int64)))
    zero = g.constant(np.array(0, np.int64))
    ids = g.node("Max", found, zero)
    rows = w.rows(head, ids, (1, "S", n, spec.dim))
    column = g.node("Unsqueeze", states, g.constant(np.array([3], np.int64)))
    three = g.constant(np.array([3], np.int64))
    logits = g.node("Squeeze", g.node("MatMul", rows, column), three)
    nobody = g.node("Less", found, zero)
    return ids, g.node("Where", nobody, g.constant(np.array(-np.inf, np.float32)), logits)
