"""Looks into an ONNX export before ONNX Runtime does.

ONNX Runtime reads whatever file a graph names, runs whatever operator it has, and believes the shapes that it
states; the readers of the onnx package had path traversal twice (CVE-2024-27318, CVE-2024-5187). So a graph
is read here first, by a reader that knows what edgert's exporter writes and refuses all else
(``edgert/onnx_wire.py``):

- every file is there and has the size and SHA-256 of edgert.json;
- weights lie in model.onnx.data, inside it, and nowhere else;
- inputs, outputs and weights have the types and shapes of the model's spec;
- operators, also those in branches, and their attributes are on a list; there are no functions.

That tells a damaged copy and a foreign graph. It does not tell who made the directory: somebody who writes
all of its files can have a graph of these operators compute anything, and take any memory for it.

Hashes are computed at every load and not remembered: ONNX Runtime reads the same bytes next, from the
system's cache then, and a note of an earlier check would be one more thing that can be wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from . import onnx_interface as interface
from .download import file_sha256
from .errors import UnsupportedModelError
from .onnx_directory import ABOUT, AGAIN, DATA, read_bounded, refuse
from .onnx_wire import WireError, read_model

if TYPE_CHECKING:
    from .models import ModelSpec
    from .onnx_directory import OnnxDirectory
    from .onnx_wire import Graph, Model, Node, Tensor, Value

_GRAPH_LIMIT = 8 << 20  # bytes; a model of 30 layers has 120,000
_NODES, _NODES_A_LAYER = 256, 64  # the most there may be; a layer of Gemma 3 has 25
_FLASH_TENSORS = 20
_MOST_EXTRA = 4096  # rows that a part of a FlashHead may have beyond twice the vocabulary


def preflight(directory: OnnxDirectory) -> Model:
    """Check hashes and graph; the graph is returned. Raises ModelFileError for what is damaged and
    UnsupportedModelError for a graph that edgert's exporter does not write."""
    check_hashes(directory)
    return check_graph(directory)


def check_hashes(directory: OnnxDirectory) -> None:
    """Every file is what edgert.json says. Raises ModelFileError."""
    for name, said in directory.files.items():
        path = directory.path / name
        try:
            found = file_sha256(path)
        except OSError as error:
            raise refuse(path, "", f"cannot read it: {error.strerror}") from error
        if found != said.sha256:
            what = f"expected SHA-256 {said.sha256[:16]}…, as {ABOUT} says, found {found[:16]}…"
            raise refuse(path, f"files.{name}.sha256", what + "; copy the directory again")


def check_graph(directory: OnnxDirectory) -> Model:
    """Read the graph and hold it to the spec."""
    path = directory.graph
    data = read_bounded(path, _GRAPH_LIMIT)
    try:
        model = read_model(data)
        _check(directory, model)
    except WireError as error:
        raise refuse(
            path, "", f"no graph of edgert's at byte {error.offset}: {error}", error.offset
        ) from error
    except _Foreign as error:
        raise UnsupportedModelError(
            f"{path}: {error}; edgert runs the graphs that it exported itself: {AGAIN}"
        ) from error
    return model


class _Foreign(ValueError):
    pass


def _check(directory: OnnxDirectory, model: Model) -> None:
    spec, graph = directory.spec, model.graph
    if model.ir_version != interface.IR_VERSION or model.opsets != interface.OPSETS:
        raise _Foreign(
            f"expected IR version {interface.IR_VERSION} and operator sets {interface.OPSETS}, "
            f"found {model.ir_version} and {_cut(model.opsets)}"
        )
    flash = directory.flash_head
    tokens = flash["tokens"] if flash else 0
    _check_values("input", interface.graph_inputs(spec, directory.kv, flash is not None), graph.inputs)
    _check_values("output", interface.graph_outputs(spec, directory.kv, tokens), graph.outputs)
    most = _NODES + _NODES_A_LAYER * spec.n_layers
    branches = _branches(graph, flash is not None)
    count = sum(len(part.nodes) for part in (graph, *branches))
    if count > most:
        raise _Foreign(f"expected at most {most} nodes, found {count}")
    _check_initializers(directory, graph)
    shapes = {tensor.name: tensor.dims for tensor in graph.initializers}
    for part in (graph, *branches):
        for node in part.nodes:
            _check_node(node)
            if node.domain:
                _check_contrib(spec, node, shapes)


def _check_values(what: str, expected: Mapping[str, interface.Typed], found: tuple[Value, ...]) -> None:
    names = [value.name for value in found]
    if sorted(names) != sorted(expected):
        odd = sorted(set(names) ^ set(expected)) or "two of one name"
        raise _Foreign(f"expected {len(expected)} {what}s, found {len(names)}, differing in {_cut(odd)}")
    for value in found:
        if (value.dtype, value.shape) != expected[value.name]:
            raise _Foreign(
                f"{what} {value.name}: expected type and shape {expected[value.name]}, "
                f"found {_cut((value.dtype, value.shape))}"
            )


def _branches(graph: Graph, flash: bool) -> list[Graph]:
    """The two branches of the FlashHead's If, which is the only one."""
    found = [branch for node in graph.nodes for branch in node.attributes.values() if branch]
    if len(found) != 2 * flash:
        raise _Foreign(f"expected {2 * flash} branches, found {len(found)}")
    for branch in found:
        if branch.inputs or branch.initializers or len(branch.outputs) != 3:
            raise _Foreign("expected branches with three outputs, without inputs and initializers")
    return found


def _check_node(node: Node) -> None:
    allowed = interface.OPERATORS.get((node.domain, node.op))
    name = _cut(f"{node.domain + '.' if node.domain else ''}{node.op}")
    if allowed is None:
        raise _Foreign(f"node {_cut(node.name)}: the operator {name} is not among those that edgert writes")
    if odd := node.attributes.keys() - allowed:
        raise _Foreign(f"node {_cut(node.name)}: {name} with the attribute {_cut(min(odd))}")
    if any(branch and node.op != "If" for branch in node.attributes.values()):
        raise _Foreign(f"node {_cut(node.name)}: {name} with a graph as attribute")


def _check_contrib(spec: ModelSpec, node: Node, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The attributes of ONNX Runtime's own operators say the sizes of what they are given."""
    n = node.integers

    def shape(i: int) -> tuple[int, ...]:
        return shapes.get(node.inputs[i], ()) if i < len(node.inputs) else ()

    if node.op == "GroupQueryAttention":
        layers = {f"k.{i}": layer for i, layer in enumerate(spec.layers) if layer.kind == "attention"}
        layer = layers.get(node.inputs[3] if len(node.inputs) > 3 else "")
        sizes = (n.get("num_heads"), n.get("kv_num_heads"), n.get("local_window_size"))
        right = layer is not None and sizes == (spec.n_heads, layer.n_kv_heads, layer.window or -1)
    else:
        bits, block = n.get("bits", 0), interface.BLOCK
        rows, cols = n.get("N", 0), n.get("K", 0)
        data, scales = shape(1), shape(2)
        wanted: tuple[int, ...] = (rows, cols // block, block * bits // 8)
        if node.op == "GatherBlockQuantized":
            data = shape(0)
            rows, cols = (scales[0], scales[1] * block) if len(scales) == 2 else (0, 0)
            wanted = (rows, cols * bits // 8)
        right = bits in (4, 8) and n.get("block_size") == block and cols % block == 0
        right = right and data == wanted and scales == (rows, cols // block)
    if not right:
        raise _Foreign(
            f"node {_cut(node.name)}: {node.op} with sizes {_cut(dict(n))} that do not fit its inputs "
            f"{_cut(node.inputs)}"
        )


def _check_initializers(directory: OnnxDirectory, graph: Graph) -> None:
    allowed = interface.initializers(directory.spec, directory.quant)
    seen: set[str] = set()
    of_flash = 0
    for tensor in graph.initializers:
        name = _cut(tensor.name)
        if tensor.name in seen:
            raise _Foreign(f"initializer {name}: there are two")
        seen.add(tensor.name)
        size = _bytes(tensor)
        if tensor.external is None:
            if size != tensor.raw:
                raise _Foreign(f"initializer {name}: expected {size} bytes, found {tensor.raw}")
            continue
        _check_external(directory, tensor, size)
        if tensor.name.startswith(("head.", "flash.")) and directory.flash_head:
            of_flash += 1
            _check_flash(directory, tensor, of_flash)
        elif tensor.name not in allowed:
            raise _Foreign(f"initializer {name}: {directory.spec.family} models have none of this name")
        elif (tensor.dtype, tensor.dims) not in allowed[tensor.name]:
            expected = " or ".join(map(str, sorted(allowed[tensor.name])))
            raise _Foreign(
                f"initializer {name}: expected type and shape {expected}, "
                f"found {_cut((tensor.dtype, tensor.dims))}"
            )


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor of these dimensions."""
    item = interface.ITEM_BYTES.get(tensor.dtype)
    if item is None or len(tensor.dims) > 8 or not all(0 <= n < 2**31 for n in tensor.dims):
        raise _Foreign(
            f"initializer {_cut(tensor.name)}: found type and shape {_cut((tensor.dtype, tensor.dims))}"
        )
    return item * math.prod(tensor.dims)


def _check_external(directory: OnnxDirectory, tensor: Tensor, size: int) -> None:
    external = tensor.external or {}
    name = _cut(tensor.name)
    if external.get("location") != DATA:
        raise _Foreign(
            f"initializer {name}: expected its bytes in {DATA}, found {_cut(external.get('location'))}"
        )
    numbers = [external.get(key, "") for key in ("offset", "length")]
    if external.keys() != {"location", "offset", "length"} or not all(
        re.fullmatch("[0-9]{1,18}", number) for number in numbers
    ):
        raise _Foreign(f"initializer {name}: expected location, offset and length, found {_cut(external)}")
    offset, length = map(int, numbers)
    if length != size or offset + length > directory.weight_bytes:
        raise _Foreign(
            f"initializer {name}: expected {size} bytes of the {directory.weight_bytes} in {DATA}, "
            f"found {length} from byte {offset}"
        )


def _check_flash(directory: OnnxDirectory, tensor: Tensor, count: int) -> None:
    """Their sizes are the sidecar's, of which a spec knows no more than a bound."""
    most = (2 * directory.spec.vocab_size + _MOST_EXTRA) * directory.spec.dim
    if count > _FLASH_TENSORS or math.prod(tensor.dims) > most:
        raise _Foreign(
            f"initializer {_cut(tensor.name)}: expected at most {_FLASH_TENSORS} of at most {most} values, "
            f"found number {count} of shape {_cut(tensor.dims)}"
        )


def _cut(value: object) -> str:
    """A file's own text for a message."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= 80 else text[:79] + "…"
