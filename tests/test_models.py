"""ModelSpec from metadata: what is read, and that everything else is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edgert.models import (
    BadModelMetadata,
    LayerSpec,
    ModelSpec,
    UnsupportedArchitecture,
    check_tensors,
    load_spec,
)
from edgert.models.checks import check_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import read_gguf
from tiny_models import tiny

from edgert import _native

Metadata = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
ABSENT = object()


def described(name: str, **changes: Any) -> tuple[Metadata, Shapes]:
    """Metadata and shapes of a tiny model; ``changes`` are keys of its architecture with dots as ``__``."""
    metadata, shapes = read_gguf(tiny(name).path)
    arch = metadata["general.architecture"]
    for key, value in changes.items():
        full = f"{arch}.{key.replace('__', '.')}"
        metadata.pop(full, None)
        if value is not ABSENT:
            metadata[full] = value
    return metadata, shapes


def load(path: Path) -> ModelSpec:
    file = _native.GgufFile(str(path))
    return load_spec(file.metadata, {t.name: t.shape for t in file.tensors})


def test_smollm2(real_model: Callable[[str], Path]) -> None:
    spec = load(real_model("smollm2-135m"))
    assert (spec.family, spec.n_layers, spec.dim, spec.n_heads, spec.head_dim) == ("llama", 30, 576, 9, 64)
    assert (spec.ffn_dim, spec.vocab_size, spec.context_length) == (1536, 49152, 8192)
    assert set(spec.layers) == {LayerSpec("attention", 3, 0, 100000.0, 1.0)}
    assert (spec.rope_style, spec.rope_dims, spec.attn_scale, spec.tied_head) == (
        "interleaved",
        64,
        0.125,
        True,
    )
    assert spec.norm_eps == pytest.approx(1e-5, rel=1e-6)


def test_gemma3_270m(real_model: Callable[[str], Path]) -> None:
    spec = load(real_model("gemma-3-270m"))
    assert (spec.family, spec.n_layers, spec.dim, spec.n_heads, spec.head_dim) == ("gemma3", 18, 640, 4, 256)
    assert [i for i, layer in enumerate(spec.layers) if layer.window == 0] == [5, 11, 17]
    assert {(x.window, x.rope_base) for x in spec.layers} == {(512, 10000.0), (0, 1000000.0)}
    assert spec.attn_scale == 1 / 16
    assert spec.embed_scale == math.sqrt(640)
    assert spec.qk_norm
    assert spec.post_norms
    assert spec.tied_head


def test_as_dict_is_plain() -> None:
    plain = tiny("lfm2").spec.as_dict()
    assert plain["layers"][2] == {
        "kind": "attention",
        "n_kv_heads": 1,
        "window": 0,
        "rope_base": 1000000.0,
        "rope_scale": 1.0,
    }
    assert plain["layers"][0]["kind"] == "conv"
    assert (
        ModelSpec(**{**plain, "layers": tuple(LayerSpec(**x) for x in plain["layers"])}) == tiny("lfm2").spec
    )


# Every key that has an implemented and an unimplemented value, and some that nobody implements.
REFUSED = [
    ("llama", "rope__scaling__type", "yarn"),
    ("llama", "rope__scaling__type", "longrope"),
    ("llama", "rope__scaling__finetuned", True),
    ("llama", "rope__scaling__attn_factor", 1.2),
    ("llama", "rope__scaling__yarn_ext_factor", 1.0),
    ("llama", "rope__dimension_count", 8),
    ("llama", "rope__dimension_sections", [1, 2, 3, 0]),
    ("llama", "attention__value_length", 32),
    ("llama", "attention__causal", False),
    ("llama", "attention__clamp_kqv", 8.0),
    ("llama", "attention__scale", 0.5),
    ("llama", "attention__layer_norm_epsilon", 1e-5),
    ("llama", "attention__max_alibi_bias", 8.0),
    ("llama", "attention__head_count", [6, 6, 4]),
    ("llama", "feed_forward_length", [224, 224, 96]),
    ("llama", "expert_count", 8),
    ("llama", "expert_used_count", 2),
    ("llama", "use_parallel_residual", True),
    ("llama", "logit_scale", 2.0),
    ("llama", "residual_scale", 0.5),
    ("llama", "embedding_scale", 12.0),
    ("llama", "tensor_data_layout", "another"),
    ("llama", "a_key_of_next_year", 1),
    ("qwen2", "attention__sliding_window", 64),
    ("qwen2", "attn_logit_softcapping", 30.0),
    ("qwen3", "attention__sliding_window", 64),
    ("qwen3", "pooling_type", 1),
    ("gemma3", "final_logit_softcapping", 30.0),
    ("gemma3", "attn_logit_softcapping", 50.0),
    ("gemma3", "vision__block_count", 27),
    ("lfm2", "attention__sliding_window", 64),
    ("lfm2", "attention__causal", False),
]


@pytest.mark.parametrize(("name", "key", "value"), REFUSED)
def test_unimplemented_key_is_refused_by_name(name: str, key: str, value: Any) -> None:
    metadata, shapes = described(name, **{key: value})
    with pytest.raises(UnsupportedArchitecture, match=rf"{name}\.{key.replace('__', '.')}"):
        load_spec(metadata, shapes)


ACCEPTED = [
    ("llama", "rope__scaling__type", "none"),
    ("llama", "rope__scaling__factor", 0.0),
    ("llama", "rope__scaling__finetuned", False),
    ("llama", "rope__scaling__original_context_length", 4096),
    ("llama", "attention__causal", True),
    ("llama", "attention__value_length", 16),
    ("llama", "attention__sliding_window", 0),
    ("llama", "attention__head_count", [6, 6, 6]),
    ("llama", "expert_count", 0),
    ("llama", "vocab_size", ABSENT),
    ("llama", "rope__dimension_count", ABSENT),
    ("llama", "rope__freq_base", ABSENT),
    ("llama", "tensor_data_layout", "Meta AI original pth"),
    ("qwen2", "attention__sliding_window", 0),
    ("gemma3", "final_logit_softcapping", 0.0),
    ("gemma3", "attention__sliding_window_pattern", 6),
    ("gemma3", "attention__sliding_window_pattern", [True] * 5 + [False, True]),
    ("gemma3", "rope__freq_base_swa", 10000.0),
    ("gemma3", "rope__local__freq_base", 10000.0),
]


@pytest.mark.parametrize(("name", "key", "value"), ACCEPTED)
def test_key_that_says_what_is_so_already(name: str, key: str, value: Any) -> None:
    expected = load_spec(*described(name))
    assert load_spec(*described(name, **{key: value})) == expected


BAD = [
    ("llama", "embedding_length", ABSENT),
    ("llama", "block_count", ABSENT),
    ("llama", "block_count", 0),
    ("llama", "block_count", 10**6),
    ("llama", "context_length", ABSENT),
    ("llama", "context_length", 2**40),
    ("llama", "feed_forward_length", ABSENT),
    ("llama", "attention__head_count", ABSENT),
    ("llama", "attention__head_count", 0),
    ("llama", "attention__head_count", 5.0),
    ("llama", "attention__head_count_kv", [2, 2]),
    ("llama", "attention__head_count_kv", [2, 2, -1]),
    ("llama", "attention__head_count_kv", "2"),
    ("llama", "attention__key_length", True),
    ("llama", "attention__layer_norm_rms_epsilon", ABSENT),
    ("llama", "attention__layer_norm_rms_epsilon", 0.0),
    ("llama", "attention__layer_norm_rms_epsilon", float("nan")),
    ("llama", "rope__freq_base", -1.0),
    ("llama", "rope__freq_base", float("inf")),
    ("llama", "rope__freq_base", 10**400),
    ("llama", "rope__scaling__factor", -2.0),
    ("llama", "rope__scaling__type", 1),
    ("llama", "vocab_size", 300),
    ("qwen2", "rope__freq_base", ABSENT),
    ("gemma3", "rope__freq_base", ABSENT),
    ("gemma3", "attention__sliding_window_pattern", 0),
    ("gemma3", "attention__sliding_window_pattern", [True] * 6),
    ("gemma3", "attention__sliding_window_pattern", [1] * 7),
    ("lfm2", "shortconv__l_cache", ABSENT),
]


@pytest.mark.parametrize(("name", "key", "value"), BAD)
def test_bad_value_is_refused_by_name(name: str, key: str, value: Any) -> None:
    metadata, shapes = described(name, **{key: value})
    with pytest.raises(BadModelMetadata, match=rf"{name}\.{key.replace('__', '.')}"):
        load_spec(metadata, shapes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention__head_count_kv": 4}, "layer 0: expected a number of KV heads that divides the 6"),
        ({"shortconv__l_cache": 3}, "llama.shortconv.l_cache = 3"),
        (
            {"attention__head_count": 7, "attention__key_length": ABSENT},
            "96 is no multiple of llama.attention.head_count = 7",
        ),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, "contradicts"),
        ({"rope__scale_linear": 2.0, "rope__scaling__factor": 4.0}, "say the same thing"),
        ({"attention__head_count_kv": [2, 0, 2]}, "is 0 in layer 1"),
        (
            {"attention__key_length": 15, "attention__value_length": 15, "rope__dimension_count": 15},
            "rope_dims: expected an even number",
        ),
    ],
)
def test_contradictions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((BadModelMetadata, UnsupportedArchitecture), match=message):
        load_spec(*described("llama", **changes))


def test_architecture_and_kind_of_file() -> None:
    metadata, shapes = described("llama")
    with pytest.raises(UnsupportedArchitecture, match=r"'mamba' is not implemented; .* gemma3, lfm2, llama"):
        load_spec({**metadata, "general.architecture": "mamba"}, shapes)
    with pytest.raises(UnsupportedArchitecture, match="found 'adapter'"):
        load_spec({**metadata, "general.type": "adapter"}, shapes)
    with pytest.raises(BadModelMetadata, match=r"general\.architecture"):
        load_spec({}, shapes)
    with pytest.raises(BadModelMetadata, match=r"expected 301 tokens, .* found 3"):
        load_spec({**metadata, "tokenizer.ggml.tokens": ["a", "b", "c"]}, shapes)


def test_windows() -> None:
    """Of a llama file, a window is for all layers; Gemma's file without one has global layers alone."""
    spec = load_spec(*described("llama", attention__sliding_window=100))
    assert {layer.window for layer in spec.layers} == {100}
    spec = load_spec(*described("gemma3", attention__sliding_window=ABSENT))
    assert {(x.window, x.rope_base, x.rope_scale) for x in spec.layers} == {(0, 1000000.0, 1 / 8)}
    spec = load_spec(*described("gemma3", attention__sliding_window_pattern=2))
    assert [layer.window for layer in spec.layers] == [11, 0, 11, 0, 11, 0, 11]
    # Linear scaling is for the global layers alone.
    assert [layer.rope_scale for layer in spec.layers] == [1, 1 / 8, 1, 1 / 8, 1, 1 / 8, 1]


def test_attention_scale_of_gemma_27b() -> None:
    spec = replace(tiny("gemma3").spec, dim=5376, n_heads=32, head_dim=128, rope_dims=128)
    metadata = {
        "general.architecture": "gemma3",
        "gemma3.context_length": 131072,
        "gemma3.embedding_length": 5376,
        "gemma3.block_count": 62,
        "gemma3.feed_forward_length": spec.ffn_dim,
        "gemma3.attention.head_count": 32,
        "gemma3.attention.head_count_kv": 1,
        "gemma3.attention.key_length": 128,
        "gemma3.attention.value_length": 128,
        "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
        "gemma3.attention.sliding_window": 1024,
        "gemma3.rope.freq_base": 1000000.0,
    }
    shapes = replace(spec, layers=(spec.layers[0],) * 62).tensor_shapes()
    assert load_spec(metadata, shapes).attn_scale == pytest.approx(168**-0.5)


def test_tensors_must_be_the_ones_described() -> None:
    metadata, shapes = described("llama")
    spec = load_spec(metadata, shapes)
    missing = {name: shape for name, shape in shapes.items() if name != "blk.1.ffn_up.weight"}
    with pytest.raises(
        BadModelMetadata, match=r"blk\.1\.ffn_up\.weight: expected \[224, 96\], found no such"
    ):
        check_tensors(spec, missing)
    with pytest.raises(BadModelMetadata, match=r"attn_k\.weight: expected \[32, 96\], found \[96, 32\]"):
        check_tensors(spec, {**shapes, "blk.0.attn_k.weight": (96, 32)})
    with pytest.raises(UnsupportedArchitecture, match=r"blk\.0\.attn_output\.bias \[96\]"):
        check_tensors(spec, {**shapes, "blk.0.attn_output.bias": (96,)})
    with pytest.raises(BadModelMetadata, match="and 24 more"):
        check_tensors(spec, {})
    # Presence decides about head, biases and rope factors, and then all of them must be there.
    untied = load_spec(metadata, {**shapes, "output.weight": (301, 96)})
    assert not untied.tied_head
    assert spec.tied_head
    with pytest.raises(BadModelMetadata, match=r"blk\.0\.attn_k\.bias: expected \[32\], found no such"):
        load_spec(metadata, {**shapes, "blk.0.attn_q.bias": (96,)})
    with pytest.raises(BadModelMetadata, match=r"rope_freqs\.weight: expected \[8\], found \[16\]"):
        load_spec(metadata, {**shapes, "rope_freqs.weight": (16,)})
    with pytest.raises(UnsupportedArchitecture, match=r"rope_freqs\.weight \[8\]"):
        metadata, shapes = described("qwen2")
        load_spec(metadata, {**shapes, "rope_freqs.weight": (8,)})
    with pytest.raises(BadModelMetadata, match=r"token_embd\.weight: expected a matrix"):
        load_spec(metadata, {})


def test_absurd_dimensions() -> None:
    spec = tiny("llama").spec
    for change in ({"dim": 0}, {"vocab_size": 2**40}, {"head_dim": 2**30}, {"layers": ()}, {"norm_eps": 1.5}):
        with pytest.raises(BadModelMetadata):
            check_spec(replace(spec, **change))
    with pytest.raises(BadModelMetadata, match="conv_kernel"):
        check_spec(replace(tiny("lfm2").spec, conv_kernel=1))


_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**65), 2**65),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-3, 400) | st.booleans() | st.floats() | st.text(max_size=2), max_size=8),
)


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "gemma3", "lfm2"])
def test_any_metadata_loads_or_is_refused(name: str) -> None:
    """Whatever a key holds: a spec that passes its own checks, or one of the two errors."""
    metadata, shapes = described(name)
    arch = metadata["general.architecture"]
    keys = [key for key in metadata if key.startswith((f"{arch}.", "general."))]
    keys += [f"{arch}.rope.scaling.factor", f"{arch}.attention.sliding_window_pattern"]

    @settings(max_examples=150, deadline=None)
    @given(st.dictionaries(st.sampled_from(keys), _values, min_size=1, max_size=3))
    def check(changes: Metadata) -> None:
        try:
            spec = load_spec({**metadata, **changes}, shapes)
        except (BadModelMetadata, UnsupportedArchitecture):
            return
        assert spec.tensor_shapes() == shapes

    check()
