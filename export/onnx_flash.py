"""The FlashHead of a sidecar as nodes of an ONNX graph (FlashHead, arXiv 2603.14591).

Tokens are scored cheaply, the best are scored with the dense head's own rows. The cheap scores come in one of
two ways:

- Routers: a product with a cluster's router is the score of the cluster, and all tokens of the best clusters
  go on.
- Low-rank rows: a product with each token's row in a space of low rank. The units of 16 tokens with the best
  tokens are taken, as many as the sidecar keeps, and of their tokens the best, :data:`TOKENS_PER_UNIT` times
  as many as there are units: here single rows cost no more than neighbours (docs/onnx.md).

A sidecar that has both, to read fewer low-rank rows, is used without its routers: one product with all rows
costs ONNX Runtime less than gathering some of them.

The rows of an int4 or int8 head are not made floats, which takes longer than all the rest. The states are
rounded to int8 in blocks of 32, as MatMulNBits rounds them, and put on the diagonal of a matrix of blocks; a
product of integers with the half bytes of the rows then gives the sum of each block, and scales make logits
of these. They are the dense head's to the rounding of float32 sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from edgert.export.clusters import UNIT
from edgert.export.onnx_graph import Graph
from edgert.export.onnx_weights import Stored, Weights
from edgert.export.quantise import BLOCK
from edgert.models import ModelSpec

from edgert.sidecar import Sidecar

TOKENS_PER_UNIT = 2
_ALWAYS = 1e30  # added to a score: no other comes near
_TO_FLOAT, _TO_INT8 = 1, 3


@dataclass(frozen=True)
class Flash:
    """``tokens`` [clusters, size], -1 where a cluster has fewer; ``special`` tokens are always scored;
    ``clusters`` chosen; ``count`` tokens scored."""

    sidecar: Sidecar
    tokens: npt.NDArray[np.int64]
    special: npt.NDArray[np.int64]
    clusters: int
    count: int

    @classmethod
    def of(cls, sidecar: Sidecar) -> Flash:
        low = "lowrank" in sidecar.recipe
        size = UNIT if low else sidecar.cluster_size
        tokens = np.asarray(sidecar.file.get("edgert.head.tokens"), np.int64).reshape(-1, size)
        special = np.asarray(sidecar.file.get("edgert.head.special"), np.int64)
        clusters = min((sidecar.keep if low else sidecar.probes) + len(special), len(tokens))
        count = (
            min(sidecar.keep * TOKENS_PER_UNIT + len(special), clusters * size) if low else clusters * size
        )
        return cls(sidecar, tokens, special, clusters, count)

    def choose(self, g: Graph, w: Weights, states: str) -> str:
        """The tokens to score, int64 [1, S, count], of ``states`` [1, S, dim]; -1: none."""
        low = "lowrank" in self.sidecar.recipe
        if low:
            image = w.product(states, self._matrix(w, "head.projection"), (1, "S"))
            flat = w.product(image, self._matrix(w, "head.rows"), (1, "S"))
            each = g.node("Reshape", flat, _shape(g, 1, -1, len(self.tokens), UNIT))
            scores = g.node("ReduceMax", each, _shape(g, 3), keepdims=0)
        else:
            bias = self._read("head.bias").view(np.float32)
            name = g.weight("head.bias", "float32", bias.shape, [bias])
            scores = w.product(states, self._matrix(w, "head.routers"), (1, "S"), name)
        always = np.where(np.isin(self.tokens, self.special), np.float32(_ALWAYS), np.float32(0))
        by_cluster = g.weight("flash.always", "float32", (len(self.tokens),), [always.max(1)])
        best = _top(g, g.node("Add", scores, by_cluster), self.clusters)
        tokens = g.weight("flash.tokens", "int64", self.tokens.shape, [self.tokens])
        flat = _shape(g, 1, -1, self.clusters * self.tokens.shape[1])
        found = g.node("Reshape", g.node("Gather", tokens, best), flat)
        if not low:
            return found
        extra = np.where(self.tokens < 0, np.float32(-_ALWAYS), always)
        by_token = g.weight("flash.always_token", "float32", extra.shape, [extra])
        within = g.node("GatherND", each, g.node("Unsqueeze", best, _shape(g, 3)), batch_dims=2)
        within = g.node("Add", within, g.node("Gather", by_token, best))
        chosen = _top(g, g.node("Reshape", within, flat), self.count)
        return g.node("GatherElements", found, chosen, axis=2)

    def _matrix(self, w: Weights, name: str) -> Stored:
        info = next(t for t in self.sidecar.file.tensors if t.name == name)
        data = self._read(name).reshape(info.shape[0], -1)
        return w.coded(name, data, info.type, info.shape[1])

    def _read(self, name: str) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self.sidecar.file.read(name), np.uint8)


def add_flash_head(
    g: Graph, w: Weights, spec: ModelSpec, head: Stored, states: str, flash: Flash
) -> tuple[str, str]:
    """(ids, logits), [1, S, count] both, of ``states`` [1, S, dim]."""
    found = flash.choose(g, w, states)
    zero = g.constant(np.array(0, np.int64))
    ids = g.node("Max", found, zero)
    if head.bits:
        logits = _integer_scores(g, w, head, states, ids)
    else:
        rows = w.rows(head, ids, (1, "S", flash.count, spec.dim))
        column = g.node("Unsqueeze", states, _shape(g, 3))
        logits = g.node("Squeeze", g.node("MatMul", rows, column), _shape(g, 3))
    nobody = g.node("Less", found, zero)
    return ids, g.node("Where", nobody, g.constant(np.array(-np.inf, np.float32)), logits)


def _integer_scores(g: Graph, w: Weights, head: Stored, states: str, ids: str) -> str:
    """Products of ``states`` [1, S, dim] with rows ``ids`` [1, S, N] of a quantised head, [1, S, N]."""
    blocks = head.cols // BLOCK
    x = g.node("Reshape", states, _shape(g, 1, -1, blocks, BLOCK))
    top = g.node("ReduceMax", g.node("Abs", x), _shape(g, 3), keepdims=1)
    scale = g.node("Div", top, g.constant(np.array(127, np.float32)))
    scale = g.node("Max", scale, g.constant(np.array(1e-30, np.float32)))
    whole = g.node("Round", g.node("Div", x, scale))
    if head.bits == 4:  # values 2 j of a block in low half bytes, 2 j + 1 in high ones
        pairs = g.node("Reshape", whole, _shape(g, 1, -1, blocks, BLOCK // 2, 2))
        low, high = (
            _diagonal(g, part, blocks, BLOCK // 2) for part in g.split(pairs, [1, 1], ("even", "odd"))
        )
    else:
        apart = g.node("Reshape", whole, _shape(g, 1, -1, blocks, BLOCK, 1))
        low = high = _diagonal(g, apart, blocks, BLOCK)
    codes = g.node("Gather", w.flat(head), ids)
    low_codes = g.node("BitwiseAnd", codes, g.constant(np.array(15, np.uint8)))
    high_codes = g.node("BitShift", codes, g.constant(np.array(4, np.uint8)), direction="RIGHT")
    sums = g.node("MatMulInteger", high_codes, high)
    if head.bits == 8:
        sums = g.node("Mul", sums, g.constant(np.array(16, np.int32)))
    sums = g.node("Cast", g.node("Add", g.node("MatMulInteger", low_codes, low), sums), to=_TO_FLOAT)
    middle = g.constant(np.array(2.0 ** (head.bits - 1), np.float32))
    offset = g.node("Mul", g.node("ReduceSum", whole, _shape(g, 3), keepdims=0), middle)
    sums = g.node("Sub", sums, g.node("Unsqueeze", offset, _shape(g, 2)))
    scaled = g.node("Mul", sums, g.node("Gather", head.name + ".scales", ids))
    return g.node("Squeeze", g.node("MatMul", scaled, scale), _shape(g, 3))


def _diagonal(g: Graph, x: str, blocks: int, size: int) -> str:
    """int8 [1, S, blocks * size, blocks] with block b of ``x`` [1, S, blocks, size, 1] in rows b * size and
    on of column b, 0 elsewhere."""
    eye = np.eye(blocks, dtype=np.float32)[:, None]
    spread = g.node("Cast", g.node("Mul", x, g.constant(eye)), to=_TO_INT8)
    return g.node("Reshape", spread, _shape(g, 1, -1, blocks * size, blocks))


def _top(g: Graph, scores: str, count: int) -> str:
    values, indices = g.fresh("TopK_values"), g.fresh("TopK")
    g.nodes("TopK", [scores, _shape(g, count)], [values, indices], axis=-1, sorted=0)
    return indices


def _shape(g: Graph, *sizes: int) -> str:
    return g.constant(np.array(sizes, np.int64))
