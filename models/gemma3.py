"""Gemma 3, text: layers with a sliding window and a rope base of their own between global ones,
q/k norms, norms after attention and FFN, scaled embeddings, GELU.

A GGUF file's norm weights have the 1 added that the Hugging Face code adds at run time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import gguf_keys, hf_config
from .errors import BadModelMetadata, UnsupportedArchitecture
from .reader import Reader
from .spec import LayerSpec, ModelSpec

ARCHITECTURE = "gemma3"
MODEL_TYPES = ("gemma3_text",)
LOCAL_BASE = 10000.0
PATTERN = 6  # every sixth layer is global
LAYERS_27B = 62


def from_gguf(metadata: Mapping[str, Any], tensors: gguf_keys.Tensors) -> ModelSpec:
    """A file has no key for the attention scale; the 27B model alone, known by its 62 layers, has
    another than 1/sqrt(head_dim). Without a window all layers are global."""
    keys = Reader(metadata, "gemma3.")
    spec = gguf_keys.base_spec(keys, metadata, tensors, ARCHITECTURE)
    gguf_keys.all_attention(keys, spec)
    base = keys.positive(keys.pick("rope.freq_base", "rope.global.freq_base"))
    local_base = keys.positive(keys.pick("rope.freq_base_swa", "rope.local.freq_base"), LOCAL_BASE)
    scale = gguf_keys.rope_scale(keys)
    window = keys.integer("attention.sliding_window", 0, low=0)
    name = "attention.sliding_window_pattern"
    if keys.is_array(name):
        sliding = keys.array(name, bool, spec.n_layers)
    else:
        sliding = _sliding(spec.n_layers, keys.integer(name, PATTERN))
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        keys.expect(cap, 0.0)
    keys.finish()
    if not window:
        sliding = [False] * spec.n_layers
    if spec.n_layers == LAYERS_27B:
        spec = replace(spec, attn_scale=1.0 / math.sqrt(spec.dim / spec.n_heads))
    return _gemma(spec, sliding, window, base, local_base, scale)


def from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """Config of Gemma3ForCausalLM; of a multimodal one, pass its ``text_config``."""
    # Published configs leave out what the class has as its default.
    defaults = {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    }
    reader = hf_config.HfConfig({**defaults, **config}, *MODEL_TYPES)
    spec = hf_config.base_spec(reader, ARCHITECTURE, tied=True)
    reader.expect("attention_bias", False)
    reader.expect("use_bidirectional_attention", False)
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        reader.expect(cap, 0.0)
    for activation in ("hidden_activation", "hidden_act"):
        reader.expect(activation, "gelu_pytorch_tanh")
    scale = 1.0 / math.sqrt(reader.positive("query_pre_attn_scalar"))
    window = reader.integer("sliding_window", 0, low=0)
    pattern = reader.integer("sliding_window_pattern", PATTERN)
    types = hf_config.layer_types(reader, spec.n_layers, ("sliding_attention", "full_attention"))
    sliding = [t == "sliding_attention" for t in types] if types else _sliding(spec.n_layers, pattern)
    if any(sliding) and not window:
        raise BadModelMetadata("sliding_window: expected a window for the sliding layers, found none")
    full, local = _ropes(reader)
    reader.close()
    spec = replace(spec, attn_scale=scale)
    return _gemma(spec, sliding, window, full.base, local.base, full.scale)


def hf_tensor_names(spec: ModelSpec) -> dict[str, str]:
    """GGUF name -> Hugging Face name of every tensor."""
    renamed = {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    return hf_config.tensor_names(spec, renamed)


def _sliding(n_layers: int, pattern: int) -> list[bool]:
    return [(i + 1) % pattern != 0 for i in range(n_layers)]


def _ropes(reader: hf_config.HfConfig) -> tuple[hf_config.Rope, hf_config.Rope]:
    """Rope of the global and of the sliding layers. ``rope_parameters`` has a table for each;
    before, ``rope_scaling`` was for the global layers alone."""
    base = reader.positive("rope_theta", 1e6)
    local_base = reader.positive("rope_local_base_freq", LOCAL_BASE)
    name = reader.pick("rope_parameters", "rope_scaling")
    tables = reader.mapping(name)
    if "full_attention" in tables or "sliding_attention" in tables:
        nested = Reader({f"{name}.{key}": value for key, value in tables.items()}, f"{name}.")
        full = hf_config.rope_from(nested.mapping("full_attention"), f"{name}.full_attention", base)
        local = hf_config.rope_from(
            nested.mapping("sliding_attention"), f"{name}.sliding_attention", local_base
        )
        nested.finish()
    else:
        full = hf_config.rope_from(tables, name, base)
        local = hf_config.Rope(local_base, 1.0, {})
    for rope in (full, local):
        hf_config.no_llama3(rope, ARCHITECTURE)
    if local.scale != 1.0:
        raise UnsupportedArchitecture(
            f"{name}.sliding_attention: scaling is implemented for full_attention only"
        )
    return full, local


def _gemma(
    spec: ModelSpec, sliding: Sequence[bool], window: int, base: float, local_base: float, scale: float
) -> ModelSpec:
    def layer(old: LayerSpec, is_sliding: bool) -> LayerSpec:
        if is_sliding:
            return replace(old, window=window, rope_base=local_base)
        return replace(old, rope_base=base, rope_scale=scale)

    return replace(
        spec,
        layers=tuple(layer(old, s) for old, s in zip(spec.layers, sliding, strict=True)),
        activation="gelu_tanh",
        embed_scale=math.sqrt(spec.dim),
        qk_norm=True,
        post_norms=True,
    )
