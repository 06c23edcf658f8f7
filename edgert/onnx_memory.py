"""The memory that an ONNX export takes in ONNX Runtime on the CPU, term by term.

ONNX Runtime does not say what it will take, so these are its habits as they were measured on x86-64 Linux
with version 1.32 (``python -m edgert.bench.plan_check_onnx`` holds the sums to what runs take):

- model.onnx.data is mapped. A matrix that is multiplied with is packed into memory of its own at the start: a
  block of 32 as its codes, its scale and the sum of its codes; float matrices in float32, whatever they are
  stored in. Its stored codes are then given back, its scales stay mapped.
- The head's matrix is packed while its codes are still there, a float one while it is there in other forms
  too: a model with a large vocabulary takes most while it loads.
- Rows that are looked up (embeddings; the head's, with a FlashHead) stay mapped, and count as far as they
  were read: the system maps what lies around a row with it, and can have these pages back at any time. How
  much it maps is the kernel's choice (here Linux 6.18); the tables of a FlashHead are soon mapped as a whole.
- Attention to float16 keys on x86 has a score of float32 for every query head, token of a pass and slot there
  is, whether in use or not (gqa_attention_base.h: ApplyAttention); to float32 it goes piece by piece.
- A pass works in an arena, which keeps what it once took; the second pass of a size takes one piece for all
  of its values, beside what there is. So a text of more than one full pass takes twice as much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .cost import KV_ELEMENT_BYTES
from .memory_left import PYTHON_BYTES
from .onnx_interface import BLOCK, ITEM_BYTES, UINT8, code_bits, matrices
from .onnx_sparse_plan import store_parts
from .planner import Part

if TYPE_CHECKING:
    from .models import ModelSpec
    from .onnx_plan import OnnxCase
    from .onnx_wire import Graph, Node

RUNTIME_BYTES = 38_000_000  # numpy, the library of ONNX Runtime and its objects, beside PYTHON_BYTES
NODE_BYTES = 12_000  # of a session for each node of its graph
BLOCK_BYTES = 8  # of a packed block beside its codes: scale and sum
ACTIVATIONS = 1.5  # times the values of a layer: what a pass takes of the arena
# A text of n tokens has TOKENS * n**GROWTH different ones (Heaps' law). With the row of one the system maps
# AROUND bytes; SHARE and TOGETHER say how near in the vocabulary they are.
TOKENS, GROWTH = 3.4, 0.68
AROUND = {"int4": 3 << 16, "int8": 3 << 16, "f16": 5 << 17, "f32": 5 << 17}
SHARE, TOGETHER = 0.35, 0.68
SLOTS_AGAIN = 6200  # for which a long text had scores twice in the arena, where all layers have as many
FLASH_STEPS = 8  # that score other rows with a FlashHead; those of later ones were there before


@dataclass(frozen=True)
class Held:
    """Bytes of weights: ``packed``, with what stays beside; ``mapped``, all of it; ``rows``, mapped as far as
    they are read; ``tables``, mapped once a FlashHead is used; and ``extra``, which are there only while the
    graph loads, where what comes after is not there yet."""

    packed: int
    mapped: int
    rows: int
    tables: int
    extra: int


def held(spec: ModelSpec, quant: str, graph: Graph, flash: bool) -> Held:
    """The weights of ``spec`` as ``quant``, with the FlashHead of ``graph`` where there is one."""
    by = products(graph)
    of_flash, tables = _flash_bytes(graph, by)
    packed, mapped, rows, extra = of_flash, 0, 0, 0
    head = "token_embd.weight" if spec.tied_head else "output.weight"
    for name, n, cols in matrices(spec):
        count, bits = n * cols, code_bits(name, cols, quant)
        blocks = count // BLOCK if bits else 0
        stored = count * bits // 8 if blocks else count * (4 if quant == "f32" else 2)
        if name != "token_embd.weight" or spec.tied_head:
            packed += stored + BLOCK_BYTES * blocks if blocks else 4 * count
        if name == "token_embd.weight" or (name == head and flash):
            rows += stored
        mapped += 4 * blocks
        if name != head:
            continue
        extra = stored if blocks else 4 * count
        if not blocks and by.get(name):
            packed += 4 * count
            extra = extra - of_flash if quant != "f32" else 0
        elif not blocks and quant != "f32":  # in all three forms, before what ONNX Runtime takes of its own
            extra += stored - of_flash - RUNTIME_BYTES
    return Held(packed, mapped, rows, tables, max(extra, 0))


def _flash_bytes(graph: Graph, by: Mapping[str, bool]) -> tuple[int, int]:
    """(packed, mapped) bytes of a FlashHead's own tensors."""
    packed = mapped = 0
    for tensor in graph.initializers:
        if not tensor.name.startswith(("head.", "flash.")):
            continue
        count = math.prod(tensor.dims)
        if tensor.name not in by:
            mapped += ITEM_BYTES[tensor.dtype] * count
        elif tensor.dtype == UINT8:
            packed += count + BLOCK_BYTES * math.prod(tensor.dims[:2])
        else:
            packed += 4 * count * (1 + by[tensor.name])
    return packed, mapped


def products(graph: Graph) -> dict[str, bool]:
    """The initializers that are multiplied with, and whether a Cast or a Transpose within a branch makes of
    them what is multiplied with: this copy stays beside the packed one. In the outermost graph it goes."""
    stored = {tensor.name for tensor in graph.initializers}
    made = {node.outputs[0]: node for node in all_nodes(graph) if node.op in ("Cast", "Transpose")}
    outer = {node.outputs[0] for node in graph.nodes}
    found: dict[str, bool] = {}
    for node in all_nodes(graph):
        if node.op in ("MatMul", "MatMulNBits"):
            name, kept = node.inputs[1], False
            for _ in range(2):  # one of each at most
                if name in made:
                    kept = kept or name not in outer
                    name = made[name].inputs[0]
            if name in stored:
                found[name] = kept
    return found


def all_nodes(graph: Graph) -> Iterator[Node]:
    """Those of the graph and of its branches."""
    for node in graph.nodes:
        yield node
        for branch in node.attributes.values():
            if branch:
                yield from all_nodes(branch)


def slots_in_use(spec: ModelSpec, window: int, context: int) -> int:
    """Slots of a layer's cache that hold ``context`` positions, or those of a ``window`` (0: none)."""
    from .engines.onnx import CHUNK
    from .engines.onnx_caches import SPARE

    widest = max(layer.window for layer in spec.layers)
    return min(context, widest - 1 + SPARE + CHUNK) if window else context


def kv_bytes(spec: ModelSpec, kv: str, context: int) -> dict[int, int]:
    """Window (0: none) -> bytes of keys and values of type ``kv`` with ``context`` positions."""
    found: dict[int, int] = {}
    for layer in spec.layers:
        if layer.kind == "attention":
            values = 2 * layer.n_kv_heads * spec.head_dim * slots_in_use(spec, layer.window, context)
            size = int(KV_ELEMENT_BYTES[kv]) * values
            found[layer.window] = found.get(layer.window, 0) + size
    return found


def parts(case: OnnxCase, context: int, quant: str = "", kv: str = "") -> tuple[Part, ...]:
    """The terms of the peak with one session of ``context`` tokens, of the export as it is or as it would be
    in another ``quant`` or ``kv``."""
    from .engines.onnx import CHUNK
    from .engines.onnx_caches import STATES
    from .engines.onnx_sparse import VOTERS
    from .heads import LONGEST

    directory, graph, head = case.directory, case.graph, case.head
    spec, tokens = directory.spec, min(context, CHUNK)
    flash = directory.flash_head is not None
    kv = kv or directory.kv
    quant = quant or directory.quant
    weights = held(spec, quant, graph, flash)
    attention = [layer.window for layer in spec.layers if layer.kind == "attention"]
    kv_heads = max((layer.n_kv_heads for layer in spec.layers), default=0)
    repeated = 2 if context > 2 * CHUNK else 1
    wide = 4 * spec.ffn_dim + 2 * spec.dim + (spec.n_heads + 2 * kv_heads) * spec.head_dim
    scored = 2 * LONGEST if head == "exact" else 1 + flash
    if case.chosen:
        scored = max(scored, VOTERS)
    passing = ", all of it while a prompt is read" if context > case.chosen > 0 else ""
    cached = [
        Part(f"KV cache, {attention.count(window)} {_layers(window)}", size, kv + passing * (window == 0))
        for window, size in kv_bytes(spec, kv, context).items()
    ]
    if case.chosen:
        cached += store_parts(case, context)
    convolutions = spec.n_layers - len(attention)
    state = 4 * spec.dim * (spec.conv_kernel - 1) * convolutions * (1 + STATES)
    later = [
        *cached,
        Part("convolution state", state if convolutions else 0, f"after each of the last {STATES} passes"),
        Part("activations", round(4 * repeated * ACTIVATIONS * wide * tokens), "buffers of a pass"),
        Part("attention scores", scores_bytes(spec, kv, context), "of a pass, for every slot"),
        Part("logits", 4 * spec.vocab_size * scored, "of the tokens that are scored at once"),
        Part("tokenizer", case.tokenizer, "with the metadata it is made of"),
    ]
    used = directory.flash_head if head != "dense" else None
    looked_up = TOKENS * context**GROWTH + (FLASH_STEPS * used["rare"] if used else 0)
    rows = rows_bytes(weights.rows, looked_up, quant)
    tables = weights.tables if used else 0
    loading = weights.extra - rows - tables - sum(part.bytes for part in later)
    found = [
        Part("weights, packed", weights.packed, "as ONNX Runtime multiplies with them"),
        Part("weights, mapped", weights.mapped, "scales, in model.onnx.data"),
        Part("rows, mapped", rows, "that are looked up in model.onnx.data"),
        Part("FlashHead, mapped", tables, "its tables, in model.onnx.data"),
        *later,
        Part("loading", max(loading, 0), "on top while the graph loads"),
        Part("graph", NODE_BYTES * sum(1 for _ in all_nodes(graph)), "of the nodes of ONNX Runtime"),
        Part("ONNX Runtime", RUNTIME_BYTES, "and numpy"),
        Part("Python", PYTHON_BYTES, "and its libraries"),
    ]
    return tuple(part for part in found if part.bytes)


def rows_bytes(size: int, tokens: float, quant: str) -> int:
    """What is mapped of ``size`` bytes of rows when those of ``tokens`` different tokens were read."""
    return round(size * (1 - math.exp(-SHARE * (tokens * AROUND[quant] / size) ** TOGETHER)))


def scores_bytes(spec: ModelSpec, kv: str, context: int) -> int:
    """Scores of the layer with the most slots for all tokens of a pass and all heads: the kernel for float32
    goes through keys piece by piece, that for float16 has them all at once. Where all layers have as many
    slots, a text of more than one full pass had most of them twice in the arena, else once."""
    from .engines.onnx import CHUNK

    if kv == "f32":
        return 0
    slots = {slots_in_use(spec, n.window, context) for n in spec.layers if n.kind == "attention"}
    most = max(slots, default=0)
    again = min(most, SLOTS_AGAIN) if context > 2 * CHUNK and len(slots) == 1 else 0
    return 4 * spec.n_heads * min(context, CHUNK) * (most + again)


def _layers(window: int) -> str:
    return f"layers with a window of {window}" if window else "full layers"
