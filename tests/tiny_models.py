"""Small random models of every family, as transformers models and as the GGUF files converted from
their safetensors checkpoints.

``tiny("gemma3")`` or ``tiny("llama", "Q4_0")`` gives a :class:`Tiny`; files live in one temporary
directory until the process ends. The weights in ``Tiny.model`` are exactly those of the GGUF file
(quantised ones dequantised), so whatever differs between the two is computation.

Sizes straddle SIMD widths on purpose: odd vocabularies, FFN sizes that are multiples of 32 but not of
64 (or, where every tensor of a model stays float, of nothing), head sizes from 16 to 64.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from edgert.models import FAMILIES, ModelSpec, load_hf_spec
from edgert.models.llama import rope_factors
from safetensors.numpy import load_file
from safetensors.torch import save_file
from tiny_blocks import SUPER_BLOCKS, random_blocks
from tiny_tokenizer import add_tokenizer

Quant = gguf.GGMLQuantizationType
_CONTEXT = 256
# Matrices this small only lose by threads, and much when other tests run beside.
torch.set_num_threads(1)
_DIRECTORY = tempfile.TemporaryDirectory(prefix="edgert-tiny-")


@dataclass(frozen=True)
class Tiny:
    name: str
    quant: str
    path: Path  # the GGUF file
    config: dict[str, Any]  # config.json of the checkpoint
    model: Any  # the transformers model in float32
    spec: ModelSpec  # from config.json

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """What transformers computes after each token, [len(tokens), vocab], float32."""
        return _logits(self.name, self.quant, tuple(tokens))


def prompt(tiny: Tiny, length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, tiny.spec.vocab_size, length).tolist()


def _sizes(vocab: int, dim: int, ffn: int, layers: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": _CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **more,
    }


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Small, so that all three branches of the scaling are met by 16 pairs.
    "original_max_position_embeddings": 64,
}

# name -> transformers config class, its model class, arguments.
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        _sizes(301, 96, 224, 3, 6, 2, tie_word_embeddings=True, rope_parameters={"rope_theta": 10000.0}),
    ),
    "llama3": (
        "LlamaConfig",
        "LlamaForCausalLM",
        _sizes(330, 160, 352, 2, 5, 5, tie_word_embeddings=False, rope_parameters=_LLAMA3),
    ),
    "llama-linear": (
        "LlamaConfig",
        "LlamaForCausalLM",
        _sizes(
            300,
            64,
            150,
            2,
            4,
            4,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_theta": 20000.0, "rope_type": "linear", "factor": 2.5},
        ),
    ),
    # Every row a multiple of 256 long, for the types with super-blocks.
    "llama-256": ("LlamaConfig", "LlamaForCausalLM", _sizes(303, 256, 512, 2, 8, 2)),
    "mistral": (
        "MistralConfig",
        "MistralForCausalLM",
        _sizes(333, 160, 288, 2, 5, 1, head_dim=48, sliding_window=None),
    ),
    "mistral-window": (
        "MistralConfig",
        "MistralForCausalLM",
        _sizes(333, 96, 160, 2, 6, 3, sliding_window=13),
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _sizes(310, 64, 160, 3, 4, 2, tie_word_embeddings=True)),
    "qwen3": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        _sizes(317, 96, 224, 3, 6, 3, head_dim=64, rope_parameters={"rope_theta": 1000000.0}),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        # Seven layers: five sliding, one global, one sliding.
        _sizes(
            299,
            96,
            160,
            7,
            4,
            1,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=11,
            rope_parameters={
                "full_attention": {"rope_theta": 1000000.0, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            },
        ),
    ),
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        _sizes(
            320,
            64,
            240,
            5,
            2,
            1,
            conv_L_cache=3,
            block_multiple_of=32,
            layer_types=["conv", "conv", "full_attention", "conv", "full_attention"],
        ),
    ),
}
NAMES = tuple(CONFIGS)


@cache
def tiny(name: str, quant: str = "F32") -> Tiny:
    """``quant`` is a GGUF type for every matrix whose rows are long enough, or "mixed": super-block
    types from layer to layer, as quantisers mix them."""
    config_class, model_class, arguments = CONFIGS[name]
    torch.manual_seed(sum(name.encode()))
    config = getattr(transformers, config_class)(**arguments)
    config._attn_implementation = "eager"
    model = getattr(transformers, model_class)(config).to(torch.float32).eval()
    _randomise(model)
    checkpoint = Path(_DIRECTORY.name) / name
    _save(model, checkpoint)
    path = Path(_DIRECTORY.name) / f"{name}-{quant}.gguf"
    convert(checkpoint, path, quant)
    spec = load_hf_spec(json.loads((checkpoint / "config.json").read_text()))
    model.load_state_dict(read_back(path, spec), strict=False)
    return Tiny(name, quant, path, json.loads((checkpoint / "config.json").read_text()), model, spec)


@cache
def _logits(name: str, quant: str, tokens: tuple[int, ...]) -> np.ndarray:
    with torch.no_grad():
        return tiny(name, quant).model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def _save(model: Any, checkpoint: Path) -> None:
    """The checkpoint a Hugging Face repository would hold; a tied head is not stored."""
    checkpoint.mkdir(exist_ok=True)
    model.config.to_json_file(checkpoint / "config.json")
    state = {name: t.contiguous() for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, checkpoint / "model.safetensors")


def _randomise(model: Any) -> None:
    """Weights that make every part matter: norms away from 1, biases away from 0, matrices that keep
    the size of what they multiply."""
    shift = 0.0 if model.config.model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and name.endswith("bias"):
                p.normal_(0.0, 0.5)
            elif p.ndim == 1:
                p.normal_(shift, 0.3)
            elif "embed" in name:
                p.normal_(0.0, 0.3)
            else:
                p.normal_(0.0, p[0].numel() ** -0.5 * 1.5)


def convert(checkpoint: Path, path: Path, quant: str) -> None:
    """A checkpoint directory to a GGUF file, with the keys and the changes of weights that llama.cpp's
    converter is documented to make: rope permutation of llama's Q and K, Gemma's norms plus one."""
    config = json.loads((checkpoint / "config.json").read_text())
    spec = load_hf_spec(config)
    weights = load_file(checkpoint / "model.safetensors")
    writer = gguf.GGUFWriter(path, spec.family)
    _add_keys(writer, config, spec)
    add_tokenizer(writer, spec.vocab_size)
    rng = np.random.default_rng(7)
    for i, (name, hf_name) in enumerate(FAMILIES[spec.family].hf_tensor_names(spec).items()):
        data = _to_gguf(spec, name, weights[hf_name].astype(np.float32))
        kind = _tensor_type(name, data, quant, i)
        if kind in SUPER_BLOCKS:
            packed = random_blocks(kind, data.shape, rng)
        else:
            packed = gguf.quants.quantize(np.ascontiguousarray(data), kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    if spec.rope_factors:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors(config), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_keys(w: gguf.GGUFWriter, config: dict[str, Any], spec: ModelSpec) -> None:
    w.add_type("model")
    w.add_name(f"tiny {config['model_type']}")
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(spec.ffn_dim)
    w.add_head_count(config["num_attention_heads"])
    kv = config["num_key_value_heads"]
    if spec.family == "lfm2":
        w.add_head_count_kv([0 if t == "conv" else kv for t in config["layer_types"]])
        w.add_shortconv_l_cache(config["conv_L_cache"])
    else:
        w.add_head_count_kv(kv)
    if config.get("head_dim"):
        w.add_key_length(config["head_dim"])
        w.add_value_length(config["head_dim"])
    w.add_layer_norm_rms_eps(config["norm_eps" if spec.family == "lfm2" else "rms_norm_eps"])
    w.add_vocab_size(config["vocab_size"])
    if spec.family == "llama":
        w.add_rope_dimension_count(spec.head_dim)
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    w.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(rope["factor"])
    if spec.family == "gemma3" or (config["model_type"] == "mistral" and config["sliding_window"]):
        w.add_sliding_window(config["sliding_window"])


def _permutation(n_heads: int, head_dim: int) -> np.ndarray:
    """Row r of the GGUF matrix is row permutation[r] of the checkpoint's: pair i of a head, there
    (i, i + head_dim/2), comes to (2i, 2i + 1)."""
    rows = np.arange(n_heads * head_dim).reshape(n_heads, 2, head_dim // 2)
    return rows.swapaxes(1, 2).reshape(-1)


def _rows(spec: ModelSpec, name: str) -> np.ndarray | None:
    if spec.family == "llama" and ".attn_q." in name:
        return _permutation(spec.n_heads, spec.head_dim)
    if spec.family == "llama" and ".attn_k." in name:
        return _permutation(spec.layers[0].n_kv_heads, spec.head_dim)
    return None


def _to_gguf(spec: ModelSpec, name: str, data: np.ndarray) -> np.ndarray:
    rows = _rows(spec, name)
    if rows is not None:
        return data[rows]
    if spec.family == "gemma3" and name.endswith("norm.weight"):
        return data + np.float32(1)
    if name.endswith("shortconv.conv.weight"):
        return data[:, 0, :]
    return data


def _from_gguf(spec: ModelSpec, name: str, data: np.ndarray) -> np.ndarray:
    rows = _rows(spec, name)
    if rows is not None:
        out = np.empty_like(data)
        out[rows] = data
        return out
    if spec.family == "gemma3" and name.endswith("norm.weight"):
        return data - np.float32(1)
    if name.endswith("shortconv.conv.weight"):
        return data[:, None, :]
    return data


def read_back(path: Path, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """The weights of a converted file, dequantised, under their names in the checkpoint."""
    names = FAMILIES[spec.family].hf_tensor_names(spec)
    out = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name in names:
            data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            data = _from_gguf(spec, tensor.name, data.astype(np.float32))
            out[names[tensor.name]] = torch.from_numpy(np.ascontiguousarray(data))
    if spec.tied_head:
        out["lm_head.weight"] = out["model.embed_tokens.weight"]
    return out


def _tensor_type(name: str, data: np.ndarray, quant: str, index: int) -> Quant:
    """The type of a tensor; vectors and convolutions stay F32, rows that no block fits become F16."""
    if data.ndim == 1 or "shortconv.conv" in name:
        return Quant.F32
    kinds = tuple(SUPER_BLOCKS)
    kind = kinds[index % len(kinds)] if quant == "mixed" else Quant[quant]
    return Quant.F16 if data.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def kv_types(name: str) -> list[str]:
    """Those that can hold the heads of a model."""
    return ["f16"] if tiny(name).spec.head_dim % 32 else ["f16", "q8"]
