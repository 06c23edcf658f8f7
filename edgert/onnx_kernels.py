"""Which operators of an exported graph ONNX Runtime has CUDA kernels for.

What a provider has no kernel for runs on the processor, unnoticed but for its time: attention there moves the
whole cache over and back. So a graph is held to this list before it is loaded with ``--provider cuda``, and
with ``tensorrt``, which leaves all that it does not know to CUDA; tests hold what the exporter writes to it.

The list is of ONNX Runtime 1.24, the oldest that edgert takes: operators of edgert's graphs, the version that
operator set 23 has of each, and types, from docs/OperatorKernels.md of its repository (commit 001d12d2;
onnxruntime-gpu 1.24.4 places nodes accordingly, bench/onnx_placement.py). A kernel without an end, such as
"Cos 7+", is for the version that it names alone: Cos of operator set 23 is version 22, so there is none.
Later releases have more: 1.31 has Cos, Sin, If, Identity, Round and ReduceMax.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .onnx_interface import BOOL, CONTRIB, FLOAT, FLOAT16, INT32, INT64, INTEGERS, UINT8

if TYPE_CHECKING:
    from .onnx_wire import Graph, Node

LISTED = "1.24"
INT8, DOUBLE = 3, 11
_NAMES = {
    FLOAT: "float32",
    UINT8: "uint8",
    INT8: "int8",
    INT32: "int32",
    INT64: "int64",
    BOOL: "bool",
    FLOAT16: "float16",
    DOUBLE: "float64",
}
Types = frozenset[int]
_REAL = frozenset((FLOAT, FLOAT16, DOUBLE))
_HALF, _HALF_OR_SINGLE = frozenset((FLOAT16,)), frozenset((FLOAT, FLOAT16))
_ORDERED = _REAL | {INT32, INT64}
_NUMBER = _ORDERED | {INT8, UINT8}
_ANY = _NUMBER | {BOOL}
_COUNT, _INDEX = frozenset((INT64,)), frozenset((INT32, INT64))
_BOOL, _BYTE, _INT32 = frozenset((BOOL,)), frozenset((UINT8,)), frozenset((INT32,))


@dataclass(frozen=True)
class Kernel:
    """``version``: of the operator. ``inputs``: the types of each; further inputs are as the last."""

    version: int
    inputs: tuple[Types, ...]

    def takes(self, types: Iterable[int | None]) -> bool:
        """Whether there is a kernel for inputs of these ``types``; None: one that is left out, or that no
        node gives, of which ONNX Runtime tells."""
        last = len(self.inputs) - 1
        return all(kind is None or kind in self.inputs[min(i, last)] for i, kind in enumerate(types))


def _kernels(version: int, inputs: tuple[Types, ...], names: str) -> dict[tuple[str, str], Kernel]:
    return {("", name): Kernel(version, inputs) for name in names.split()}


# (domain, operator) -> its kernels. Where all inputs have one type that is not looked at twice: the checker
# of the exporter did.
CUDA: Mapping[tuple[str, str], Kernel] = {
    **_kernels(10, (frozenset((INT8,)),), "MatMulInteger"),
    **_kernels(11, (_ORDERED, _COUNT), "TopK"),
    **_kernels(13, (_NUMBER,), "Abs"),
    **_kernels(13, (_ANY, _COUNT), "Expand"),
    **_kernels(13, (_ANY,), "Concat"),
    **_kernels(13, (_REAL,), "ArgMax Floor MatMul Sigmoid"),
    **_kernels(13, (_ANY, _INDEX), "Gather GatherElements Slice"),
    **_kernels(13, (_REAL | {BOOL, INT64}, _COUNT), "GatherND"),
    **_kernels(13, (_ORDERED,), "Less Max Mod"),
    **_kernels(13, (_ORDERED, _COUNT), "ReduceSum"),
    **_kernels(14, (_NUMBER,), "Add Div Mul Sub"),
    **_kernels(16, (_BOOL, _ORDERED | {UINT8}), "Where"),
    **_kernels(18, (_ANY, _COUNT), "Split"),
    **_kernels(20, (_REAL,), "Gelu"),
    **_kernels(22, (_REAL,), "Conv"),
    **_kernels(23, (_ANY,), "Cast Shape Transpose"),
    **_kernels(23, (_ANY, _COUNT), "Reshape Squeeze Unsqueeze"),
    **_kernels(23, (_REAL,), "RMSNormalization"),
    **_kernels(23, (_HALF_OR_SINGLE,), "RotaryEmbedding"),
    (CONTRIB, "GatherBlockQuantized"): Kernel(1, (_BYTE, _INDEX, _HALF_OR_SINGLE)),
    (CONTRIB, "GroupQueryAttention"): Kernel(1, (*(_HALF,) * 5, _INT32)),
    # Zero points, order of groups and bias: none is taken, though the list has them; of the bias the kernel
    # of 1.24 says so when it runs.
    (CONTRIB, "MatMulNBits"): Kernel(1, (_HALF_OR_SINGLE, _BYTE, _HALF_OR_SINGLE, frozenset())),
}
# Left to the processor on purpose. If chooses a branch, whose nodes have providers of their own. The angles
# of the new tokens, a few hundred bytes each, cross before and after; weights and caches do not.
ON_PROCESSOR = frozenset({("", "If"), ("", "Cos"), ("", "Sin")})


def without_kernel(graph: Graph) -> Counter[str]:
    """How many nodes of ``graph`` and of its branches CUDA has no kernel for, by operator and types of
    inputs. Of products by integers or by floats the latter are taken."""
    return Counter(_without(graph, {}))


def _without(graph: Graph, outer: Mapping[str, int]) -> Iterator[str]:
    types = {**outer, **{v.name: v.dtype for v in graph.inputs}}
    types.update((tensor.name, tensor.dtype) for tensor in graph.initializers)
    for node in graph.nodes:
        given = [types.get(name) for name in node.inputs]
        key = node.domain, node.op
        kernel = CUDA.get(key)
        if key not in ON_PROCESSOR and not (kernel and kernel.takes(given)):
            names = sorted({_NAMES.get(kind, str(kind)) for kind in given if kind is not None})
            yield f"{node.op} ({', '.join(names)})"
        for branch in chosen(node):
            yield from _without(branch, types)
        types.update(zip(node.outputs, _outputs(node, given), strict=False))


def chosen(node: Node) -> list[Graph]:
    """The branches of ``node`` that another provider than the CPU's may run."""
    found = [branch for branch in node.attributes.values() if branch]
    of_floats = node.attributes.get("else_branch")
    if node.inputs[:1] == (INTEGERS + ".bool",) and of_floats:
        return [of_floats]
    return found


def _outputs(node: Node, given: list[int | None]) -> list[int]:
    """The types of what a node gives, of inputs of these types."""
    first = given[0] if given else None
    match node.op:
        case "Cast":
            return [node.integers["to"]]
        case "Shape" | "ArgMax":
            return [INT64]
        case "Less":
            return [BOOL]
        case "MatMulInteger":
            return [INT32]
        case "TopK":
            return [first or 0, INT64]
        case "Where":
            return [given[1] or 0]
        case "GatherBlockQuantized":
            return [given[2] or 0]
        case "If":
            return [value.dtype for value in chosen(node)[0].outputs]
    return [first or 0] * len(node.outputs)
