"""The FlashHead of a sidecar as nodes of an ONNX graph (FlashHead, arXiv 2603.14591).

Few tokens are common, and one product with their rows costs ONNX Runtime far less than gathering as many.
So the common tokens are scored always, and the sieve looks for rare ones only:

- Routers: a product with a cluster's router is the score of the cluster.
- Low-rank rows: a product with each token's row in a space of low rank. With routers it is taken of the
  tokens of the best clusters, as many as the sidecar probes. Without, it is taken of all tokens, and the
  units of 16 tokens with the best of them go on, as many as the sidecar keeps.
- Of what is left the best tokens are scored with the dense head's own rows, :data:`TOKENS_PER_UNIT` for each
  unit that the sidecar keeps: here single rows cost no more than neighbours (docs/onnx.md). Without low-rank
  rows all tokens of the best clusters are.

Low-rank rows of chosen clusters are gathered as codes of 7 bits, axis by axis, [rank, tokens] a cluster: of
unsigned bytes times such a matrix ONNX Runtime has a product that need not rearrange it. Rows are divided by
what their axis and they themselves have at most; 7 bits, since the sum of two products must fit into 16 bits
on CPUs without dot products of bytes.

The rows of an int8 head are not made floats, which takes longer than all the rest. The states are rounded to
int8 in blocks of 32, as MatMulNBits rounds them, and put on the diagonal of a matrix of blocks; a product of
integers with the rows then gives the sum of each block, and scales make logits of these. They are the dense
head's to the rounding of float32 sums.

Such products of integers are for the CPU: CUDA has none of unsigned bytes. So wherever one is, another branch
multiplies floats, of the same weights. :data:`INTEGERS` chooses, a constant in the file with the weights:
ONNX Runtime puts the chosen branch in the place of the ``If`` and drops the other one, so it costs nothing.
Who loads the graph for another provider has it replaced by 0 (``SessionOptions.add_external_initializers``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from edgert.export.calibration_text import load_domains
from edgert.export.clusters import UNIT
from edgert.export.onnx_graph import Graph, Shape, value_info
from edgert.export.onnx_weights import Stored, Weights
from edgert.export.quantise import BLOCK, dequantise
from edgert.models import ModelSpec

from edgert import _native
from edgert.onnx_interface import INTEGERS
from edgert.sidecar import Sidecar
from edgert.tokenizer import Tokenizer

COMMON = 16  # one token of so many is common
SEEN = 4  # and one common token of so many is so since text has it often
TOKENS_PER_UNIT = {True: 1, False: 2}  # with and without routers
_NEVER = -1e30  # added to a score: all others are better
_TINY = 1e-30
_TO_FLOAT, _TO_UINT8, _TO_INT8, _TO_BOOL, _TO_HALF = 1, 2, 3, 9, 10
_ROW, _STATE = 63, 127  # largest codes: two products of these bytes, 128 added to one, fit into 16 bits


def common_tokens(tokenizer: Tokenizer, vocab_size: int) -> npt.NDArray[np.int64]:
    """The tokens that are met most, in order: those that the calibration text has most, and those of the
    lowest ids, which are the first that were made when a vocabulary was learned by merging."""
    seen = np.zeros(vocab_size, np.int64)
    for domain in load_domains(tokenizer):
        for piece in domain.fit:
            np.add.at(seen, piece, 1)
    count = -(-vocab_size // COMMON)
    by_count = np.argsort(-seen, kind="stable")[: count // SEEN]
    rest = np.setdiff1d(np.arange(vocab_size), by_count)[: count - len(by_count)]
    return np.sort(np.concatenate([by_count, rest]))


@dataclass(frozen=True)
class Flash:
    """``common`` tokens are always scored, among them those that the sidecar wants scored always. ``tokens``
    [clusters, size]: the rare ones, -1 elsewhere; ``clusters`` of them are chosen and ``rare`` tokens scored
    of these."""

    sidecar: Sidecar
    common: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    clusters: int
    rare: int

    @classmethod
    def of(cls, sidecar: Sidecar, common: npt.NDArray[np.int64]) -> Flash:
        low, routers = ("lowrank" in sidecar.recipe), ("clusters" in sidecar.recipe)
        size = sidecar.cluster_size if routers else UNIT
        tokens = np.asarray(sidecar.file.get("edgert.head.tokens"), np.int64)
        special = np.asarray(sidecar.file.get("edgert.head.special"), np.int64)
        always = np.union1d(common, special)
        tokens = np.where(np.isin(tokens, always), -1, tokens).reshape(-1, size)
        clusters = sidecar.keep
        if routers:
            clusters = sidecar.probes
        clusters = min(clusters, len(tokens))
        wanted = int(np.ceil(sidecar.keep * TOKENS_PER_UNIT[routers])) if low else clusters * size
        return cls(sidecar, always, tokens, clusters, min(wanted, clusters * size))

    @property
    def count(self) -> int:
        """Tokens scored."""
        return len(self.common) + self.rare

    def choose(self, g: Graph, w: Weights, states: str) -> str:
        """The rare tokens to score, int64 [1, S, rare], of ``states`` [1, S, dim]; -1: none."""
        low, routers = ("lowrank" in self.sidecar.recipe), ("clusters" in self.sidecar.recipe)
        size = self.tokens.shape[1]
        if routers:
            bias = self._read("head.bias").view(np.float32)
            name = g.weight("head.bias", "float32", bias.shape, [bias])
            near = w.product(states, self._matrix(w, "head.routers"), (1, "S"), name)
            _, best = _top(g, near, self.clusters)
            if not low:
                tokens = g.weight("flash.tokens", "int64", self.tokens.shape, [self.tokens])
                return g.node("Reshape", g.node("Gather", tokens, best), _shape(g, 1, -1, self.rare))
            scores = self._some_low_rank(g, w, states, best)
        else:
            scores, best = self._all_low_rank(g, w, states)
        _, chosen = _top(g, g.node("Reshape", scores, _shape(g, 1, -1, self.clusters * size)), self.rare)
        tokens = g.weight("flash.tokens", "int64", (self.tokens.size,), [self.tokens])
        each = g.constant(np.array(size, np.int64))
        cluster = g.node("GatherElements", best, g.node("Div", chosen, each), axis=2)
        place = g.node("Add", g.node("Mul", cluster, each), g.node("Mod", chosen, each))
        return g.node("Gather", tokens, place)

    def _penalty(self) -> npt.NDArray[np.float32]:
        """What keeps places without a rare token from being chosen, [clusters, size]."""
        penalty: npt.NDArray[np.float32] = np.where(self.tokens < 0, np.float32(_NEVER), np.float32(0))
        return penalty

    def _all_low_rank(self, g: Graph, w: Weights, states: str) -> tuple[str, str]:
        """(scores [1, S, clusters, size] of the best clusters, these clusters) by the low-rank rows of all
        tokens."""
        image = w.product(states, self._matrix(w, "head.projection"), (1, "S"))
        flat = w.product(image, self._matrix(w, "head.rows"), (1, "S"))
        each = g.node("Reshape", flat, _shape(g, 1, -1, *self.tokens.shape))
        each = g.node("Add", each, g.weight("flash.none", "float32", self.tokens.shape, [self._penalty()]))

        def by_place() -> str:
            place = g.node("ArgMax", each, axis=3, keepdims=1)
            return g.node("Squeeze", g.node("GatherElements", each, place, axis=3), _shape(g, 3))

        clusters = len(self.tokens)
        most = _either(
            g, lambda: g.node("ReduceMax", each, _shape(g, 3), keepdims=0), by_place, (1, "S", clusters)
        )
        _, best = _top(g, most, self.clusters)
        return g.node("GatherND", each, g.node("Unsqueeze", best, _shape(g, 3)), batch_dims=2), best

    def _some_low_rank(self, g: Graph, w: Weights, states: str, best: str) -> str:
        """Scores [1, S, clusters, size] by the low-rank rows of the ``best`` clusters."""
        info, data = self._tensor("head.rows")
        rows = dequantise(data, info.type, info.shape[1])
        rank, size = rows.shape[1], self.tokens.shape[1]
        axes = np.abs(rows).max(0) + _TINY
        rows /= axes
        top = np.abs(rows).max(1) + _TINY
        codes = np.rint(rows * (_ROW / top)[:, None]).astype(np.int8)
        scales = top.reshape(self.tokens.shape)
        # The codes of the state are made positive: what that adds to a row's product is taken off.
        offsets = -(_STATE + 1) * codes.sum(1, dtype=np.float32).reshape(scales.shape) * scales
        offsets += self._penalty()
        by_axis = np.ascontiguousarray(codes.reshape(-1, size, rank).transpose(0, 2, 1))
        packed = g.weight("flash.rows", "int8", by_axis.shape, [by_axis])
        by_scale = g.weight("flash.scales", "float32", scales.shape, [scales])
        by_offset = g.weight("flash.offsets", "float32", scales.shape, [offsets])
        image = w.product(states, self._matrix(w, "head.projection"), (1, "S"))
        image = g.node("Mul", image, g.weight("flash.axes", "float32", axes.shape, [axes]))
        most = g.node("Max", _top(g, g.node("Abs", image), 1)[0], _number(g, _TINY))

        def integers() -> str:
            scale = g.node("Div", most, _number(g, _STATE))
            whole = g.node("Add", g.node("Round", g.node("Div", image, scale)), _number(g, _STATE + 1))
            row = g.node("Unsqueeze", g.node("Cast", whole, to=_TO_UINT8), _shape(g, 2, 3))
            sums = g.node("MatMulInteger", row, g.node("Gather", packed, best))
            sums = g.node("Squeeze", g.node("Cast", sums, to=_TO_FLOAT), _shape(g, 3))
            scaled = g.node("Mul", sums, g.node("Gather", by_scale, best))
            return g.node("Add", scaled, g.node("Gather", by_offset, best))

        def floats() -> str:
            # Divided by the largest of them a sum is at most 63 times the rank, which float16 has.
            row = g.node("Cast", g.node("Div", image, most), to=_TO_HALF)
            columns = g.node("Cast", g.node("Gather", packed, best), to=_TO_HALF)
            sums = g.node("MatMul", g.node("Unsqueeze", row, _shape(g, 2, 3)), columns)
            sums = g.node("Squeeze", g.node("Cast", sums, to=_TO_FLOAT), _shape(g, 3))
            scaled = g.node("Mul", sums, g.node("Gather", by_scale, best))
            nobody = g.node("Less", g.node("Gather", by_offset, best), _number(g, _NEVER / 2))
            return g.node("Where", nobody, _number(g, _NEVER), scaled)

        return _either(g, integers, floats, (1, "S", self.clusters, size))

    def _matrix(self, w: Weights, name: str) -> Stored:
        info, data = self._tensor(name)
        return w.coded(name, data, info.type, info.shape[1])

    def _tensor(self, name: str) -> tuple[_native.TensorInfo, npt.NDArray[np.uint8]]:
        info = next(t for t in self.sidecar.file.tensors if t.name == name)
        return info, self._read(name).reshape(info.shape[0], -1)

    def _read(self, name: str) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self.sidecar.file.read(name), np.uint8)


def add_choice(g: Graph) -> None:
    """What :func:`_either` goes by. ONNX Runtime 1.32 does not find the file of a constant that is itself the
    condition of an inner ``If``, so this is a cast of it, in the outermost graph."""
    constant = g.weight(INTEGERS, "uint8", (), [np.array(1, np.uint8)])
    g.node("Cast", constant, name=INTEGERS + ".bool", to=_TO_BOOL)


def add_flash_head(
    g: Graph, w: Weights, spec: ModelSpec, head: Stored, states: str, flash: Flash
) -> tuple[str, str]:
    """(ids, logits), [1, S, count] both, of ``states`` [1, S, dim]: first the common tokens."""
    common = w.some_rows(head, flash.common, "flash.common.weight")
    always = w.product(states, common, (1, "S"))
    names = g.weight("flash.common", "int64", (1, 1, len(flash.common)), [flash.common])
    found = flash.choose(g, w, states)
    zero = g.constant(np.array(0, np.int64))
    ids = g.node("Max", found, zero)

    def floats() -> str:
        rows = w.rows(head, ids, (1, "S", flash.rare, spec.dim))
        column = g.node("Unsqueeze", states, _shape(g, 3))
        return g.node("Squeeze", g.node("MatMul", rows, column), _shape(g, 3))

    if head.bits:
        logits = _either(g, lambda: _integer_scores(g, w, head, states, ids), floats, (1, "S", flash.rare))
    else:
        logits = floats()
    nobody = g.node("Less", found, zero)
    logits = g.node("Where", nobody, g.constant(np.array(-np.inf, np.float32)), logits)
    count = g.node("Shape", states, start=1, end=2)
    shape = g.node("Concat", _shape(g, 1), count, _shape(g, 1), axis=0)
    ids = g.node("Concat", g.node("Expand", names, shape), ids, axis=2)
    return ids, g.node("Concat", always, logits, axis=2)


def _either(g: Graph, integers: Callable[[], str], floats: Callable[[], str], shape: Shape) -> str:
    """A float32 of this ``shape``, by products of integers or by those of floats."""
    branches: list[Any] = []
    for make, name in ((integers, "integers"), (floats, "floats")):
        with g.branch(branches, name) as outputs:
            outputs.append(value_info(make(), "float32", shape))
    return g.node("If", INTEGERS + ".bool", then_branch=branches[0], else_branch=branches[1])


def _integer_scores(g: Graph, w: Weights, head: Stored, states: str, ids: str) -> str:
    """Products of ``states`` [1, S, dim] with rows ``ids`` [1, S, N] of a quantised head, [1, S, N]."""
    blocks = head.cols // BLOCK
    x = g.node("Reshape", states, _shape(g, 1, -1, blocks, BLOCK))
    top = g.node("ReduceMax", g.node("Abs", x), _shape(g, 3), keepdims=1)
    scale = g.node("Div", top, g.constant(np.array(127, np.float32)))
    scale = g.node("Max", scale, g.constant(np.array(1e-30, np.float32)))
    whole = g.node("Round", g.node("Div", x, scale))
    # Value k of block b goes to column b, or blocks + b where k is odd: CPUs without dot products of bytes
    # add the products of two neighbours in 16 bits, which hold one.
    place = np.zeros((blocks, BLOCK, 2, blocks), np.float32)
    block, value = np.ogrid[:blocks, :BLOCK]
    place[block, value, value % 2, block] = 1
    apart = g.node("Unsqueeze", whole, _shape(g, 4))
    spread = g.node("Mul", apart, g.constant(place.reshape(blocks, BLOCK, 2 * blocks)))
    columns = g.node("Reshape", g.node("Cast", spread, to=_TO_INT8), _shape(g, 1, -1, head.cols, 2 * blocks))
    sums = g.node("MatMulInteger", g.node("Gather", w.flat(head), ids), columns)
    even, odd = g.split(sums, [blocks, blocks], ("even", "odd"))
    sums = g.node("Cast", g.node("Add", even, odd), to=_TO_FLOAT)
    offset = g.node("Mul", g.node("ReduceSum", whole, _shape(g, 3), keepdims=0), _number(g, 128))
    sums = g.node("Sub", sums, g.node("Unsqueeze", offset, _shape(g, 2)))
    scaled = g.node("Mul", sums, g.node("Gather", head.name + ".scales", ids))
    return g.node("Squeeze", g.node("MatMul", scaled, scale), _shape(g, 3))


def _top(g: Graph, scores: str, count: int) -> tuple[str, str]:
    """The ``count`` best along the last axis, in no order, and where they are."""
    values, indices = g.fresh("TopK_values"), g.fresh("TopK")
    g.nodes("TopK", [scores, _shape(g, count)], [values, indices], axis=-1, sorted=0)
    return values, indices


def _number(g: Graph, value: float) -> str:
    return g.constant(np.array(value, np.float32))


def _shape(g: Graph, *sizes: int) -> str:
    return g.constant(np.array(sizes, np.int64))
