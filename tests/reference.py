"""An independent decoder in numpy: reads a GGUF file with the `gguf` package, is driven by the
ModelSpec alone, and computes everything in float64 without a cache. Slow, plain, and the oracle of
the native decoder's tests."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from edgert.models import LayerSpec, ModelSpec, load_spec

Array = np.ndarray


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Metadata and tensor shapes (outermost first) of a file, as ``load_spec`` takes them."""
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    return metadata, {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}


@lru_cache(maxsize=4)
def weights(path: Path) -> dict[str, Array]:
    """Every tensor of a file, dequantised."""
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
        for t in gguf.GGUFReader(path).tensors
    }


@lru_cache(maxsize=4)
def quantised(path: Path) -> frozenset[str]:
    """Names of the tensors of a file whose type has blocks."""
    return frozenset(
        t.name for t in gguf.GGUFReader(path).tensors if gguf.GGML_QUANT_SIZES[t.tensor_type][0] > 1
    )


class Reference:
    """``spec`` may be given to see what another description would compute from the same weights.
    ``kv_type`` rounds keys and values as a cache of that type would ("q8": to int8 with an f16 scale for each
    32); ``int8_blocks`` rounds what meets a
    quantised matrix to int8 in blocks of so many values, each with a scale of its own (0: not at all).
    In front of q, k and v what that leaves over is rounded the same way and added, as the native engine
    does; the head, where it does so too, is left out. ``streaming`` are the KV heads (layer, head) that see
    the first 16 positions and the last ``window`` alone."""

    def __init__(
        self,
        path: Path,
        spec: ModelSpec | None = None,
        kv_type: Any = np.float64,
        int8_blocks: int = 0,
        streaming: frozenset[tuple[int, int]] = frozenset(),
        window: int = 0,
    ) -> None:
        self.spec = spec or load_spec(*read_gguf(path))
        self._kv_type = kv_type
        self._int8_blocks = int8_blocks
        self._streaming, self._window = streaming, window
        self._quantised = quantised(path) if int8_blocks else frozenset()
        self._w = weights(path)

    def logits(self, tokens: list[int]) -> Array:
        """Logits after each token, [len(tokens), vocab]."""
        spec, w = self.spec, self._w
        x = w["token_embd.weight"][np.asarray(tokens)] * spec.embed_scale
        for i, layer in enumerate(spec.layers):
            p = f"blk.{i}."
            h = self._norm(x, p + "attn_norm")
            h = self._conv(p, h) if layer.kind == "conv" else self._attention(p, layer, h)
            if spec.post_norms:
                h = self._norm(h, p + "post_attention_norm")
            x = x + h
            h = self._norm(x, p + "ffn_norm")
            h = self._linear(
                _ACTIVATIONS[spec.activation](self._linear(h, p + "ffn_gate"))
                * self._linear(h, p + "ffn_up"),
                p + "ffn_down",
            )
            if spec.post_norms:
                h = self._norm(h, p + "post_ffw_norm")
            x = x + h
        x = self._norm(x, spec.output_norm.removesuffix(".weight"))
        return x @ w["token_embd.weight" if spec.tied_head else "output.weight"].T

    def _norm(self, x: Array, name: str) -> Array:
        scale = 1.0 / np.sqrt((x * x).mean(-1, keepdims=True) + self.spec.norm_eps)
        return x * scale * self._w[name + ".weight"]

    def _linear(self, x: Array, name: str) -> Array:
        if name + ".weight" in self._quantised:
            whole, x = x, self._rounded(x)
            if name.endswith(("attn_q", "attn_k", "attn_v")):
                x = x + self._rounded(whole - x)
        y = x @ self._w[name + ".weight"].T
        return y + self._w[name + ".bias"] if name + ".bias" in self._w else y

    def _rounded(self, x: Array) -> Array:
        blocks = x.astype(np.float32).reshape(len(x), -1, self._int8_blocks)
        top = np.abs(blocks).max(-1, keepdims=True)
        codes = np.rint(blocks * np.divide(127, top, out=np.zeros_like(top), where=top > 0))
        return (codes * (top / np.float32(127))).reshape(x.shape).astype(np.float64)

    def _kept(self, x: Array) -> Array:
        if self._kv_type != "q8":
            return x.astype(self._kv_type).astype(np.float64)
        blocks = x.reshape(*x.shape[:-1], -1, 32)
        scale = (np.abs(blocks).max(-1, keepdims=True) / 127).astype(np.float16).astype(np.float64)
        codes = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
        return (codes.clip(-127, 127) * scale).reshape(x.shape)

    def _attention(self, p: str, layer: LayerSpec, x: Array) -> Array:
        spec, n = self.spec, len(x)
        q = self._linear(x, p + "attn_q").reshape(n, spec.n_heads, spec.head_dim)
        k = self._linear(x, p + "attn_k").reshape(n, layer.n_kv_heads, spec.head_dim)
        v = self._linear(x, p + "attn_v").reshape(n, layer.n_kv_heads, spec.head_dim)
        if spec.qk_norm:
            q, k = self._norm(q, p + "attn_q_norm"), self._norm(k, p + "attn_k_norm")
        q, k = self._rope(layer, q), self._rope(layer, k)
        k, v = self._kept(k), self._kept(v)
        group = spec.n_heads // layer.n_kv_heads
        scores = np.einsum("qhd,khd->hqk", q, k.repeat(group, axis=1)) * spec.attn_scale
        age = np.arange(n)[:, None] - np.arange(n)[None, :]
        seen = (age >= 0) & (age < (layer.window or n))
        scores = np.where(seen, scores, -np.inf)
        near = (age < self._window) | (np.arange(n) < 16)
        number = int(p.split(".")[1])
        for head in range(spec.n_heads):
            if (number, head // group) in self._streaming:
                scores[head][~near] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("hqk,khd->qhd", weights, v.repeat(group, axis=1))
        return self._linear(out.reshape(n, -1), p + "attn_output")

    def _rope(self, layer: LayerSpec, x: Array) -> Array:
        """x is [position, head, head_dim]; the first rope_dims of a head turn, in pairs."""
        spec = self.spec
        pairs = spec.rope_dims // 2
        frequency = layer.rope_scale / layer.rope_base ** (2 * np.arange(pairs) / spec.rope_dims)
        if spec.rope_factors:
            frequency = frequency / self._w["rope_freqs.weight"]
        angle = np.arange(len(x))[:, None, None] * frequency
        if spec.rope_style == "interleaved":
            first, second = slice(0, spec.rope_dims, 2), slice(1, spec.rope_dims, 2)
        else:
            first, second = slice(0, pairs), slice(pairs, spec.rope_dims)
        out = x.copy()
        out[..., first] = x[..., first] * np.cos(angle) - x[..., second] * np.sin(angle)
        out[..., second] = x[..., second] * np.cos(angle) + x[..., first] * np.sin(angle)
        return out

    def _conv(self, p: str, x: Array) -> Array:
        taps = self.spec.conv_kernel
        b, c, h = np.split(self._linear(x, p + "shortconv.in_proj"), 3, axis=-1)
        padded = np.concatenate([np.zeros((taps - 1, self.spec.dim)), b * h])
        kernel = self._w[p + "shortconv.conv.weight"]
        out = sum(kernel[:, t] * padded[t : t + len(x)] for t in range(taps))
        return self._linear(c * out, p + "shortconv.out_proj")


def _silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


_ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh}
