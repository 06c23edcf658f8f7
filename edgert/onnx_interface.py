"""What the graph of an ONNX export must have, as its ``ModelSpec`` demands: inputs, outputs, initializers and
operators. ``export/onnx_model.py`` documents the first three, ``docs/onnx.md`` says why these operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models import ModelSpec

FLOAT, UINT8, INT32, INT64, BOOL, FLOAT16 = 1, 2, 6, 7, 9, 10  # TensorProto's numbers
# Type -> bytes of a value; 3: int8, 11: double.
ITEM_BYTES = {FLOAT: 4, UINT8: 1, 3: 1, INT32: 4, INT64: 8, BOOL: 1, FLOAT16: 2, 11: 8}
BLOCK = 32  # values with one scale
IR_VERSION = 11
CONTRIB = "com.microsoft"
INTEGERS = "flash.integers"  # the constant by which a FlashHead multiplies integers, or floats
OPSETS = {"": 23, CONTRIB: 1}
# (domain, operator) -> the attributes that it may have.
OPERATORS = {
    **{
        ("", name): frozenset(attributes.split())
        for name, attributes in {
            "Abs": "",
            "Add": "",
            "ArgMax": "axis keepdims",
            "Cast": "to",
            "Concat": "axis",
            "Conv": "group",
            "Cos": "",
            "Div": "",
            "Expand": "",
            "Floor": "",
            "Gather": "axis",
            "GatherElements": "axis",
            "GatherND": "batch_dims",
            "Gelu": "approximate",
            "Identity": "",  # in exports of before onnx_kernels.py
            "If": "then_branch else_branch",
            "Less": "",
            "MatMul": "",
            "MatMulInteger": "",
            "Max": "",
            "Mod": "",
            "Mul": "",
            "ReduceMax": "keepdims",
            "ReduceSum": "keepdims",
            "Reshape": "",
            "RMSNormalization": "axis epsilon",
            "RotaryEmbedding": "interleaved num_heads rotary_embedding_dim",
            "Round": "",
            "Shape": "start end",
            "Sigmoid": "",
            "Sin": "",
            "Slice": "",
            "Split": "axis",
            "Squeeze": "",
            "Sub": "",
            "TopK": "axis sorted",
            "Transpose": "perm",
            "Unsqueeze": "",
            "Where": "",
        }.items()
    },
    (CONTRIB, "GatherBlockQuantized"): frozenset(("bits", "block_size", "gather_axis", "quantize_axis")),
    (CONTRIB, "GroupQueryAttention"): frozenset(("num_heads", "kv_num_heads", "scale", "local_window_size")),
    (CONTRIB, "MatMulNBits"): frozenset(("K", "N", "bits", "block_size", "accuracy_level")),
}

Shape = tuple[int | str, ...]
Typed = tuple[int, Shape]  # a type and a shape


def graph_inputs(spec: ModelSpec, kv: str, flash: bool) -> dict[str, Typed]:
    """Name -> type and shape of every input; ``kv``: the type of keys and values, f32 or f16."""
    found: dict[str, Typed] = {
        "input_ids": (INT64, (1, "T")),
        "positions": (INT64, (1, "T")),
        "filled": (INT32, (1,)),
        "rows": (INT64, ("R",)),
        "more_states": (FLOAT, (1, "E", spec.dim)),
        **caches(spec, kv, ""),
    }
    if all(layer.kind == "conv" for layer in spec.layers):
        del found["filled"]
    if any(layer.window for layer in spec.layers):
        found["window_start"] = INT32, (1,)
    if flash:
        found["flash"] = BOOL, ()
    return found


def graph_outputs(spec: ModelSpec, kv: str, tokens: int) -> dict[str, Typed]:
    """The same of every output; ``tokens`` that the FlashHead scores, 0 without one."""
    found: dict[str, Typed] = {
        "hidden": (FLOAT, (1, "R", spec.dim)),
        "logits": (FLOAT, (1, "dense_rows" if tokens else "S", spec.vocab_size)),
        **caches(spec, kv, "_out"),
    }
    full = sum(layer.kind == "attention" and not layer.window for layer in spec.layers)
    if full:
        found["queries"] = FLOAT, (1, "R", full * spec.n_heads * spec.head_dim)
    if tokens:
        found["flash_ids"] = INT64, (1, "flash_rows", tokens)
        found["flash_logits"] = FLOAT, (1, "flash_rows", tokens)
    return found


def caches(spec: ModelSpec, kv: str, suffix: str) -> dict[str, Typed]:
    """The caches as inputs, or with the ``suffix`` "_out" as outputs."""
    found: dict[str, Typed] = {}
    kind = FLOAT16 if kv == "f16" else FLOAT
    for i, layer in enumerate(spec.layers):
        if layer.kind == "conv":
            found[f"conv{suffix}.{i}"] = FLOAT, (1, spec.dim, spec.conv_kernel - 1)
            continue
        slots = "window_slots" if layer.window else "slots"
        for name in "kv":
            found[f"{name}{suffix}.{i}"] = kind, (1, layer.n_kv_heads, slots, spec.head_dim)
    return found


def initializers(spec: ModelSpec, quant: str) -> dict[str, frozenset[tuple[int, tuple[int, ...]]]]:
    """Name -> the types and shapes it may have, of every weight but the FlashHead's."""
    found = {name: frozenset({(FLOAT, shape)}) for name, shape in _floats(spec)}
    for name, rows, cols in matrices(spec):
        bits = code_bits(name, cols, quant)
        if not bits:
            kind = FLOAT if quant == "f32" else FLOAT16
            found[name] = frozenset({(kind, (rows, cols)), (kind, (cols, rows))})
            continue
        for shape in (rows, cols * bits // 8), (rows, cols // BLOCK, BLOCK * bits // 8):
            for other in name, f"{name}.{len(shape)}d":
                found[other] = found.get(other, frozenset()) | {(UINT8, shape)}
        found[name + ".scales"] = frozenset({(FLOAT, (rows, cols // BLOCK))})
    return found


def code_bits(name: str, cols: int, quant: str) -> int:
    """Bits of a value of a matrix with rows of ``cols``; 0: it is stored as floats. With int4 the matrices of
    layers have four, and embeddings and the head eight: with four Gemma-3-270M loses Hindi (docs/onnx.md)."""
    if cols % BLOCK:
        return 0
    if quant == "int4":
        return 4 if name.startswith("blk.") else 8
    return 8 if quant == "int8" else 0


def matrices(spec: ModelSpec) -> Iterator[tuple[str, int, int]]:
    """Name, rows and columns of every matrix; those of one input are one."""
    shapes = spec.tensor_shapes()
    joined = [("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")]
    first = {group[0]: group for group in joined}
    inner = {name for group in joined for name in group[1:]}
    for name, shape in shapes.items():
        prefix, kind = name.removesuffix(".weight").rpartition(".")[::2]
        if len(shape) != 2 or kind in inner or kind == "conv":
            continue
        names = [f"{prefix}.{part}" if prefix else part for part in first.get(kind, (kind,))]
        rows = sum(shapes[part + ".weight"][0] for part in names)
        yield "+".join(names) + ".weight", rows, shape[1]


def _floats(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    shapes = spec.tensor_shapes()
    for name, shape in shapes.items():
        if name.endswith("shortconv.conv.weight"):
            yield name, (shape[0], 1, shape[1])
        elif name.endswith("attn_q.bias"):
            prefix = name.removesuffix("attn_q.bias")
            yield prefix + "attn_qkv.bias", (sum(shapes[f"{prefix}attn_{c}.bias"][0] for c in "qkv"),)
        elif len(shape) == 1 and name != "rope_freqs.weight" and not name.endswith(".bias"):
            yield name, shape
