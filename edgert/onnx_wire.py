"""Reads the graph of an ONNX model from its bytes: the parts that edgert's exporter writes, and no others.

Protobuf's readers skip what they do not know, merge what is there twice and allocate what a length says.
This one refuses: fields that are not in the tables below, a second value of a field that has one, wrong wire
types, lengths beyond the end, more than :data:`MOST_FIELDS` fields. So nothing is in an accepted file that
was not looked at. Field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MOST_FIELDS = 400_000  # in a file; an exported model of 30 layers has 15,000
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_KINDS = {VARINT: "a number", FIXED64: "8 bytes", BYTES: "bytes", FIXED32: "4 bytes"}


class WireError(ValueError):
    """What is wrong, and ``offset``, the byte of the file where."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


@dataclass(frozen=True)
class Value:
    """An input or output: ``shape`` has sizes and names of free ones; ``dtype`` is TensorProto's number."""

    name: str
    dtype: int
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Tensor:
    """An initializer; ``external`` is None for one whose ``raw`` bytes are in the graph itself."""

    name: str
    dtype: int
    dims: tuple[int, ...]
    raw: int  # bytes
    external: Mapping[str, str] | None


@dataclass(frozen=True)
class Node:
    """``attributes`` are names with the graph of those that are one, and None; ``integers`` the values of
    those that are one whole number."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Graph | None]
    integers: Mapping[str, int]


@dataclass(frozen=True)
class Graph:
    nodes: tuple[Node, ...]
    initializers: tuple[Tensor, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True)
class Model:
    ir_version: int
    opsets: Mapping[str, int]
    graph: Graph


# Field number -> name, wire type, whether it may come more than once.
_Table = Mapping[int, tuple[str, int, bool]]
_MODEL: _Table = {
    1: ("ir_version", VARINT, False),
    2: ("producer_name", BYTES, False),
    7: ("graph", BYTES, False),
    8: ("opset_import", BYTES, True),
}
_OPSET: _Table = {1: ("domain", BYTES, False), 2: ("version", VARINT, False)}
_GRAPH: _Table = {
    1: ("node", BYTES, True),
    2: ("name", BYTES, False),
    5: ("initializer", BYTES, True),
    11: ("input", BYTES, True),
    12: ("output", BYTES, True),
    13: ("value_info", BYTES, True),
}
_NODE: _Table = {
    1: ("input", BYTES, True),
    2: ("output", BYTES, True),
    3: ("name", BYTES, False),
    4: ("op_type", BYTES, False),
    5: ("attribute", BYTES, True),
    7: ("domain", BYTES, False),
}
_ATTRIBUTE: _Table = {
    1: ("name", BYTES, False),
    2: ("f", FIXED32, False),
    3: ("i", VARINT, False),
    4: ("s", BYTES, False),
    6: ("g", BYTES, False),
    8: ("ints", VARINT, True),
    20: ("type", VARINT, False),
}
_TENSOR: _Table = {
    1: ("dims", VARINT, True),
    2: ("data_type", VARINT, False),
    8: ("name", BYTES, False),
    9: ("raw_data", BYTES, False),
    13: ("external_data", BYTES, True),
    14: ("data_location", VARINT, False),
}
_ENTRY: _Table = {1: ("key", BYTES, False), 2: ("value", BYTES, False)}
_VALUE: _Table = {1: ("name", BYTES, False), 2: ("type", BYTES, False)}
_TYPE: _Table = {1: ("tensor_type", BYTES, False)}
_TENSOR_TYPE: _Table = {1: ("elem_type", VARINT, False), 2: ("shape", BYTES, False)}
_SHAPE: _Table = {1: ("dim", BYTES, True)}
_DIM: _Table = {1: ("dim_value", VARINT, False), 2: ("dim_param", BYTES, False)}
# What else a model may have, for messages.
_REFUSED = {
    (id(_MODEL), 14): "metadata_props",
    (id(_MODEL), 20): "training_info",
    (id(_MODEL), 25): "functions",
    (id(_GRAPH), 14): "quantization_annotation",
    (id(_GRAPH), 15): "sparse_initializer",
}

Span = tuple[int, int]  # start and end in the file


def read_model(data: bytes) -> Model:
    """The model in ``data``. Raises WireError."""
    return _Reader(data).model((0, len(data)))


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._left = data, MOST_FIELDS

    def model(self, at: Span) -> Model:
        m = self._message(at, "model", _MODEL)
        opsets: dict[str, int] = {}
        for span in m["opset_import"]:
            o = self._message(span, "opset_import", _OPSET)
            domain = self._text(o["domain"])
            if domain in opsets:
                raise WireError(f"two opset_import of the domain {domain!r}", span[0])
            opsets[domain] = o["version"] or 0
        if m["graph"] is None:
            raise WireError("expected a graph, found none", at[1])
        return Model(m["ir_version"] or 0, opsets, self._graph(m["graph"], 0))

    def _graph(self, at: Span, depth: int) -> Graph:
        if depth > 2:
            raise WireError("expected branches in branches, without further ones", at[0])
        g = self._message(at, "graph", _GRAPH)
        for span in g["value_info"]:
            self._value(span)
        return Graph(
            tuple(self._node(span, depth) for span in g["node"]),
            self._all(self._tensor, g["initializer"]),
            self._all(self._value, g["input"]),
            self._all(self._value, g["output"]),
        )

    def _node(self, at: Span, depth: int) -> Node:
        n = self._message(at, "node", _NODE)
        attributes: dict[str, Graph | None] = {}
        integers: dict[str, int] = {}
        for span in n["attribute"]:
            a = self._message(span, "attribute", _ATTRIBUTE)
            name = self._text(a["name"])
            if name in attributes:
                raise WireError(f"two attributes {name[:40]!r} of a node", span[0])
            attributes[name] = None if a["g"] is None else self._graph(a["g"], depth + 1)
            if a["i"] is not None:
                integers[name] = a["i"]
        op, domain, name = (self._text(n[key]) for key in ("op_type", "domain", "name"))
        inputs, outputs = (self._all(self._text, n[key]) for key in ("input", "output"))
        return Node(op, domain, name, inputs, outputs, attributes, integers)

    def _tensor(self, at: Span) -> Tensor:
        t = self._message(at, "initializer", _TENSOR)
        raw = t["raw_data"]
        external: dict[str, str] | None = {} if t["data_location"] else None
        for span in t["external_data"]:
            e = self._message(span, "external_data", _ENTRY)
            key = self._text(e["key"])
            if external is None or key in external:
                raise WireError("external_data that is there twice or of a tensor that has none", span[0])
            external[key] = self._text(e["value"])
        if (raw is None) != (external is not None):
            raise WireError("expected either raw_data or external_data", at[0])
        size = raw[1] - raw[0] if raw else 0
        return Tensor(self._text(t["name"]), t["data_type"] or 0, tuple(t["dims"]), size, external)

    def _value(self, at: Span) -> Value:
        v = self._message(at, "value", _VALUE)
        kind = self._message(self._there(v["type"], "type", at), "type", _TYPE)
        tensor = self._message(
            self._there(kind["tensor_type"], "tensor_type", at), "tensor_type", _TENSOR_TYPE
        )
        shape: list[int | str] = []
        for span in self._message(self._there(tensor["shape"], "shape", at), "shape", _SHAPE)["dim"]:
            d = self._message(span, "dim", _DIM)
            if (d["dim_value"] is None) == (d["dim_param"] is None):
                raise WireError("expected a size or its name", span[0])
            shape.append(self._text(d["dim_param"]) if d["dim_value"] is None else d["dim_value"])
        return Value(self._text(v["name"]), tensor["elem_type"] or 0, tuple(shape))

    def _there(self, span: Span | None, what: str, at: Span) -> Span:
        if span is None:
            raise WireError(f"expected a value with {what}, found none", at[0])
        return span

    def _all(self, read: Callable[[Span], Any], spans: list[Span]) -> tuple[Any, ...]:
        return tuple(read(span) for span in spans)

    def _text(self, at: Span | None) -> str:
        if at is None:
            return ""
        try:
            return self._data[at[0] : at[1]].decode()
        except UnicodeDecodeError:
            raise WireError("expected text in UTF-8", at[0]) from None

    def _message(self, at: Span, what: str, table: _Table) -> dict[str, Any]:
        """Field -> its number, or (start, end) of its bytes; None, or a list of them, as the table says."""
        found: dict[str, Any] = {name: [] if many else None for name, _, many in table.values()}
        position, end = at
        while position < end:
            start = position
            self._left -= 1
            if self._left < 0:
                raise WireError(f"expected at most {MOST_FIELDS} fields", start)
            tag, position = self._varint(position, end)
            number, wire = tag >> 3, tag & 7
            if number not in table:
                known = _REFUSED.get((id(table), number), "")
                raise WireError(
                    f"{what}: field {number}{f' ({known})' if known else ''} is not allowed", start
                )
            name, expected, many = table[number]
            if wire != expected:
                kind = _KINDS.get(wire, f"wire type {wire}")
                raise WireError(f"{what}.{name}: expected {_KINDS[expected]}, found {kind}", start)
            value: Any
            if wire == VARINT:
                value, position = self._varint(position, end)
                value -= (value >> 63) << 64  # two's complement
            else:
                size = 4
                if wire == BYTES:
                    size, position = self._varint(position, end)
                if size > end - position:
                    raise WireError(f"{what}.{name}: {size} bytes go beyond the end", start)
                value = position, position + size
                position += size
            if many:
                found[name].append(value)
            elif found[name] is not None:
                raise WireError(f"{what}.{name}: expected one value, found another", start)
            else:
                found[name] = value
        return found

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while position < end and shift < 64:
            byte = self._data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                if value >> 64:
                    break
                return value, position
        raise WireError("expected a number of at most 64 bits, found one that does not end", position)
