"""The layers of any :class:`ModelSpec` as nodes of an ONNX graph; ``export/onnx_model.py`` has its
interface."""

from __future__ import annotations

import numpy as np
from edgert.export.onnx_graph import Graph
from edgert.export.onnx_weights import Weights
from edgert.models import LayerSpec, ModelSpec


def add_body(g: Graph, w: Weights, spec: ModelSpec, kv: str, embedded: str) -> str:
    """Inputs, layers and caches, these of type ``kv``. ``embedded`` [1, T, dim]: the rows of the tokens.
    Returns the residual stream after the last layer, [1, T, dim]."""
    x = embedded
    if spec.embed_scale != 1.0:
        x = g.node("Mul", x, g.constant(np.array(spec.embed_scale, np.float32)))
    attention = Attention(g, w, spec, kv)
    for i, layer in enumerate(spec.layers):
        p = f"blk.{i}."
        h = norm(g, w, spec, x, p + "attn_norm.weight")
        h = _convolution(g, w, spec, i, h) if layer.kind == "conv" else attention.layer(i, layer, h)
        if spec.post_norms:
            h = norm(g, w, spec, h, p + "post_attention_norm.weight")
        x = g.node("Add", x, h)
        h = _ffn(g, w, spec, p, norm(g, w, spec, x, p + "ffn_norm.weight"))
        if spec.post_norms:
            h = norm(g, w, spec, h, p + "post_ffw_norm.weight")
        x = g.node("Add", x, h)
    attention.output_queries()
    return x


def norm(g: Graph, w: Weights, spec: ModelSpec, x: str, name: str) -> str:
    """RMSNorm over the last axis of ``x`` with the weight ``name``."""
    return g.node("RMSNormalization", x, w.vector(name), axis=-1, epsilon=spec.norm_eps)


def _ffn(g: Graph, w: Weights, spec: ModelSpec, p: str, h: str) -> str:
    gate_up = w.product(h, w.matrix([p + "ffn_gate.weight", p + "ffn_up.weight"]), (1, "T"))
    gate, up = g.split(gate_up, [spec.ffn_dim, spec.ffn_dim], ("gate", "up"))
    if spec.activation == "silu":
        gate = g.node("Mul", gate, g.node("Sigmoid", gate))
    else:
        gate = g.node("Gelu", gate, approximate="tanh")
    return w.product(g.node("Mul", gate, up), w.matrix([p + "ffn_down.weight"]), (1, "T"))


def _convolution(g: Graph, w: Weights, spec: ModelSpec, i: int, h: str) -> str:
    """LFM2's gated short convolution."""
    p, taps = f"blk.{i}.shortconv.", spec.conv_kernel
    state = g.input(f"conv.{i}", "float32", (1, spec.dim, taps - 1))
    inner = w.product(h, w.matrix([p + "in_proj.weight"]), (1, "T"))
    b, c, x = g.split(inner, [spec.dim] * 3, ("b", "c", "x"))
    new = g.node("Transpose", g.node("Mul", b, x), perm=[0, 2, 1])
    seen = g.node("Concat", state, new, axis=2)
    kernel = w.read(p + "conv.weight").reshape(spec.dim, 1, taps)
    kernel_name = g.weight(p + "conv.weight", "float32", kernel.shape, [kernel])
    mixed = g.node("Transpose", g.node("Conv", seen, kernel_name, group=spec.dim), perm=[0, 2, 1])
    first, end, axis = (g.constant(np.array([v], np.int64)) for v in (1 - taps, np.iinfo(np.int64).max, 2))
    g.node("Slice", seen, first, end, axis, name=f"conv_out.{i}")
    g.output(f"conv_out.{i}", "float32", (1, spec.dim, taps - 1))
    return w.product(g.node("Mul", c, mixed), w.matrix([p + "out_proj.weight"]), (1, "T"))


class Attention:
    """Attention layers, with what they share: angles and numbers of slots. With ``kv`` f16 not only the
    caches are float16: the operator takes queries, new keys and values of their type, and its output is."""

    def __init__(self, g: Graph, w: Weights, spec: ModelSpec, kv: str) -> None:
        self._g, self._w, self._spec = g, w, spec
        self._kv = {"f32": "float32", "f16": "float16"}[kv]
        self._positions = g.node("Cast", "positions", to=11, name="positions_f64")
        self._angles: dict[tuple[float, float], tuple[str, str]] = {}
        self._queries: list[str] = []
        length = g.node("Cast", g.node("Shape", "positions", start=1, end=2), to=6)
        first = g.node("Cast", g.node("Gather", "positions", g.constant(np.array(0)), axis=1), to=6)
        filled = g.input("filled", "int32", (1,))
        unsaid = g.node("Less", filled, g.constant(np.array(0, np.int32)))
        self._slots = {False: self._counts(g.node("Where", unsaid, first, filled), length)}
        if any(layer.window for layer in spec.layers):
            start = g.input("window_start", "int32", (1,))
            self._slots[True] = self._counts(g.node("Sub", first, start), length)

    def _counts(self, filled: str, length: str) -> tuple[str, str]:
        """What GroupQueryAttention wants to know of a cache: slots in use after the pass less 1, [1], and
        slots in use after the pass, []."""
        g = self._g
        total = g.node("Add", filled, length)
        return g.node("Sub", total, g.constant(np.array(1, np.int32))), g.node("Squeeze", total)

    def layer(self, i: int, layer: LayerSpec, h: str) -> str:
        g, w, spec, p = self._g, self._w, self._spec, f"blk.{i}."
        queries, keys = spec.n_heads * spec.head_dim, layer.n_kv_heads * spec.head_dim
        bias = ""
        if spec.qkv_bias:
            biases = np.concatenate([w.read(f"{p}attn_{c}.bias") for c in "qkv"])
            bias = g.weight(p + "attn_qkv.bias", "float32", biases.shape, [biases])
        matrix = w.matrix([f"{p}attn_{c}.weight" for c in "qkv"])
        q, k, v = g.split(w.product(h, matrix, (1, "T"), bias), [queries, keys, keys], ("q", "k", "v"))
        if spec.qk_norm:
            q = self._head_norm(q, spec.n_heads, p + "attn_q_norm.weight")
            k = self._head_norm(k, layer.n_kv_heads, p + "attn_k_norm.weight")
        q, k = self._rotated(layer, q, spec.n_heads), self._rotated(layer, k, layer.n_kv_heads)
        if not layer.window:
            self._queries.append(g.node("Gather", q, "rows", axis=1, name=f"queries.{i}"))
        slots = "window_slots" if layer.window else "slots"
        for c in "kv":
            shape = (1, layer.n_kv_heads, slots, spec.head_dim)
            g.input(f"{c}.{i}", self._kv, shape)
            g.output(f"{c}_out.{i}", self._kv, shape)
        last, total = self._slots[layer.window > 0]
        half = self._kv == "float16"
        if half:
            q, k, v = (g.cast(x, "float16") for x in (q, k, v))
        out = g.contrib(
            "GroupQueryAttention",
            *(q, k, v, f"k.{i}", f"v.{i}", last, total),
            shape=(1, "T", queries),
            outputs=(f"k_out.{i}", f"v_out.{i}"),
            dtype=self._kv,
            num_heads=spec.n_heads,
            kv_num_heads=layer.n_kv_heads,
            scale=spec.attn_scale,
            local_window_size=layer.window or -1,
        )
        if half:
            out = g.cast(out, "float32")
        return w.product(out, w.matrix([p + "attn_output.weight"]), (1, "T"))

    def output_queries(self) -> None:
        """The output with the queries of all layers that see everything, if there are any."""
        if self._queries:
            width = len(self._queries) * self._spec.n_heads * self._spec.head_dim
            self._g.node("Concat", *self._queries, axis=2, name="queries")
            self._g.output("queries", "float32", (1, "R", width))

    def _head_norm(self, x: str, heads: int, name: str) -> str:
        g, dim = self._g, self._spec.head_dim
        apart = g.node("Reshape", x, g.constant(np.array([1, -1, heads, dim], np.int64)))
        normed = norm(g, self._w, self._spec, apart, name)
        return g.node("Reshape", normed, g.constant(np.array([1, -1, heads * dim], np.int64)))

    def _rotated(self, layer: LayerSpec, x: str, heads: int) -> str:
        spec = self._spec
        cos, sin = self._table(layer)
        return self._g.node(
            "RotaryEmbedding",
            *(x, cos, sin),
            interleaved=int(spec.rope_style == "interleaved"),
            num_heads=heads,
            rotary_embedding_dim=0 if spec.rope_dims == spec.head_dim else spec.rope_dims,
        )

    def _table(self, layer: LayerSpec) -> tuple[str, str]:
        """cos and sin of the angles of the new tokens, [1, T, rope_dims / 2]. Whole turns are taken off in
        double precision: at position 8,000 a float's angle is off by a thousandth."""
        g, spec, key = self._g, self._spec, (layer.rope_base, layer.rope_scale)
        if key not in self._angles:
            power = np.arange(spec.rope_dims // 2, dtype=np.float64) * 2 / spec.rope_dims
            frequency = layer.rope_scale / layer.rope_base**power
            if spec.rope_factors:
                frequency /= self._w.read("rope_freqs.weight")
            apart = g.node("Unsqueeze", self._positions, g.constant(np.array([2], np.int64)))
            turns = g.node("Mul", apart, g.constant(frequency[None, None] / (2 * np.pi)))
            part = g.node("Cast", g.node("Sub", turns, g.node("Floor", turns)), to=1)
            angle = g.node("Mul", part, g.constant(np.array(2 * np.pi, np.float32)))
            self._angles[key] = g.node("Cos", angle), g.node("Sin", angle)
        return self._angles[key]
