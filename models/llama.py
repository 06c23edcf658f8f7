"""Llama and its kin: Llama 2 and 3, SmolLM2, Mistral.

Q and K rows of a GGUF file are permuted so that rope turns neighbouring pairs; a Hugging Face
checkpoint keeps the halves. The spec says which by ``rope_style``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import gguf_keys, hf_config
from .errors import UnsupportedArchitecture
from .reader import Reader
from .spec import ModelSpec

ARCHITECTURE = "llama"
MODEL_TYPES = ("llama", "mistral")


def from_gguf(metadata: Mapping[str, Any], tensors: gguf_keys.Tensors) -> ModelSpec:
    """Biases of q, k and v and the rope factors of Llama 3 are seen by the presence of their tensors.

    Converters write no ``attention.sliding_window`` for this architecture (Mistral included), and then
    every layer sees everything; a file that has the key gets that window in every layer.
    """
    keys = Reader(metadata, "llama.")
    spec = gguf_keys.base_spec(keys, metadata, tensors, ARCHITECTURE)
    gguf_keys.all_attention(keys, spec)
    base = keys.positive("rope.freq_base", 10000.0)
    scale = gguf_keys.rope_scale(keys)
    window = keys.integer("attention.sliding_window", 0, low=0)
    # The label of the layout described above.
    keys.expect("tensor_data_layout", "Meta AI original pth")
    keys.finish()
    return replace(
        spec,
        layers=tuple(
            replace(layer, rope_base=base, rope_scale=scale, window=window) for layer in spec.layers
        ),
        rope_style="interleaved",
        qkv_bias="blk.0.attn_q.bias" in tensors,
        rope_factors="rope_freqs.weight" in tensors,
    )


def from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """Config of LlamaForCausalLM or MistralForCausalLM."""
    reader = hf_config.HfConfig(config, *MODEL_TYPES)
    spec = hf_config.base_spec(reader, ARCHITECTURE, tied=False)
    rope = hf_config.read_rope(reader, 10000.0)
    window = 0
    if config["model_type"] == "mistral":
        # None switches the window off; the class has 4096 when a config does not say.
        window = 0 if config.get("sliding_window", 4096) is None else reader.integer("sliding_window", 4096)
    reader.expect("hidden_act", "silu")
    reader.expect("attention_bias", False)  # it would put a bias on the output projection too
    reader.expect("mlp_bias", False)
    reader.close()
    return replace(
        spec,
        layers=tuple(
            replace(layer, rope_base=rope.base, rope_scale=rope.scale, window=window) for layer in spec.layers
        ),
        rope_factors=bool(rope.llama3),
    )


def hf_tensor_names(spec: ModelSpec) -> dict[str, str]:
    """GGUF name -> Hugging Face name of every tensor; ``rope_freqs.weight`` comes from
    :func:`rope_factors`."""
    return hf_config.tensor_names(spec)


def rope_factors(config: Mapping[str, Any]) -> list[float]:
    """The values of ``rope_freqs.weight``, one a rotated pair, for a config with Llama 3's scaling.

    Wavelengths below ``original / high_freq_factor`` positions keep their frequency, those above
    ``original / low_freq_factor`` are slowed by ``factor``, those between interpolate (Llama 3.1's
    reference code). Raises UnsupportedArchitecture for a config without that scaling.
    """
    reader = hf_config.HfConfig(config, *MODEL_TYPES)
    spec = hf_config.base_spec(reader, ARCHITECTURE, tied=False)
    rope = hf_config.read_rope(reader, 10000.0)
    if not rope.llama3:
        raise UnsupportedArchitecture("rope_type: expected 'llama3', found another kind of scaling")
    factor = rope.llama3["factor"]
    low, high = rope.llama3["low_freq_factor"], rope.llama3["high_freq_factor"]
    original = rope.llama3["original_max_position_embeddings"]
    factors = []
    for pair in range(spec.rope_dims // 2):
        wavelength = 2 * math.pi * rope.base ** (2 * pair / spec.rope_dims)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return factors
