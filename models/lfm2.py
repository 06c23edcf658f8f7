"""LFM2: gated short convolutions with a few grouped attention layers between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import gguf_keys, hf_config
from .errors import BadModelMetadata
from .reader import Reader
from .spec import LayerSpec, ModelSpec

ARCHITECTURE = "lfm2"
MODEL_TYPES = ("lfm2",)
# Converters give the final norm the name of an embedding norm.
OUTPUT_NORM = "token_embd_norm.weight"


def from_gguf(metadata: Mapping[str, Any], tensors: gguf_keys.Tensors) -> ModelSpec:
    """A layer whose number of KV heads is 0 is a convolution."""
    keys = Reader(metadata, "lfm2.")
    spec = gguf_keys.base_spec(keys, metadata, tensors, ARCHITECTURE)
    base = keys.positive("rope.freq_base")
    scale = gguf_keys.rope_scale(keys)
    keys.expect("attention.sliding_window", 0)
    taps = keys.integer("shortconv.l_cache")
    keys.finish()
    layers = tuple(replace(x, rope_base=base, rope_scale=scale) if x.n_kv_heads else x for x in spec.layers)
    return _lfm2(spec, layers, taps)


def from_hf(config: Mapping[str, Any]) -> ModelSpec:
    reader = hf_config.HfConfig(_renamed(config), *MODEL_TYPES)
    spec = hf_config.base_spec(reader, ARCHITECTURE, tied=True, norm_eps="norm_eps")
    rope = hf_config.read_rope(reader, 1e6)
    hf_config.no_llama3(rope, ARCHITECTURE)
    reader.expect("conv_bias", False)
    reader.expect("block_use_swiglu", True)
    reader.expect("use_pos_enc", True)
    # The same sizes once more, under names that only older code read.
    for name in ("block_dim", "conv_dim", "conv_dim_out"):
        reader.expect(name, spec.dim)
    reader.expect("num_heads", spec.n_heads)
    reader.expect("block_norm_eps", spec.norm_eps)
    reader.no_effect(
        "block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init"
    )
    taps = reader.integer("conv_L_cache", 3)
    types = hf_config.layer_types(reader, spec.n_layers, ("conv", "full_attention"))
    attention = _attention_layers(reader, spec.n_layers)
    if types is not None:
        attention = {i for i, kind in enumerate(types) if kind == "full_attention"}
    spec = replace(spec, ffn_dim=_ffn_dim(reader, spec.ffn_dim))
    reader.close()
    layers = tuple(
        replace(x, rope_base=rope.base, rope_scale=rope.scale)
        if i in attention
        else LayerSpec(kind="conv", n_kv_heads=0)
        for i, x in enumerate(spec.layers)
    )
    return _lfm2(spec, layers, taps)


def hf_tensor_names(spec: ModelSpec) -> dict[str, str]:
    """GGUF name -> Hugging Face name of every tensor. The convolution's weight is [dim, 1, taps] in a
    checkpoint and [dim, taps] in a GGUF file."""
    names = hf_config.tensor_names(
        spec,
        {
            "attn_norm": "operator_norm",
            "attn_output": "self_attn.out_proj",
            "attn_q_norm": "self_attn.q_layernorm",
            "attn_k_norm": "self_attn.k_layernorm",
            "shortconv.in_proj": "conv.in_proj",
            "shortconv.conv": "conv.conv",
            "shortconv.out_proj": "conv.out_proj",
            "ffn_norm": "ffn_norm",
            "ffn_gate": "feed_forward.w1",
            "ffn_up": "feed_forward.w3",
            "ffn_down": "feed_forward.w2",
        },
    )
    names[spec.output_norm] = "model.embedding_norm.weight"
    return names


def _renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Older names of keys replaced by the present ones, which they override as the class has it."""
    out = dict(config)
    for old, new in (("tie_embedding", "tie_word_embeddings"), ("block_ff_dim", "intermediate_size")):
        if old in out:
            out[new] = out.pop(old)
    return out


def _attention_layers(reader: hf_config.HfConfig, n_layers: int) -> set[int]:
    """Layers named by ``full_attn_idxs``; all of them when it is absent."""
    if "full_attn_idxs" not in reader:
        return set(range(n_layers))
    indices = reader.integers("full_attn_idxs")
    if any(not 0 <= i < n_layers for i in indices):
        raise BadModelMetadata(f"full_attn_idxs: expected layers below {n_layers}, found {indices}")
    return set(indices)


def _ffn_dim(reader: hf_config.HfConfig, stated: int) -> int:
    """Rows of the FFN: the stated size, or two thirds of it, scaled and rounded up."""
    adjust = reader.flag("block_auto_adjust_ff_dim", True)
    multiplier = reader.positive("block_ffn_dim_multiplier", 1.0)
    multiple = reader.integer("block_multiple_of", 256)
    if not adjust:
        return stated
    size = int(multiplier * int(2 * stated / 3))
    return multiple * ((size + multiple - 1) // multiple)


def _lfm2(spec: ModelSpec, layers: tuple[LayerSpec, ...], taps: int) -> ModelSpec:
    return replace(spec, layers=layers, qk_norm=True, conv_kernel=taps, output_norm=OUTPUT_NORM)
