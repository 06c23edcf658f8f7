"""What the families share when they read GGUF metadata: sizes, rope and the head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import BadModelMetadata, UnsupportedArchitecture
from .reader import Reader
from .spec import LayerSpec, ModelSpec

Tensors = Mapping[str, tuple[int, ...]]
MAX_LAYERS = 1024


def base_spec(keys: Reader, metadata: Mapping[str, Any], tensors: Tensors, family: str) -> ModelSpec:
    """A plain pre-norm decoder with grouped attention and "half" rope, as the keys and the presence
    of tensors describe it. Every layer has rope base 10000 and no scaling: the family fills in
    ``rope_base``, ``rope_scale`` and whatever sets it apart.

    A layer without KV heads comes out as a convolution; families without them refuse it.
    """
    n_layers = keys.integer("block_count", high=MAX_LAYERS)
    dim = keys.integer("embedding_length")
    n_heads = keys.uniform("attention.head_count", n_layers)
    kv_heads = keys.per_layer("attention.head_count_kv", n_layers, default=n_heads, low=0)
    if "attention.key_length" in keys:
        head_dim = keys.integer("attention.key_length")
    elif dim % n_heads == 0:
        head_dim = dim // n_heads
    else:
        raise BadModelMetadata(
            f"{keys.key('attention.key_length')} is missing and {keys.key('embedding_length')} = {dim} "
            f"is no multiple of {keys.key('attention.head_count')} = {n_heads}"
        )
    keys.expect("attention.value_length", head_dim)
    keys.expect("rope.dimension_count", head_dim)
    keys.expect("attention.causal", True)
    keys.expect("expert_count", 0)
    keys.expect("expert_used_count", 0)
    return ModelSpec(
        family=family,
        name=str(metadata.get("general.name", "")),
        dim=dim,
        n_heads=n_heads,
        head_dim=head_dim,
        ffn_dim=keys.uniform("feed_forward_length", n_layers),
        vocab_size=_vocab_size(keys, metadata, tensors),
        context_length=keys.integer("context_length"),
        norm_eps=keys.positive("attention.layer_norm_rms_epsilon"),
        layers=tuple(LayerSpec(kind="attention" if n else "conv", n_kv_heads=n) for n in kv_heads),
        rope_dims=head_dim,
        rope_style="half",
        attn_scale=1.0 / math.sqrt(head_dim),
        tied_head="output.weight" not in tensors,
    )


def rope_scale(keys: Reader) -> float:
    """The factor on positions: 1, or 1/factor with linear scaling. Other kinds are refused."""
    kind = keys.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise UnsupportedArchitecture(
            f"{keys.key('rope.scaling.type')} = {kind!r} is not implemented; only 'none' and 'linear' are"
        )
    name = keys.pick("rope.scaling.factor", "rope.scale_linear")
    # 0 is how a file says that the factor is not set.
    factor = keys.number(name, 1.0) or 1.0
    if factor < 0:
        raise BadModelMetadata(f"{keys.key(name)}: expected a factor above zero, found {factor}")
    if kind == "none" and factor != 1.0:
        raise BadModelMetadata(
            f"{keys.key(name)} = {factor} contradicts {keys.key('rope.scaling.type')} = 'none'"
        )
    keys.expect("rope.scaling.attn_factor", 1.0)
    keys.expect("rope.scaling.finetuned", False)
    # Only the scaling types refused above read it.
    keys.no_effect("rope.scaling.original_context_length")
    return 1.0 / factor


def all_attention(keys: Reader, spec: ModelSpec) -> None:
    """Refuses layers without KV heads in a family where every layer is attention."""
    bare = [i for i, layer in enumerate(spec.layers) if layer.kind != "attention"]
    if bare:
        raise UnsupportedArchitecture(
            f"{keys.key('attention.head_count_kv')} is 0 in layer {bare[0]}; "
            f"layers without attention are not implemented for {spec.family}"
        )


def _vocab_size(keys: Reader, metadata: Mapping[str, Any], tensors: Tensors) -> int:
    """Rows of the embedding; what the keys say about the vocabulary must agree."""
    shape = tensors.get("token_embd.weight")
    if shape is None or len(shape) != 2:
        found = "no such tensor" if shape is None else f"shape {shape}"
        raise BadModelMetadata(f"token_embd.weight: expected a matrix [vocabulary, embedding], found {found}")
    rows = shape[0]
    declared = keys.integer("vocab_size", rows)
    if declared != rows:
        raise BadModelMetadata(
            f"{keys.key('vocab_size')}: expected {rows}, the rows of token_embd.weight, found {declared}"
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Sequence) and not isinstance(tokens, str) and len(tokens) != rows:
        raise BadModelMetadata(
            f"tokenizer.ggml.tokens: expected {rows} tokens, the rows of token_embd.weight, "
            f"found {len(tokens)}"
        )
    return rows
