"""The matrices of a model in an ONNX graph: products with them and rows of them.

    quant       a matrix [rows, cols] is                          a product      a row
    f32         float32 [cols, rows]                              MatMul         Gather
    f16         float16 [cols, rows]                              Cast, MatMul   Gather, Cast
    int8, int4  uint8 [rows, cols / 32, 32 or 16] and             MatMulNBits    GatherBlockQuantized
                float32 scales [rows, cols / 32]

Those that rows are taken of lie as [rows, cols] in every type. Blocks are 32 values of one row and their
scale; value = scale * (code - 128 or 8). With int4 the matrices of layers have four bits, rounded for what
they meet on calibration text (``export/moments.py``); embeddings and the head have eight. Matrices whose rows
are no multiple of 32 long are f16 in place of int8 and int4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from edgert.export.onnx_graph import Graph
from edgert.export.quantise import BLOCK, Codes, Matrix, q4_0_for, q8_0, remedies

from edgert import _native
from edgert.onnx_interface import code_bits

if TYPE_CHECKING:
    from edgert.export.moments import Moments

QUANTS = ("f32", "f16", "int8", "int4")
_PIECE = 1 << 20  # values quantised at once by one thread


@dataclass(frozen=True)
class Stored:
    """A matrix in the graph: ``name`` of its initializer, and ``name`` + ".scales" where ``bits`` is not
    0."""

    name: str
    rows: int
    cols: int
    bits: int
    half: bool
    by_row: bool  # lies as [rows, cols]


class Weights:
    """The tensors of ``file`` as ``quant`` in ``graph``. Matrices are named by their tensors. ``done`` counts
    what was read."""

    def __init__(self, file: _native.GgufFile, quant: str, graph: Graph, done: Callable[[int], None]) -> None:
        self._file, self._quant, self._graph, self._done = file, quant, graph, done
        self._pool = ThreadPoolExecutor(2)
        self._moments: Moments | None = None

    def vector(self, name: str) -> str:
        """A tensor as it is, in float32."""
        values = self.read(name)
        return self._graph.weight(name, "float32", values.shape, [values])

    def read(self, name: str) -> Matrix:
        """A tensor's values, float32."""
        values: Matrix = self._file.dequantize(name)
        self._done(1)
        return values

    def matrix(self, names: Sequence[str], by_row: bool = False) -> Stored:
        """The tensors ``names``, one below the other, as one matrix; ``by_row`` where rows of it are
        wanted."""
        graph, name = self._graph, "+".join(n.removesuffix(".weight") for n in names) + ".weight"
        parts = [self.read(n) for n in names]
        rows, cols = sum(len(p) for p in parts), parts[0].shape[1]
        bits = code_bits(name, cols, self._quant)
        if bits == 4:
            factor = remedies(self._met().of(names[0]))
            return self._quantised(name, parts, cols, 4, lambda x: q4_0_for(x, factor))
        if bits:
            return self._quantised(name, parts, cols, 8, q8_0)
        half = self._quant != "f32"
        dtype = "float16" if half else "float32"
        values = np.concatenate(parts) if len(parts) > 1 else parts[0]
        shape = (rows, cols) if by_row else (cols, rows)
        graph.weight(name, dtype, shape, [(values if by_row else values.T).astype(dtype, copy=False)])
        return Stored(name, rows, cols, 0, half, by_row)

    def _met(self) -> Moments:
        """What the matrices of layers meet; these are to be asked for in their order."""
        if self._moments is None:
            from edgert.export.moments import Moments

            self._moments = Moments(self._file)
        return self._moments

    def _quantised(
        self, name: str, parts: Sequence[Matrix], cols: int, bits: int, blockwise: Callable[[Matrix], Codes]
    ) -> Stored:
        rows, scales = sum(len(part) for part in parts), list[Matrix]()

        def codes() -> Iterator[Codes]:
            for blocks, d in self._pool.map(lambda x: regroup(blockwise(x), bits), _pieces(parts)):
                scales.append(d)
                yield blocks

        self._graph.store(name, "uint8", codes())
        self._graph.weight(name + ".scales", "float32", (rows, cols // BLOCK), scales)
        return Stored(name, rows, cols, bits, False, True)

    def some_rows(self, of: Stored, ids: npt.NDArray[np.int64], name: str) -> Stored:
        """The rows ``ids`` of a matrix of one tensor as the matrix ``name``, value for value."""
        values = self._file.dequantize(of.name)[ids]
        if of.bits:
            return self._quantised(name, [values], of.cols, 8, q8_0)
        dtype = "float16" if of.half else "float32"
        self._graph.weight(name, dtype, (of.cols, len(ids)), [values.T.astype(dtype, copy=False)])
        return Stored(name, len(ids), of.cols, 0, of.half, False)

    def coded(self, name: str, data: Codes, type: str, cols: int) -> Stored:
        """A matrix of GGUF's Q4_0 or Q8_0 ``data`` [rows, bytes], value for value."""
        bits = 4 if type == "Q4_0" else 8
        codes, scales = regroup(data, bits)
        self._graph.store(name, "uint8", [codes])
        self._graph.weight(name + ".scales", "float32", scales.shape, [scales])
        return Stored(name, len(data), cols, bits, False, True)

    def product(self, x: str, by: Stored, first: Sequence[int | str], bias: str = "", name: str = "") -> str:
        """``x`` [*first, cols] times the matrix, plus ``bias`` [rows]: [*first, rows], called ``name``. The
        bias is a node of its own: MatMulNBits takes one, but ONNX Runtime 1.24's on CUDA does not."""
        g = self._graph
        own = "" if bias else name
        if by.bits:
            out = g.contrib(
                "MatMulNBits",
                x,
                g.view(by.name, (by.rows, by.cols // BLOCK, BLOCK * by.bits // 8)),
                by.name + ".scales",
                shape=(*first, by.rows),
                name=own,
                K=by.cols,
                N=by.rows,
                bits=by.bits,
                block_size=BLOCK,
                accuracy_level=4,
            )
        else:
            with g.outermost():  # in a branch ONNX Runtime would keep the copy beside the packed one
                matrix = g.node("Cast", by.name, to=1) if by.half else by.name
                if by.by_row:
                    matrix = g.node("Transpose", matrix, perm=[1, 0])
            out = g.node("MatMul", x, matrix, name=own)
        return g.node("Add", out, bias, name=name) if bias else out

    def flat(self, of: Stored) -> str:
        """The codes of a quantised matrix, uint8 [rows, cols * bits / 8]."""
        return self._graph.view(of.name, (of.rows, of.cols * of.bits // 8))

    def rows(self, of: Stored, ids: str, shape: Sequence[int | str]) -> str:
        """Rows ``ids`` of a matrix that lies by row, float32 [..., cols] of this ``shape``."""
        g = self._graph
        if not of.bits:
            found = g.node("Gather", of.name, ids)
            return g.node("Cast", found, to=1) if of.half else found
        return g.contrib(
            "GatherBlockQuantized",
            self.flat(of),
            ids,
            of.name + ".scales",
            shape=shape,
            bits=of.bits,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )


def _pieces(parts: Sequence[Matrix]) -> Iterator[Matrix]:
    for values in parts:
        step = max(1, _PIECE // values.shape[1])
        for at in range(0, len(values), step):
            yield values[at : at + step]


def regroup(data: Codes, bits: int) -> tuple[Codes, Matrix]:
    """GGUF's blocks as MatMulNBits wants them: value 2 j of a block in the low half of byte j and the next
    one in the high half; int8 with 128 added; scales apart."""
    blocks = data.reshape(len(data), -1, 2 + BLOCK * bits // 8)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0].astype(np.float32)
    codes = blocks[:, :, 2:]
    if bits == 8:
        return codes ^ np.uint8(128), scales
    # Byte j has values j and j + 16.
    low, high = codes & 15, codes >> 4
    return np.concatenate(
        [low[..., 0::2] | low[..., 1::2] << 4, high[..., 0::2] | high[..., 1::2] << 4], -1
    ), scales
