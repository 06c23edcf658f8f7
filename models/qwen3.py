"""Qwen3 (dense): an RMSNorm over each head of q and k instead of biases, a head size of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import gguf_keys, hf_config
from .reader import Reader
from .spec import ModelSpec

ARCHITECTURE = "qwen3"
MODEL_TYPES = ("qwen3",)


def from_gguf(metadata: Mapping[str, Any], tensors: gguf_keys.Tensors) -> ModelSpec:
    keys = Reader(metadata, "qwen3.")
    spec = gguf_keys.base_spec(keys, metadata, tensors, ARCHITECTURE)
    gguf_keys.all_attention(keys, spec)
    base = keys.positive("rope.freq_base")
    scale = gguf_keys.rope_scale(keys)
    # Which layers a window is for is not in the file.
    keys.expect("attention.sliding_window", 0)
    keys.finish()
    layers = tuple(replace(layer, rope_base=base, rope_scale=scale) for layer in spec.layers)
    return replace(spec, layers=layers, qk_norm=True)


def from_hf(config: Mapping[str, Any]) -> ModelSpec:
    # The class has 128 when a config does not say.
    reader = hf_config.HfConfig({"head_dim": 128, **config}, *MODEL_TYPES)
    spec = hf_config.base_spec(reader, ARCHITECTURE, tied=False)
    reader.expect("hidden_act", "silu")
    reader.expect("attention_bias", False)
    layers = hf_config.windowed_layers(reader, spec, hf_config.read_rope(reader, 10000.0))
    reader.close()
    return replace(spec, layers=layers, qk_norm=True)


def hf_tensor_names(spec: ModelSpec) -> dict[str, str]:
    """GGUF name -> Hugging Face name of every tensor."""
    return hf_config.tensor_names(spec)
