"""A decoder in torch, of every family, driven by the ModelSpec: for what needs gradients or other attention.

It keeps no cache and computes whole sequences. Weights are those of a GGUF file, dequantised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from edgert.models import LayerSpec, ModelSpec
from torch import Tensor

from edgert import _native
from edgert.engines import native_spec

# (layer, q [B, H, T, hd], k [B, KV, T, hd], v [B, KV, T, hd], allowed [T, T]) -> [B, H, T, hd]. q and k come
# after their norms and rope; q is not scaled yet: its products with k want the factor ``spec.attn_scale``.
# ``allowed[t, s]``: position t may see position s. Query heads of one KV head lie together.
Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]


class TorchDecoder:
    """A GGUF model in memory as ``dtype``; no weight wants a gradient, what is computed may carry one.

    Raises ModelFileError and UnsupportedModelError as the native engine does.
    """

    def __init__(self, model: Path | str | _native.GgufFile, dtype: torch.dtype = torch.float32) -> None:
        file = model if isinstance(model, _native.GgufFile) else _native.GgufFile(str(model))
        self.spec: ModelSpec = native_spec(file, file.metadata)
        self.dtype = dtype
        self._w = self._weights(file)

    def _weights(self, file: _native.GgufFile) -> Mapping[str, Tensor]:
        return {
            name: torch.from_numpy(file.dequantize(name)).to(self.dtype) for name in self.spec.tensor_shapes()
        }

    @property
    def embedding(self) -> Tensor:
        """[vocab, dim], without ``spec.embed_scale``."""
        return self._w["token_embd.weight"]

    def states(self, ids: Tensor, attend: Attend | None = None) -> Tensor:
        """The residual stream before the last norm, [B, T, dim], of token ids [B, T]. ``attend`` takes the
        place of softmax attention in every attention layer."""
        x = self.embed(ids)
        for i in range(self.spec.n_layers):
            x = self.layer(i, x, attend)
        return x

    def embed(self, ids: Tensor) -> Tensor:
        """The stream that enters layer 0, [B, T, dim]."""
        return self.embedding[ids] * self.spec.embed_scale

    def layer(self, i: int, x: Tensor, attend: Attend | None = None, start: int = 0) -> Tensor:
        """The stream after layer ``i`` of the stream ``x`` [B, T, dim] before it, of the positions from
        ``start`` on. Where these are not all, ``attend`` must know the keys and values before them; what it
        is given is of the T positions alone."""
        spec, layer, p = self.spec, self.spec.layers[i], f"blk.{i}."
        h = self._norm(x, p + "attn_norm")
        h = self._conv(p, h) if layer.kind == "conv" else self._attention(i, h, attend, start)
        if spec.post_norms:
            h = self._norm(h, p + "post_attention_norm")
        x = x + h
        h = self._norm(x, p + "ffn_norm")
        gate = self._linear(h, p + "ffn_gate")
        gate = F.silu(gate) if spec.activation == "silu" else F.gelu(gate, approximate="tanh")
        h = self._linear(gate * self._linear(h, p + "ffn_up"), p + "ffn_down")
        if spec.post_norms:
            h = self._norm(h, p + "post_ffw_norm")
        return x + h

    def normed(self, states: Tensor) -> Tensor:
        """``states`` after the last norm: what the vocabulary head sees."""
        return self._norm(states, self.spec.output_norm.removesuffix(".weight"))

    def logits(self, states: Tensor) -> Tensor:
        """[..., vocab] of :meth:`states` [..., dim]."""
        name = "token_embd.weight" if self.spec.tied_head else "output.weight"
        return self.normed(states) @ self._w[name].T

    def qkv(self, i: int, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of attention layer ``i`` as ``Attend`` takes them, from its normed input [B, T, dim] at
        the positions from ``start`` on."""
        spec, layer, p = self.spec, self.spec.layers[i], f"blk.{i}."
        b, n = x.shape[:2]
        q = self._linear(x, p + "attn_q").view(b, n, spec.n_heads, spec.head_dim)
        k = self._linear(x, p + "attn_k").view(b, n, layer.n_kv_heads, spec.head_dim)
        v = self._linear(x, p + "attn_v").view(b, n, layer.n_kv_heads, spec.head_dim)
        if spec.qk_norm:
            q, k = self._norm(q, p + "attn_q_norm"), self._norm(k, p + "attn_k_norm")
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        positions = torch.arange(start, start + q.shape[2])
        return self.rotate(layer, q, positions), self.rotate(layer, k, positions), v

    def _attention(self, i: int, x: Tensor, attend: Attend | None, start: int) -> Tensor:
        layer = self.spec.layers[i]
        b, n = x.shape[:2]
        q, k, v = self.qkv(i, x, start)
        if attend is not None:
            out = attend(i, q, k, v, allowed(n, layer.window))
        else:
            group = self.spec.n_heads // layer.n_kv_heads
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            windowed = 0 < layer.window < n
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=allowed(n, layer.window) if windowed else None,
                is_causal=not windowed,
                scale=self.spec.attn_scale,
            )
        return self._linear(out.transpose(1, 2).reshape(b, n, -1), f"blk.{i}.attn_output")

    def rotate(self, layer: LayerSpec, x: Tensor, positions: Tensor, back: bool = False) -> Tensor:
        """``x`` [..., T, hd] turned to its ``positions`` [T], or back from there; the first ``rope_dims`` of
        a head turn, in pairs."""
        dims = self.spec.rope_dims
        pairs = dims // 2
        # In double precision: at position 8,000 a float's angle is off by a thousandth.
        power = torch.arange(pairs, dtype=torch.float64) * 2 / dims
        frequency = layer.rope_scale / layer.rope_base**power
        if self.spec.rope_factors:
            frequency = frequency / self._w["rope_freqs.weight"].double()
        angle = positions.double()[:, None] * (-frequency if back else frequency)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        turned, rest = x[..., :dims], x[..., dims:]
        if self.spec.rope_style == "interleaved":
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = turned[..., :pairs], turned[..., pairs:]
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([turned, rest], -1)

    def _conv(self, p: str, x: Tensor) -> Tensor:
        taps, n = self.spec.conv_kernel, x.shape[1]
        b, c, h = self._linear(x, p + "shortconv.in_proj").chunk(3, -1)
        padded = F.pad(b * h, (0, 0, taps - 1, 0))
        kernel = self._w[p + "shortconv.conv.weight"]
        mixed = torch.stack([kernel[:, t] * padded[:, t : t + n] for t in range(taps)]).sum(0)
        return self._linear(c * mixed, p + "shortconv.out_proj")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self._w[name + ".weight"], self.spec.norm_eps)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._w[name + ".weight"], self._w.get(name + ".bias"))


def allowed(n: int, window: int = 0) -> Tensor:
    """[n, n], true where a position (row) may see another (column); ``window`` 0: all before it."""
    age = torch.arange(n)[:, None] - torch.arange(n)[None, :]
    return (age >= 0) & (age < (window or n))
