"""The engine on ONNX Runtime: the native engine's tokens, and the promises of the protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_directories import exported
from onnx_runs import worst
from tiny_models import prompt, tiny

import edgert
from edgert.engines import onnx_caches
from edgert.engines.onnx import OnnxEngine, OnnxSession
from edgert.errors import EngineError, SessionFileError
from edgert.onnx_directory import OnnxDirectory

FAMILIES = ["llama", "qwen2", "qwen3", "gemma3", "lfm2", "mistral-window"]
CONTEXT = 200
BOUND = 2e-5  # of the largest logit: the order of float32 sums


def engine(name: str, quant: str = "f32", recipe: str = "") -> OnnxEngine:
    return OnnxEngine(OnnxDirectory.open(exported(name, quant, recipe)), threads=1)


def load(name: str, quant: str = "f32", recipe: str = "", **more: Any) -> edgert.Model:
    return edgert.load(exported(name, quant, recipe), threads=1, **more)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str, small: None) -> None:
    """Prompts in pieces, single steps, scores of all tokens; past the window many times over."""
    tokens = prompt(tiny(name), 100)
    expected = tiny(name).logits(tokens)
    session = engine(name).session(CONTEXT)
    assert worst(session.prefill(tokens[:30]), expected[29]) < BOUND
    assert worst(np.stack([session.step(t).copy() for t in tokens[30:60]]), expected[30:60]) < BOUND
    assert worst(session.score(tokens[60:]), expected[60:]) < BOUND
    assert session.length == 100


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_the_native_engine(name: str) -> None:
    """Greedy, and drawn with penalties and a seed."""
    native = edgert.load(tiny(name).path, threads=1, head="dense")
    model = load(name)
    text = prompt(tiny(name), 20)
    for options in ({}, {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5}):
        ours = model.generate(text, max_tokens=60, **options)
        assert ours.tokens == native.generate(text, max_tokens=60, **options).tokens
    logprobs = model.generate(text, max_tokens=5, logprobs=2).logprobs
    expected = native.generate(text, max_tokens=5, logprobs=2).logprobs
    assert logprobs and expected
    assert np.allclose([p for p, _ in logprobs], [p for p, _ in expected], atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
def test_a_shared_prefix_is_not_computed_again(name: str) -> None:
    model = load(name)
    text = prompt(tiny(name), 30)
    with model.session() as session:
        first = session.generate(text, max_tokens=20)
        longer = [*text, *first.tokens, 7, 8, 9]
        second = session.generate(longer, max_tokens=20)
        assert second.stats.reused_tokens == 49
        assert second.tokens == model.generate(longer, max_tokens=20).tokens
        other = [*text[:-3], 5, 6]
        third = session.generate(other, max_tokens=20)
        assert third.tokens == model.generate(other, max_tokens=20).tokens
        assert third.stats.reused_tokens == (0 if name == "lfm2" else 27)


def test_rewinding_goes_as_far_back_as_what_is_kept(small: None) -> None:
    """A window keeps some positions more than it needs, a convolution the states after its last passes."""
    tokens = prompt(tiny("gemma3"), 60)
    expected = tiny("gemma3").logits(tokens)
    session = engine("gemma3").session(CONTEXT)
    session.prefill(tokens[:50])
    assert session.rewind(60) == 50
    assert session.rewind(47) == 47
    assert worst(session.score(tokens[47:]), expected[47:]) < BOUND
    assert session.rewind(20) == 0 == session.length
    assert worst(session.prefill(tokens), expected[-1]) < BOUND

    tokens = prompt(tiny("lfm2"), 60)
    expected = tiny("lfm2").logits(tokens)
    session = engine("lfm2").session(CONTEXT)
    session.prefill(tokens[:20])
    assert session.rewind(19) == 16  # the end of a pass of the prompt
    for token in tokens[16:]:
        session.step(token)
    for length in (45, 40):
        assert session.rewind(length) == length
        assert worst(session.score(tokens[length : length + 5]), expected[length : length + 5]) < BOUND
    assert session.rewind(43) == 40
    for _ in range(3):
        for token in tokens[40:]:
            session.step(token)
        assert session.rewind(40) == 40
    assert session.rewind(20) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_snapshots(name: str, small: None) -> None:
    tokens = prompt(tiny(name), 50)
    expected = tiny(name).logits(tokens)
    loaded = engine(name)
    session = loaded.session(CONTEXT)
    session.prefill(tokens[:40])
    state = session.snapshot()
    other = loaded.session(60)
    other.prefill(tokens[:7][::-1])
    other.restore(state)
    assert other.length == 40 and other.snapshot() == state
    assert worst(other.score(tokens[40:]), expected[40:]) < BOUND
    assert worst(session.score(tokens[40:]), expected[40:]) < BOUND
    for bad in (b"", state[:-1], state + b"\0", b"X" + state[1:]):
        with pytest.raises(EngineError, match="snapshot"):
            loaded.session(60).restore(bad)
    with pytest.raises(EngineError, match="open a longer session"):
        loaded.session(39).restore(state)


def test_sessions_are_saved_for_their_export_alone(tmp_path: Path) -> None:
    text = prompt(tiny("gemma3"), 30)
    with load("gemma3").session() as session:
        session.generate(text, max_tokens=5)
        session.save(tmp_path / "s")
    with load("gemma3").session() as session:
        session.restore(tmp_path / "s")
        assert session.generate(text, max_tokens=5).stats.reused_tokens == 29
    with load("gemma3", "int4").session() as session, pytest.raises(SessionFileError, match="saved with"):
        session.restore(tmp_path / "s")


@pytest.mark.parametrize("recipe", ["clusters", "lowrank"])
@pytest.mark.parametrize("quant", ["f32", "int4"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "lfm2"])
def test_the_exact_head_gives_the_dense_heads_tokens(name: str, quant: str, recipe: str) -> None:
    """With a FlashHead that is wrong most of the time, so that blocks end anywhere."""
    text = prompt(tiny(name), 12)
    dense, exact = (load(name, quant, recipe, head=head) for head in ("dense", "exact"))
    agreed = drafts = 0
    for options in ({}, {"temperature": 1.2, "seed": 3}, {"repetition_penalty": 1.3, "logprobs": 1}):
        expected = dense.generate(text, max_tokens=40, **options)
        found = exact.generate(text, max_tokens=40, **options)
        assert found.tokens == expected.tokens and found.logprobs == expected.logprobs
        agreed, drafts = agreed + found.stats.agreed, drafts + found.stats.drafts
    assert drafts > 0 and (name == "gemma3" or 0 < agreed < drafts)  # that one says one word forever


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_a_flash_step_is_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is an exact block but for its drafts; biased ids and log probabilities take one more."""
    passes: list[int] = []
    run = OnnxSession._pass

    def counted(self: OnnxSession, tokens: Any, *args: Any, **more: Any) -> Any:
        passes.append(len(tokens))
        return run(self, tokens, *args, **more)

    monkeypatch.setattr(OnnxSession, "_pass", counted)
    text = prompt(tiny(name), 12)
    for head in ("flash", "dense"):
        load(name, "f32", "lowrank", head=head).generate(text, max_tokens=10)
        assert passes == [12] + 9 * [1]
        passes.clear()
    stats = load(name, "f32", "lowrank", head="exact").generate(text, max_tokens=10).stats
    assert len(passes) == 1 + stats.drafts + stats.passes
    passes.clear()
    load(name, "f32", "lowrank", head="flash").generate(text, max_tokens=10, logprobs=1)
    assert len(passes) == 1 + 2 * 9


def test_biased_and_allowed_tokens_are_scored_whatever_the_head() -> None:
    text = prompt(tiny("llama"), 12)
    dense, flash = (load("llama", "f32", "lowrank", head=head) for head in ("dense", "flash"))
    for options in ({"logit_bias": {77: 100.0}}, {"allowed": [3, 77, 200]}):
        expected = dense.generate(text, max_tokens=8, **options)
        assert flash.generate(text, max_tokens=8, **options).tokens == expected.tokens
        assert set(expected.tokens) <= {3, 77, 200}


def test_the_flash_head_scores_the_dense_heads_logits() -> None:
    session = engine("gemma3", "f32", "clusters").session(CONTEXT)
    session.prefill(prompt(tiny("gemma3"), 10))
    state = session.hidden(5)
    ids, logits = session.flash(state, [])
    dense = session.dense(state[None])[0]
    assert len(set(ids.tolist())) == len(ids)
    assert worst(logits, dense[ids]) < BOUND
    again = session.flash(state.copy(), [1, 2])
    assert {1, 2} <= set(again[0].tolist()) and worst(again[1], dense[again[0]]) < BOUND
    assert session.length == 11


@pytest.mark.parametrize("name", ["gemma3", "lfm2"])
def test_an_interrupt_loses_nothing_that_counts(
    name: str, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes after a pass and before it is noted, or while windows are moved."""
    tokens = prompt(tiny(name), 60)
    expected = tiny(name).logits(tokens)
    session = engine(name).session(CONTEXT)
    session.prefill(tokens[:40])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for moment in ("keep", "write"):
        with monkeypatch.context() as patch:
            patch.setattr(onnx_caches.States if moment == "keep" else onnx_caches.Buffer, moment, interrupted)
            try:
                for token in tokens[:20][::-1]:
                    session.step(token)
            except KeyboardInterrupt:
                pass
        kept = session.rewind(40)
        assert kept == (0 if (name, moment) == ("gemma3", "write") else 40)
        assert worst(session.score(tokens[kept:]), expected[kept:]) < BOUND
        session.rewind(0)
        session.prefill(tokens[:40])


def test_what_does_not_fit_is_refused() -> None:
    loaded = engine("llama")
    session = loaded.session(20)
    session.prefill(range(19))
    for call in (lambda: session.score([1, 2]), lambda: session.prefill([1, 2])):
        with pytest.raises(EngineError, match="load with a larger context"):
            call()
    session.step(3)
    assert session.length == 20
    for tokens, what in (([], "at least one token"), ([301], "0 to 300"), ([-1], "found -1")):
        with pytest.raises(EngineError, match=what):
            loaded.session(20).prefill(tokens)
    for context in (0, 257):
        with pytest.raises(EngineError, match="1 to 256"):
            loaded.session(context)
    loaded.close()
    with pytest.raises(EngineError, match="closed"):
        loaded.session(20)
    session.close()


def test_two_sessions_side_by_side() -> None:
    loaded = engine("lfm2")
    tokens = [prompt(tiny("lfm2"), 40, seed) for seed in (0, 1)]
    sessions = [loaded.session(CONTEXT) for _ in tokens]
    found = [[s.step(t[i]).copy() for s, t in zip(sessions, tokens, strict=True)] for i in range(40)]
    for i, text in enumerate(tokens):
        assert worst(np.stack([step[i] for step in found]), tiny("lfm2").logits(text)) < BOUND


def test_memory_is_taken_as_a_session_grows() -> None:
    loaded = engine("llama")
    session = loaded.session(256)
    assert loaded.memory()["kv"] == session.nbytes == 0
    session.prefill(range(100))
    row = 4 * 2 * 3 * 2 * 16  # float32, keys and values, layers, KV heads, head dim
    assert loaded.memory()["kv"] == session.nbytes == 100 * row
    assert loaded.memory()["weights"] == (exported("llama", "f32") / "model.onnx.data").stat().st_size
    session.close()
    assert loaded.memory()["kv"] == 0


@pytest.mark.parametrize(("quant", "value", "of_head"), [("f32", 4.0, 4.0), ("int4", 0.625, 1.125)])
def test_bytes_of_a_step(quant: str, value: float, of_head: float) -> None:
    """Every matrix once, the head's rows that the FlashHead scores and its low-rank rows."""
    spec = tiny("llama").spec
    shapes = spec.tensor_shapes()
    head = round(301 * 96 * of_head)
    body = sum(
        round(np.prod(shape) * (value if len(shape) == 2 else 4))
        for name, shape in shapes.items()
        if name != "token_embd.weight"
    )
    described = engine("llama", quant, "lowrank").describe()
    assert described["body_bytes_per_step"] == body
    assert described["weight_bytes_per_step"] == body + head
    flash = described["flash_bytes_per_step"] - body
    assert head * 5 // 301 < flash < head
    reply = load("llama", quant, "lowrank", head="flash").generate([5], max_tokens=3)
    assert reply.stats.bytes_per_token == body + flash
