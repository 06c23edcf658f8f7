"""ModelSpec from Hugging Face configs, in the style of transformers 4 and of 5."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from edgert.models import BadModelMetadata, UnsupportedArchitecture, load_hf_spec
from edgert.models.llama import rope_factors
from tiny_models import tiny

_LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


def test_llama3_rope_factors_are_those_of_transformers() -> None:
    spec = load_hf_spec(_LLAMA_32_1B)
    assert spec.rope_factors
    assert spec.layers[0].rope_base == 500000.0
    assert spec.tied_head
    config = transformers.LlamaConfig(**{k: v for k, v in _LLAMA_32_1B.items() if k != "model_type"})
    frequencies, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = [500000.0 ** (-2 * i / 64) for i in range(32)]
    expected = [p / f for p, f in zip(plain, frequencies.tolist(), strict=True)]
    factors = rope_factors(_LLAMA_32_1B)
    assert factors == pytest.approx(expected, rel=1e-5)
    assert factors[0] == 1.0
    assert factors[-1] == 32.0
    with pytest.raises(UnsupportedArchitecture, match="llama3"):
        rope_factors({**_LLAMA_32_1B, "rope_scaling": None})


@pytest.mark.parametrize(
    "name", ["llama", "llama3", "llama-linear", "mistral", "mistral-window", "qwen2", "qwen3"]
)
def test_older_style_of_rope_keys(name: str) -> None:
    """rope_theta and rope_scaling (transformers 4) say the same as rope_parameters (5)."""
    config = dict(tiny(name).config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type", "default")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    assert load_hf_spec(config) == tiny(name).spec


def test_older_style_of_gemma_keys() -> None:
    config = dict(tiny("gemma3").config)
    for key in ("rope_parameters", "layer_types"):
        del config[key]
    config |= {
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 6,
    }
    assert load_hf_spec(config) == tiny("gemma3").spec
    # What published configs leave out is what the class of transformers has.
    bare = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
    }
    full = transformers.Gemma3TextConfig(**{k: v for k, v in bare.items() if k != "model_type"}).to_dict()
    assert load_hf_spec(bare) == load_hf_spec(full)


def test_older_style_of_lfm2_keys() -> None:
    """The keys of the first published LFM2 configs."""
    config = {
        "model_type": "lfm2",
        "architectures": ["Lfm2ForCausalLM"],
        "block_auto_adjust_ff_dim": True,
        "block_dim": 1024,
        "block_ff_dim": 6656,
        "block_ffn_dim_multiplier": 1.0,
        "block_mlp_init_scale": 1.0,
        "block_multiple_of": 256,
        "block_norm_eps": 1e-05,
        "block_out_init_scale": 1.0,
        "block_use_swiglu": True,
        "block_use_xavier_init": True,
        "conv_L_cache": 3,
        "conv_bias": False,
        "conv_dim": 1024,
        "conv_dim_out": 1024,
        "conv_use_xavier_init": True,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        "hidden_size": 1024,
        "max_position_embeddings": 128000,
        "norm_eps": 1e-05,
        "num_attention_heads": 16,
        "num_heads": 16,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rope_theta": 1000000.0,
        "use_pos_enc": True,
        "vocab_size": 65536,
    }
    spec = load_hf_spec(config)
    assert spec.ffn_dim == 4608
    assert [i for i, x in enumerate(spec.layers) if x.kind == "attention"] == [2, 5, 8, 10, 12, 14]
    keys = {
        k: v for k, v in config.items() if k not in ("model_type", "block_dim", "conv_dim", "conv_dim_out")
    }
    assert load_hf_spec(transformers.Lfm2Config(**keys).to_dict()) == spec


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type = 'dynamic'"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ("llama", {"rope_parameters": {"mrope_section": [1]}}, "rope_parameters.mrope_section"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing"),
        ("llama", {"num_local_experts": 8}, "num_local_experts = 8"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"model_type": "phi3"}, "model_type 'phi3'"),
        ("llama", {"head_dim": None, "num_attention_heads": 7}, "no multiple of num_attention_heads = 7"),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types.0. = 'chunked_attention'"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        (
            "qwen3",
            {"rope_parameters": {**_LLAMA_32_1B["rope_scaling"]}},
            "'llama3' is not implemented for qwen3",
        ),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"sliding_window": None}, "sliding_window: expected a window"),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types: expected an array of 7"),
        ("lfm2", {"conv_bias": True}, "conv_bias = True"),
        ("lfm2", {"block_dim": 128}, "block_dim = 128"),
        ("lfm2", {"layer_types": None, "full_attn_idxs": [9]}, "full_attn_idxs: expected layers below 5"),
    ],
)
def test_unimplemented_config_is_refused_by_name(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((BadModelMetadata, UnsupportedArchitecture), match=message):
        load_hf_spec({**tiny(name).config, **changes})


def test_qwen_windows_are_for_the_layers_named() -> None:
    config = {
        **tiny("qwen2").config,
        "use_sliding_window": True,
        "sliding_window": 32,
        "max_window_layers": 1,
    }
    del config["layer_types"]
    assert [layer.window for layer in load_hf_spec(config).layers] == [0, 32, 32]
    assert [x.window for x in load_hf_spec({**config, "use_sliding_window": False}).layers] == [0, 0, 0]
