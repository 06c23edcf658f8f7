"""The oracle, the converter and the specs against transformers; the converted files against llama.cpp."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from edgert.models import ModelSpec
from reference import Reference, read_gguf
from tiny_models import NAMES, prompt, read_back, tiny

# transformers computes in float32, angles included: position * frequency loses 1e-7 of up to 60
# radians, and some tens of matrix products of length 64-512 lose about as much. Seen: up to 3e-6.
FLOAT32 = 2e-5
LENGTH = 60  # several times the longest window of the tiny models


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference of two logits, relative to the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quant", ["F32", "Q8_0", "Q4_0"])
def test_reference_agrees_with_transformers(name: str, quant: str) -> None:
    model = tiny(name, quant)
    tokens = prompt(model, LENGTH)
    assert difference(Reference(model.path).logits(tokens), model.logits(tokens)) < FLOAT32


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q4_1", "Q5_0", "Q5_1", "mixed"])
def test_reference_agrees_with_transformers_on_other_types(quant: str) -> None:
    model = tiny("llama-256", quant)
    tokens = prompt(model, LENGTH)
    assert difference(Reference(model.path).logits(tokens), model.logits(tokens)) < FLOAT32


CHANGES = {
    "window": (
        lambda s: _layers(s, lambda x: replace(x, window=x.window and x.window + 1)),
        ("gemma3", "mistral-window"),
    ),
    "rope base": (lambda s: _layers(s, lambda x: replace(x, rope_base=x.rope_base * 1.1)), NAMES),
    "rope scale": (lambda s: _layers(s, lambda x: replace(x, rope_scale=1.0)), ("gemma3", "llama-linear")),
    "rope factors": (lambda s: replace(s, rope_factors=False), ("llama3",)),
    "rope style": (
        lambda s: replace(s, rope_style="half" if s.rope_style == "interleaved" else "interleaved"),
        NAMES,
    ),
    "q/k norm": (lambda s: replace(s, qk_norm=False), ("gemma3", "qwen3", "lfm2")),
    "post norms": (lambda s: replace(s, post_norms=False), ("gemma3",)),
    "embedding scale": (lambda s: replace(s, embed_scale=1.0), ("gemma3",)),
    "activation": (
        lambda s: replace(s, activation="gelu_tanh" if s.activation == "silu" else "silu"),
        NAMES,
    ),
    "attention scale": (lambda s: replace(s, attn_scale=s.attn_scale * 1.1), NAMES),
    "norm epsilon": (lambda s: replace(s, norm_eps=s.norm_eps + 1e-2), NAMES),
    "head": (lambda s: replace(s, tied_head=True), ("llama3",)),
}


def _layers(spec: ModelSpec, change) -> ModelSpec:
    return replace(spec, layers=tuple(change(layer) for layer in spec.layers))


@pytest.mark.parametrize(
    ("what", "name"), [(what, name) for what, (_, names) in CHANGES.items() for name in names]
)
def test_every_part_of_a_spec_matters(what: str, name: str) -> None:
    """The comparison with transformers would see each field of the spec being wrong."""
    model = tiny(name)
    tokens = prompt(model, LENGTH)
    changed = Reference(model.path, CHANGES[what][0](Reference(model.path).spec))
    assert difference(changed.logits(tokens), model.logits(tokens)) > 5 * FLOAT32


@pytest.mark.parametrize("name", NAMES)
def test_file_and_checkpoint_describe_the_same_model(name: str) -> None:
    model = tiny(name)
    found = Reference(model.path).spec
    assert found.name == f"tiny {model.config['model_type']}"
    # GGUF stores numbers of a model as float32.
    assert found.norm_eps == pytest.approx(model.spec.norm_eps, rel=1e-6)
    same = replace(model.spec, name=found.name, rope_style=found.rope_style, norm_eps=found.norm_eps)
    assert same == found
    assert found.rope_style == ("interleaved" if found.family == "llama" else "half")


@pytest.mark.parametrize("name", NAMES)
def test_conversion_keeps_the_weights(name: str) -> None:
    """F32 files hold the checkpoint's weights; one is added to Gemma's norms and taken off again, which
    rounds."""
    model = tiny(name)
    fresh = {n: p.clone() for n, p in model.model.state_dict().items()}
    for hf_name, weight in read_back(model.path, model.spec).items():
        torch.testing.assert_close(weight, fresh[hf_name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mistral-window"])
def test_llama_cpp_reads_the_files_alike(name: str) -> None:
    """The files mean to llama.cpp what they mean here. It rounds keys, values and the table of its SiLU
    to float16 (2^-11), which a few layers amplify; seen: up to 2.4e-3. It ignores the window of a
    llama file, so that one is left out."""
    pytest.importorskip("llama_cpp")
    from edgert.engines import llamacpp

    model = tiny(name)
    tokens = prompt(model, LENGTH)
    engine = llamacpp.open(model.path, threads=1, context=256)
    session = engine.session(256)
    found = session.score(tokens)
    session.close()
    engine.close()
    assert difference(found, model.logits(tokens)) < 1e-2


def test_tokenizer_of_a_tiny_model_is_complete() -> None:
    metadata, shapes = read_gguf(tiny("llama").path)
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert len(metadata["tokenizer.ggml.tokens"]) == shapes["token_embd.weight"][0]
    assert metadata["tokenizer.ggml.token_type"][:4] == [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL]
    known = set(metadata["tokenizer.ggml.tokens"])
    merges = [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]]
    assert merges
    assert all(left + right in known for left, right in merges)
