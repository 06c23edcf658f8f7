"""The llamacpp engine on real weights: what a session promises, whatever the backend."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import real_model

from edgert.engines import llamacpp
from edgert.errors import EngineError, ModelFileError

pytest.importorskip("llama_cpp")

TOKENS = [504, 2365, 6354, 16438, 26003, 690, 260, 23790, 2767, 30, 1, 4093, 198, 1780]


@pytest.fixture(scope="module")
def engine() -> Iterator[llamacpp.LlamaCppEngine]:
    engine = llamacpp.open(real_model("smollm2-135m"), threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def gemma() -> Iterator[llamacpp.LlamaCppEngine]:
    engine = llamacpp.open(real_model("gemma-3-270m"), threads=1)
    yield engine
    engine.close()


def test_it_says_what_it_is(engine: llamacpp.LlamaCppEngine) -> None:
    about = engine.describe()
    assert (about["engine"], about["dense"], about["threads"]) == ("llamacpp", True, 1)
    assert engine.vocab_size == 49152 and engine.context_length == 8192
    assert engine.memory()["weights"] > 90e6


def test_prefill_then_steps_give_what_score_gives(engine: llamacpp.LlamaCppEngine) -> None:
    scored = engine.session(64).score(TOKENS)
    assert scored.dtype == np.float32 and scored.shape == (len(TOKENS), engine.vocab_size)
    session = engine.session(64)
    rows = [session.prefill(TOKENS[:6])] + [session.step(t) for t in TOKENS[6:]]
    assert session.length == len(TOKENS)
    # llama.cpp's batched kernels round differently from its one-token kernels.
    np.testing.assert_allclose(np.array(rows), scored[5:], atol=0.3)
    assert (np.array(rows).argmax(1) == scored[5:].argmax(1)).mean() > 0.8


def test_keys_and_values_in_q8(engine: llamacpp.LlamaCppEngine) -> None:
    half = engine.session(64)
    expected, before = half.score(TOKENS), half.snapshot()
    small = llamacpp.open(real_model("smollm2-135m"), threads=1, kv="q8")
    assert small.describe()["kv"] == "q8" and small.describe()["flash_attn"] == "on"
    session = small.session(64)
    found = session.score(TOKENS)
    assert session.state_bytes() < 0.6 * half.state_bytes()
    assert 0 < np.sqrt(((found - expected) ** 2).mean()) < 0.15 * expected.std()
    with pytest.raises(EngineError, match=r"refuses the snapshot: .*type"):
        session.restore(before)
    small.close()


def test_prefill_longer_than_a_batch(engine: llamacpp.LlamaCppEngine) -> None:
    parts, session = engine.session(64), engine.session(64)
    parts.prefill(TOKENS[:5]), parts.prefill(TOKENS[5:10])
    expected = parts.prefill(TOKENS[10:])
    session._batch = 5  # in place of llama.cpp's 2,048
    np.testing.assert_array_equal(session.prefill(TOKENS), expected)
    assert session.length == len(TOKENS)


def test_rewind_forgets(engine: llamacpp.LlamaCppEngine) -> None:
    session = engine.session(64)
    session.prefill(TOKENS[:8])
    expected = session.step(TOKENS[8])
    session.prefill([5, 6, 7])
    assert session.rewind(8) == 8 == session.length
    np.testing.assert_array_equal(session.step(TOKENS[8]), expected)
    assert session.rewind(0) == 0
    np.testing.assert_array_equal(session.prefill(TOKENS[:8]), engine.session(64).prefill(TOKENS[:8]))


@pytest.mark.slow
def test_rewind_past_an_overwritten_window_evaluates_again(gemma: llamacpp.LlamaCppEngine) -> None:
    tokens = [2] + [563 + i % 977 for i in range(1299)]
    session, fresh = gemma.session(1400), gemma.session(1400)
    session.prefill(tokens)  # the window is 512: what position 600 needs is gone
    assert session.rewind(600) == 600
    fresh.prefill(tokens[:600])
    np.testing.assert_allclose(session.step(tokens[600]), fresh.step(tokens[600]), atol=1e-3)


def test_snapshot_round_trip(engine: llamacpp.LlamaCppEngine) -> None:
    session = engine.session(64)
    session.prefill(TOKENS)
    state = session.snapshot()
    expected = session.step(7)
    other = engine.session(32)
    other.restore(state)
    assert other.length == len(TOKENS)
    np.testing.assert_array_equal(other.step(7), expected)


def test_snapshots_that_do_not_fit_are_refused(
    engine: llamacpp.LlamaCppEngine, gemma: llamacpp.LlamaCppEngine
) -> None:
    session = engine.session(64)
    session.prefill(TOKENS)
    state = session.snapshot()
    for bad, message in ((b"", "other bytes"), (state[:60], "cut off"), (state[:-100], "refuses")):
        with pytest.raises(EngineError, match=message):
            engine.session(64).restore(bad)
    with pytest.raises(EngineError, match="another model"):
        gemma.session(64).restore(state)
    with pytest.raises(EngineError, match="longer session"):
        engine.session(8).restore(state)


def test_what_cannot_be_evaluated_is_refused_and_changes_nothing(engine: llamacpp.LlamaCppEngine) -> None:
    session = engine.session(16)
    for tokens, message in (([], "at least one"), ([49152], "49151"), ([-1], "-1"), ([1] * 17, "do not fit")):
        with pytest.raises(EngineError, match=message):
            session.prefill(tokens)
    with pytest.raises(EngineError, match="rewind"):
        session.rewind(1)
    with pytest.raises(EngineError, match="8192"):
        engine.session(8193)
    assert session.length == 0


def test_a_closed_engine_says_so() -> None:
    engine = llamacpp.open(real_model("smollm2-135m"), threads=1, context=32)
    session = engine.session(32)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        session.step(1)
    with pytest.raises(EngineError, match="closed"):
        engine.session(16)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="found none"):
        llamacpp.open(tmp_path / "nothing.gguf")
    text = tmp_path / "text.gguf"
    text.write_text("not a model")
    with pytest.raises(EngineError, match="magic"):
        llamacpp.open(text)


def test_without_llama_cpp_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(llamacpp, "_api", None)
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(EngineError, match=r"pip install 'edgert\[llamacpp\]'"):
        llamacpp.open("model.gguf")


def test_it_is_quiet() -> None:
    program = (
        "import sys; from edgert.engines import llamacpp\n"
        "e = llamacpp.open(sys.argv[1], threads=1); e.session(32).prefill([1, 2, 3]); e.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(real_model("smollm2-135m"))], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
