"""Sparse attention: prompts are read in full to the bit, steps read what the index finds worth it, and
neither threads nor rewinding nor saving changes a bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_process import edgert as command
from conftest import real_model
from edgert.models import FAMILIES
from tiny_models import kv_types, prompt, tiny

import edgert
from edgert import _native
from edgert.attention import DEFAULT_BUDGET, choose_budget
from edgert.engines import native_spec
from edgert.errors import EngineError, SessionFileError, UsageError
from edgert.tokenizer import Tokenizer

LENGTH = 700  # past two blocks of the index
BUDGET = 40


def open_model(name: str, threads: int = 2) -> _native.Model:
    made = tiny(name)
    return _native.Model(_native.GgufFile(str(made.path)), made.spec.as_dict(), threads)


def tokens_of(name: str, length: int = LENGTH) -> np.ndarray:
    return np.array(prompt(tiny(name), length), dtype=np.int32)


def steps(model: _native.Model, cache: _native.Cache, tokens: np.ndarray, **options: Any) -> np.ndarray:
    return np.array([model.forward(cache, tokens[i : i + 1], **options) for i in range(len(tokens))])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_prompts_and_full_steps_have_the_bits_of_full_attention(name: str) -> None:
    model, tokens = open_model(name), tokens_of(name)
    for kv in kv_types(name):
        full = _native.Cache(model, 1024, kv)
        sparse = _native.Cache(model, 1024, kv, BUDGET)
        for at in range(0, LENGTH - 8, 199):
            part = tokens[at : min(at + 199, LENGTH - 8)]
            assert np.array_equal(model.forward(full, part, True), model.forward(sparse, part, True))
        last = tokens[LENGTH - 8 :]
        assert np.array_equal(steps(model, full, last), steps(model, sparse, last, full=True))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_budget_for_everything_is_full_attention_but_for_rounding(name: str) -> None:
    model, tokens = open_model(name), tokens_of(name)
    for kv in kv_types(name):
        results = []
        for budget in (0, 1000):
            cache = _native.Cache(model, 1024, kv, budget)
            model.forward(cache, tokens[:-8])
            results.append(steps(model, cache, tokens[-8:]))
        assert np.allclose(*results, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_step_depends_on_the_sequence_alone(name: str) -> None:
    """Not on threads, on how the prompt was cut, on what was rewound, or on saving and loading."""
    tokens = tokens_of(name)
    for kv in kv_types(name):
        found = []
        for threads, cut in ((1, 256), (2, 100), (3, 256)):
            model = open_model(name, threads)
            cache = _native.Cache(model, 1024, kv, BUDGET)
            for at in range(0, LENGTH - 20, cut):
                model.forward(cache, tokens[at : min(at + cut, LENGTH - 20)])
            found.append(steps(model, cache, tokens[LENGTH - 20 :]))
            assert np.array_equal(found[0], found[-1])
        # Back by steps, and over the ends of blocks in another sequence.
        assert cache.rewind(LENGTH - 20) == LENGTH - 20
        state = cache.save()
        assert np.array_equal(found[0], steps(model, cache, tokens[LENGTH - 20 :]))
        other = _native.Cache(model, 1024, kv, BUDGET)
        other.load(state)
        assert np.array_equal(found[0], steps(model, other, tokens[LENGTH - 20 :]))


@pytest.mark.parametrize("length", [193, 200])
def test_the_last_piece_of_a_prompt_is_read_in_full_however_short(length: int) -> None:
    """A prompt is no step even where all but its last token is in the cache already."""
    path, ids = tiny("llama").path, prompt(tiny("llama"), length)
    replies = []
    for options in ({}, {"attention": "sparse", "budget": 1}):
        with edgert.load(path, context=256, **options) as model, model.session() as session:
            first = session.prefill(ids, lambda: False)[0]
            again, reused = session.prefill(ids, lambda: False)
            assert reused == length - 1
            scored = model.engine.session(256).score(ids[:1])
            replies.append((first, again, scored))
    for full, sparse in zip(*replies, strict=True):
        assert np.array_equal(full, sparse)


def test_blocks_that_are_written_again_get_another_index() -> None:
    model, tokens = open_model("llama"), tokens_of("llama")
    other = tokens[::-1].copy()
    results = []
    for before in (None, other):
        cache = _native.Cache(model, 1024, "f16", BUDGET)
        if before is not None:
            model.forward(cache, before)
            steps(model, cache, before[:3])
            assert cache.rewind(0) == 0
        model.forward(cache, tokens[:-5])
        results.append(steps(model, cache, tokens[-5:]))
    assert np.array_equal(*results)


def test_steps_read_the_budget_and_the_index() -> None:
    spec = tiny("llama").spec
    model = open_model("llama")
    cache, full = _native.Cache(model, 1024, "f16", BUDGET), _native.Cache(model, 1024, "f16")
    tokens = tokens_of("llama")
    model.forward(cache, tokens)
    model.forward(full, tokens)
    indexed = (LENGTH - 128) // 256 * 256
    heads = sum(layer.n_kv_heads for layer in spec.layers)
    record, index = 4 * spec.head_dim, 8 * spec.head_dim + 256 * spec.head_dim // 4
    read = LENGTH - indexed + 16 + BUDGET
    assert cache.step_bytes == heads * (record * read + index * indexed // 256)
    assert full.step_bytes == heads * record * LENGTH


def test_saved_sessions_are_of_one_kind_of_attention(tmp_path: Path) -> None:
    path = tiny("llama").path
    with edgert.load(path, context=256, attention="sparse", budget=BUDGET) as model, model.session() as s:
        s.generate(list(range(1, 200)), max_tokens=4)
        s.save(tmp_path / "session")
        tokens = s.tokens
        with model.session() as again:
            again.restore(tmp_path / "session")
            assert again.tokens == tokens
    with edgert.load(path, context=256) as model, model.session() as s, pytest.raises(SessionFileError):
        s.restore(tmp_path / "session")
    core = open_model("llama")
    sparse, full = _native.Cache(core, 512, "f16", BUDGET), _native.Cache(core, 512)
    core.forward(sparse, tokens_of("llama", 300))
    with pytest.raises(EngineError, match="kind of attention"):
        full.load(sparse.save())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "dense"}, "expected one of full, sparse, exact"),
        ({"attention": "sparse", "budget": -1}, "budget must be"),
        ({"attention": "sparse", "budget": True}, "budget must be"),
        ({"attention": "sparse", "budget": 2**21}, "budget must be"),
        ({"budget": 100}, "full attention reads every token"),
        ({"attention": "sparse", "engine": "llamacpp"}, "needs the native engine"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        edgert.load(tiny("llama").path, **options)


def test_the_default_budget() -> None:
    assert choose_budget("sparse", 0, "auto") == DEFAULT_BUDGET
    assert choose_budget("full", 0, "auto") == 0


def test_the_command_line_takes_both() -> None:
    path = str(tiny("llama").path)
    done = command("run", path, "hello", "--attention", "sparse", "--budget", "32", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    done = command("run", path, "a " * 80, "--attention", "sparse", "--max-tokens", "2", "--json")
    stats = json.loads(done.stdout)["stats"]
    assert stats["engine"]["budget"] == DEFAULT_BUDGET
    assert stats["planned_peak_memory"] > 0
    done = command("run", path, "hello", "--budget", "32")
    assert done.returncode == 2
    assert "full attention reads every token" in done.stderr
    done = command("plan", path, "--attention", "sparse", "--budget", "32")
    assert "sparse attention to 32 tokens" in done.stdout


def divergence(full: np.ndarray, other: np.ndarray) -> float:
    """Mean KL divergence of rows of logits, in nats."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(full), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_the_index_finds_what_matters_in_a_real_model() -> None:
    """At 2,500 tokens, 256 of them chosen by the index are near full attention; the 256 that are merely
    the latest of those between are not, which is what a broken index would come down to."""
    path = real_model("smollm2-135m")
    text = (Path(__file__).parent.parent / "docs" / "kernel-log.md").read_text(encoding="utf-8")
    file = _native.GgufFile(str(path))
    ids = np.array(Tokenizer.from_gguf(file.metadata).encode(text)[:2560], dtype=np.int32)
    assert len(ids) == 2560
    core = _native.Model(file, native_spec(file, file.metadata).as_dict(), 2)
    results = {}
    for budget in (0, 256):
        cache = _native.Cache(core, 4096, "f16", budget)
        core.forward(cache, ids[:2500])
        results[budget] = steps(core, cache, ids[2500:])
    recent = _native.Cache(core, 4096, "f16")
    core.forward(recent, np.concatenate([ids[:16], ids[2500 - 640 : 2500]]))
    latest = steps(core, recent, ids[2500:])
    assert divergence(results[0], results[256]) < 0.04
    assert divergence(results[0], latest) > 0.1
