"""Builds one ONNX graph: nodes, small constants, and weights that go to a file of their own as they come.

Weights are external data: each lies in one file at a multiple of :data:`ALIGNMENT`, a page, so that a runtime
can map it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

ALIGNMENT = 4096
OPSET, IR_VERSION = 23, 11
CONTRIB = "com.microsoft"  # the operators that ONNX Runtime has beside the standard ones

Shape = Sequence[int | str]
_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
    "float64": TensorProto.DOUBLE,
}


class Graph:
    """``data`` takes the weights and is called ``location`` by the model that :meth:`model` returns."""

    def __init__(self, data: BinaryIO, location: str) -> None:
        self._data, self._location, self._at = data, location, 0
        self._outer: list[onnx.NodeProto] = []  # nodes of the outermost graph
        self._nodes = self._outer  # those of the graph that is being made
        self._shapes: list[onnx.ValueInfoProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._stored: dict[str, tuple[str, int, int]] = {}  # name -> dtype, offset, bytes
        self._count = 0

    def input(self, name: str, dtype: str, shape: Shape) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], shape))
        return name

    def output(self, name: str, dtype: str, shape: Shape) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], shape))

    def node(
        self,
        op: str,
        *inputs: str,
        name: str = "",
        shape: Shape | None = None,
        dtype: str = "float32",
        **more: Any,
    ) -> str:
        """A standard operator with one output, whose name is returned. ``shape`` and ``dtype`` are said of
        outputs that shape inference cannot find."""
        return self.nodes(op, inputs, [name or self.fresh(op)], shape, dtype, **more)[0]

    def contrib(
        self,
        op: str,
        *inputs: str,
        shape: Shape,
        name: str = "",
        outputs: Sequence[str] = (),
        dtype: str = "float32",
        **more: Any,
    ) -> str:
        """An operator of ONNX Runtime's own; ``shape`` and ``dtype`` are those of its first output,
        ``outputs`` are the names of the others."""
        names = [name or self.fresh(op), *outputs]
        return self.nodes(op, inputs, names, shape, dtype, domain=CONTRIB, **more)[0]

    def cast(self, x: str, dtype: str) -> str:
        return self.node("Cast", x, to=_TYPES[dtype])

    def nodes(
        self,
        op: str,
        inputs: Iterable[str],
        outputs: Sequence[str],
        shape: Shape | None = None,
        dtype: str = "float32",
        **attributes: Any,
    ) -> Sequence[str]:
        """An operator whose ``outputs`` have these names."""
        if shape is not None:
            self._shapes.append(helper.make_tensor_value_info(outputs[0], _TYPES[dtype], shape))
        self._nodes.append(helper.make_node(op, list(inputs), list(outputs), name=outputs[0], **attributes))
        return outputs

    def split(self, x: str, sizes: Sequence[int], names: Sequence[str]) -> Sequence[str]:
        """``x`` cut along its last axis."""
        outputs = [self.fresh(name) for name in names]
        return self.nodes("Split", [x, self.constant(np.array(sizes, np.int64))], outputs, axis=-1)

    def constant(self, value: npt.NDArray[Any]) -> str:
        """A small array, in the model itself; equal ones are stored once."""
        kind = f"{value.dtype}_{'x'.join(map(str, value.shape)) or 'scalar'}"
        name = f"const_{kind}_{value.tobytes().hex()}" if value.nbytes <= 64 else self.fresh(f"const_{kind}")
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(value, name)
        return name

    def weight(self, name: str, dtype: str, shape: Sequence[int], parts: Iterable[npt.NDArray[Any]]) -> str:
        """An initializer whose bytes are those of ``parts``, one after the other."""
        self.store(name, dtype, parts)
        return self.view(name, shape)

    def store(self, name: str, dtype: str, parts: Iterable[npt.NDArray[Any]]) -> None:
        """Write the bytes of ``parts``, of which :meth:`view` makes initializers."""
        self._data.write(bytes(-self._at % ALIGNMENT))
        self._at += -self._at % ALIGNMENT
        size = 0
        for part in parts:
            raw = np.ascontiguousarray(part)
            self._data.write(raw.data)
            size += raw.nbytes
        self._stored[name] = dtype, self._at, size
        self._at += size

    def view(self, name: str, shape: Sequence[int]) -> str:
        """An initializer of this ``shape`` on the stored bytes ``name``. There may be several of other
        shapes: a matrix that two operators want differently is stored once."""
        dtype, offset, length = self._stored[name]
        expected = math.prod(shape) * np.dtype(dtype).itemsize
        if length != expected:
            raise ValueError(f"{name}: expected {expected} bytes for {dtype} {list(shape)}, found {length}")
        for other in (name, f"{name}.{len(shape)}d"):
            if other not in self._initializers:
                self._initializers[other] = self._external(other, dtype, shape, offset, length)
            if list(self._initializers[other].dims) == list(shape):
                return other
        raise ValueError(f"{name}: two shapes of {len(shape)} dimensions")

    def _external(self, name: str, dtype: str, shape: Sequence[int], offset: int, length: int) -> TensorProto:
        tensor = TensorProto(
            name=name, data_type=_TYPES[dtype], dims=shape, data_location=TensorProto.EXTERNAL
        )
        for key, value in (("location", self._location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    @contextmanager
    def branch(self, into: list[onnx.GraphProto], name: str) -> Iterator[list[onnx.ValueInfoProto]]:
        """Nodes made within become a subgraph, appended to ``into``, whose outputs are those that the list
        given has at the end. It sees all that was made before it."""
        kept = self._nodes, self._shapes
        self._nodes, self._shapes = [], []
        outputs: list[onnx.ValueInfoProto] = []
        yield outputs
        into.append(helper.make_graph(self._nodes, name, [], outputs, value_info=self._shapes))
        self._nodes, self._shapes = kept

    @contextmanager
    def outermost(self) -> Iterator[None]:
        """Nodes made within belong to the outermost graph, in front of the branch that is being made."""
        kept, self._nodes = self._nodes, self._outer
        yield
        self._nodes = kept

    def fresh(self, what: str) -> str:
        """A name that nothing has yet."""
        self._count += 1
        return f"{what}_{self._count}"

    def model(self, producer: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self._nodes,
            "decoder",
            self._inputs,
            self._outputs,
            list(self._initializers.values()),
            value_info=self._shapes,
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name=producer)


def value_info(name: str, dtype: str, shape: Shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _TYPES[dtype], shape)
