"""What the families share when they read a Hugging Face ``config.json`` (as a dict)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import BadModelMetadata, UnsupportedArchitecture
from .gguf_keys import MAX_LAYERS
from .reader import Reader
from .spec import LayerSpec, ModelSpec

# Keys about files, training, generation or the tokenizer: none changes what a forward pass computes.
_NO_EFFECT = frozenset(
    """
    add_cross_attention architectures attention_dropout auto_map bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_range label2id length_penalty max_length min_length model_max_length name_or_path
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16
    use_cache
    """.split()  # noqa: SIM905 - sixty names, one to a line, would hide the rest of the file
)


@dataclass(frozen=True)
class Rope:
    """``llama3`` holds the four numbers of Llama 3's frequency scaling, or is empty."""

    base: float
    scale: float
    llama3: Mapping[str, float]


class HfConfig(Reader):
    """Reader of a config; refuses other model types than the family's own."""

    def __init__(self, config: Mapping[str, Any], *model_types: str) -> None:
        super().__init__({k: v for k, v in config.items() if not k.startswith("_")})
        found = config.get("model_type")
        if found not in model_types:
            raise UnsupportedArchitecture(
                f"model_type: expected {' or '.join(map(repr, model_types))}, found {found!r}"
            )
        self.expect("is_encoder_decoder", False)
        self.expect("is_decoder", False, True)  # a decoder-only model is one under either value
        self.expect("pruned_heads", {})
        self.no_effect("model_type")

    def close(self) -> None:
        self.finish(_NO_EFFECT)


def base_spec(config: HfConfig, family: str, *, tied: bool, norm_eps: str = "rms_norm_eps") -> ModelSpec:
    """As the GGUF twin of this function: every layer is full attention with rope base 10000."""
    dim = config.integer("hidden_size")
    n_layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    n_heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", n_heads)
    if "head_dim" not in config and dim % n_heads:
        raise BadModelMetadata(
            f"head_dim is missing and hidden_size = {dim} is no multiple of num_attention_heads = {n_heads}"
        )
    head_dim = config.integer("head_dim", dim // n_heads)
    return ModelSpec(
        family=family,
        name="",
        dim=dim,
        n_heads=n_heads,
        head_dim=head_dim,
        ffn_dim=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        context_length=config.integer("max_position_embeddings"),
        norm_eps=config.positive(norm_eps),
        layers=(LayerSpec(n_kv_heads=kv_heads),) * n_layers,
        rope_dims=head_dim,
        rope_style="half",
        attn_scale=1.0 / math.sqrt(head_dim),
        tied_head=config.flag("tie_word_embeddings", tied),
    )


def layer_types(config: HfConfig, n_layers: int, implemented: tuple[str, ...]) -> list[str] | None:
    """The config's ``layer_types``, or None when it has none."""
    if "layer_types" not in config:
        return None
    types = config.array("layer_types", str, n_layers)
    for i, kind in enumerate(types):
        if kind not in implemented:
            raise UnsupportedArchitecture(
                f"layer_types[{i}] = {kind!r} is not implemented; only {' and '.join(implemented)} are"
            )
    return types


def windowed_layers(config: HfConfig, spec: ModelSpec, rope: Rope) -> tuple[LayerSpec, ...]:
    """Layers of the Qwen families: with ``use_sliding_window``, those that ``layer_types`` names, or
    those from ``max_window_layers`` on, see only ``sliding_window`` positions."""
    no_llama3(rope, spec.family)
    on = config.flag("use_sliding_window", False)
    first = config.integer("max_window_layers", 28, low=0)
    # Kept in configs of models that do not use it.
    window = config.integer("sliding_window", 4096)
    types = layer_types(config, spec.n_layers, ("sliding_attention", "full_attention"))
    sliding = (
        [t == "sliding_attention" for t in types] if types else [i >= first for i in range(spec.n_layers)]
    )
    return tuple(
        replace(layer, rope_base=rope.base, rope_scale=rope.scale, window=window if on and slides else 0)
        for layer, slides in zip(spec.layers, sliding, strict=True)
    )


def read_rope(config: HfConfig, default_base: float) -> Rope:
    """Rope of a model with one kind of it: ``rope_parameters`` (transformers 5) or ``rope_theta`` with
    ``rope_scaling`` (before)."""
    base = config.positive("rope_theta", default_base)
    name = config.pick("rope_parameters", "rope_scaling")
    return rope_from(config.mapping(name), name, base)


def rope_from(parameters: Mapping[str, Any], name: str, default_base: float) -> Rope:
    """One table of rope parameters, called ``name`` in messages."""
    table = Reader({f"{name}.{key}": value for key, value in parameters.items()}, f"{name}.")
    base = table.positive("rope_theta", default_base)
    kind = table.text(table.pick("rope_type", "type"), "default")
    table.expect("partial_rotary_factor", 1.0)
    scale, llama3 = 1.0, {}
    if kind == "linear":
        scale = 1.0 / table.positive("factor")
    elif kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        llama3 = {key: table.positive(key) for key in names}
    elif kind != "default":
        raise UnsupportedArchitecture(
            f"{name}.rope_type = {kind!r} is not implemented; only 'default', 'linear' and 'llama3' are"
        )
    # Only the kinds refused above read it.
    table.no_effect("original_max_position_embeddings")
    table.finish()
    return Rope(base, scale, llama3)


def no_llama3(rope: Rope, family: str) -> None:
    if rope.llama3:
        raise UnsupportedArchitecture(f"rope_type = 'llama3' is not implemented for {family}")


def tensor_names(spec: ModelSpec, renamed: Mapping[str, str] | None = None) -> dict[str, str]:
    """GGUF name -> Hugging Face name of every stored tensor of ``spec``.

    ``renamed`` maps the part of a layer's GGUF name after ``blk.N.`` to the part of its Hugging Face
    name after ``model.layers.N.`` where a family has names of its own. ``rope_freqs.weight`` is not
    there: a checkpoint has it as numbers in the config.
    """
    parts = {**_LAYER_NAMES, **(renamed or {})}
    names = {"token_embd": "model.embed_tokens", spec.output_norm.removesuffix(".weight"): "model.norm"}
    names["output"] = "lm_head"
    out = {}
    for gguf_name in spec.tensor_shapes():
        stem, _, kind = gguf_name.rpartition(".")
        if stem == "rope_freqs":
            continue
        if stem.startswith("blk."):
            _, layer, part = stem.split(".", 2)
            out[gguf_name] = f"model.layers.{layer}.{parts[part]}.{kind}"
        else:
            out[gguf_name] = f"{names[stem]}.{kind}"
    return out


_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
