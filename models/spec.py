"""ModelSpec: what a model is, in one object that every reader of the project shares.

The native decoder, the exporters, the memory planner and the ONNX graph builder read this and
nothing else. A family file (``models/llama.py`` and its neighbours) builds it from GGUF metadata
or from a Hugging Face config.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer.

    ``kind`` is the token mixer: softmax attention or LFM2's gated short convolution.
    ``window`` is the number of positions a query sees, itself included (0: all of them).
    ``rope_base`` and ``rope_scale`` give the angle of pair i at position p:
    ``p * rope_scale / rope_base ** (2 i / rope_dims)``.
    """

    kind: Literal["attention", "conv"] = "attention"
    n_kv_heads: int = 0
    window: int = 0
    rope_base: float = 10000.0
    rope_scale: float = 1.0


@dataclass(frozen=True)
class ModelSpec:
    family: str
    name: str
    dim: int
    n_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    layers: tuple[LayerSpec, ...]
    rope_dims: int
    # "interleaved": pairs (2i, 2i+1), as GGUF's permuted llama weights want it.
    # "half": pairs (i, i + rope_dims/2), as Hugging Face code does it.
    rope_style: Literal["interleaved", "half"]
    activation: Literal["silu", "gelu_tanh"] = "silu"
    attn_scale: float = 0.0  # factor on q.k before the softmax
    embed_scale: float = 1.0  # factor on the embedding row of a token
    qk_norm: bool = False  # RMSNorm over each head of q and of k, before rope
    qkv_bias: bool = False
    post_norms: bool = False  # RMSNorm on the output of attention and of the FFN, before the residual
    rope_factors: bool = False  # tensor rope_freqs.weight divides the angle of each pair (Llama 3.x)
    conv_kernel: int = 0  # taps of the short convolution (0: none)
    tied_head: bool = True  # the vocabulary head is the embedding matrix
    # GGUF name of the norm before the head.
    output_norm: str = "output_norm.weight"

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """GGUF name -> shape of every tensor the model must have, outermost dimension first."""
        d, hd, f = self.dim, self.head_dim, self.ffn_dim
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocab_size, d),
            self.output_norm: (d,),
        }
        if not self.tied_head:
            shapes["output.weight"] = (self.vocab_size, d)
        if self.rope_factors:
            shapes["rope_freqs.weight"] = (self.rope_dims // 2,)
        for i, layer in enumerate(self.layers):
            b = f"blk.{i}."
            shapes[b + "attn_norm.weight"] = (d,)
            if layer.kind == "conv":
                shapes[b + "shortconv.in_proj.weight"] = (3 * d, d)
                shapes[b + "shortconv.conv.weight"] = (d, self.conv_kernel)
                shapes[b + "shortconv.out_proj.weight"] = (d, d)
            else:
                q, kv = self.n_heads * hd, layer.n_kv_heads * hd
                shapes[b + "attn_q.weight"] = (q, d)
                shapes[b + "attn_k.weight"] = (kv, d)
                shapes[b + "attn_v.weight"] = (kv, d)
                shapes[b + "attn_output.weight"] = (d, q)
                if self.qkv_bias:
                    shapes[b + "attn_q.bias"] = (q,)
                    shapes[b + "attn_k.bias"] = (kv,)
                    shapes[b + "attn_v.bias"] = (kv,)
                if self.qk_norm:
                    shapes[b + "attn_q_norm.weight"] = (hd,)
                    shapes[b + "attn_k_norm.weight"] = (hd,)
            if self.post_norms:
                shapes[b + "post_attention_norm.weight"] = (d,)
                shapes[b + "post_ffw_norm.weight"] = (d,)
            shapes[b + "ffn_norm.weight"] = (d,)
            shapes[b + "ffn_gate.weight"] = (f, d)
            shapes[b + "ffn_up.weight"] = (f, d)
            shapes[b + "ffn_down.weight"] = (d, f)
        return shapes

    def as_dict(self) -> dict[str, Any]:
        """Plain dict of every field; ``layers`` becomes a list of dicts. What the core reads."""
        out = asdict(self)
        out["layers"] = [asdict(layer) for layer in self.layers]
        return out
