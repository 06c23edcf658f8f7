"""The decoder in torch against the numpy oracle on every family, and on real weights the native engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from edgert.export.calibration_text import TEXTS
from edgert.export.torch_decoder import TorchDecoder, allowed
from reference import Reference
from tiny_models import NAMES, prompt, tiny

from edgert import _native
from edgert.engines import open_engine
from edgert.tokenizer import Tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_oracles(name: str) -> None:
    model = tiny(name)
    decoder = TorchDecoder(model.path, torch.float64)
    ids = torch.tensor([prompt(model, 50), prompt(model, 50, seed=1)])
    found = decoder.logits(decoder.states(ids)).numpy()
    for row, tokens in zip(found, ids.tolist(), strict=True):
        expected = Reference(model.path).logits(tokens)
        assert np.abs(row - expected).max() < 1e-9 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
def test_attention_can_be_replaced(name: str) -> None:
    """Attention written out gives what torch's own gives; attention to oneself alone does not."""
    decoder = TorchDecoder(tiny(name).path)
    ids = torch.tensor([prompt(tiny(name), 40)])
    seen: list[int] = []

    def plain(
        i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor
    ) -> torch.Tensor:
        seen.append(i)
        group = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(group, 1).mT * decoder.spec.attn_scale
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        return weights @ v.repeat_interleave(group, 1)

    states = decoder.states(ids)
    assert torch.allclose(decoder.states(ids, plain), states, atol=1e-4)
    assert seen == [i for i, layer in enumerate(decoder.spec.layers) if layer.kind == "attention"]
    alone = decoder.states(ids, lambda i, q, k, v, a: plain(i, q, k, v, torch.eye(40, dtype=torch.bool)))
    assert torch.allclose(alone[:, 0], states[:, 0], atol=1e-4)
    assert not torch.allclose(alone[:, 1:], states[:, 1:], atol=1e-2)


def test_gradients_reach_what_attention_adds() -> None:
    decoder = TorchDecoder(tiny("qwen3").path)
    ids = torch.tensor([prompt(tiny("qwen3"), 20)])
    alpha = torch.ones((), requires_grad=True)
    states = decoder.states(ids, lambda i, q, k, v, a: q * alpha)
    decoder.logits(states).sum().backward()
    assert alpha.grad is not None
    assert alpha.grad.abs() > 0
    assert not decoder.embedding.requires_grad


def test_what_a_position_may_see() -> None:
    assert allowed(3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert allowed(3, 2).tolist() == [[True, False, False], [True, True, False], [False, True, True]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_real_weights_give_what_the_native_engine_gives(name: str, real_model: Callable[[str], Path]) -> None:
    """The native engine rounds activations to int8; what that is worth was seen to be .0013."""
    path = real_model(name)
    engine = open_engine(path, "native", threads=2)
    tokens = Tokenizer.from_gguf(_native.GgufFile(str(path)).metadata).encode(
        (TEXTS / "prose.txt").read_text()
    )[:700]
    native = torch.from_numpy(engine.session(700).score(tokens).copy())
    engine.close()
    decoder = TorchDecoder(path)
    with torch.no_grad():
        ours = decoder.logits(decoder.states(torch.tensor([tokens])))[0]
    kl = (ours.log_softmax(-1).exp() * (ours.log_softmax(-1) - native.log_softmax(-1))).sum(-1)
    assert kl.mean() < 0.003
    assert (ours.argmax(-1) == native.argmax(-1)).float().mean() > 0.95
