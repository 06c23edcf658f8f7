"""The runtime on the native engine with real weights: what a session promises must hold there too."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from conftest import real_model

import edgert
from edgert.errors import SessionFileError
from edgert.model import Model

TEXT = (
    "The lighthouse keeper wrote in his log every evening. On the third of March the sea was calm, and a "
    "single ship passed to the north with all its lamps lit. He counted the seconds between the flashes. "
)
OPTIONS: dict[str, Any] = {"max_tokens": 16, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 3}


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma-3-270m"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    with edgert.load(real_model(request.param), engine="native", threads=2) as loaded:
        yield loaded


def test_any_number_of_threads_gives_the_same_tokens(model: Model) -> None:
    expected = model.generate(TEXT, **OPTIONS)
    with edgert.load(model.path, engine="native", threads=1) as one:
        assert one.generate(TEXT, **OPTIONS).tokens == expected.tokens
    assert model.generate(TEXT, **OPTIONS).tokens == expected.tokens


def test_q8_is_near_f16(model: Model) -> None:
    """KL of the next token's distribution over 900 tokens, past Gemma's window: on prose 2e-3, which is what
    int8 activations cost too."""
    tokens = model.encode(TEXT * 20)[:900]
    with edgert.load(model.path, engine="native", threads=2, kv="q8") as small:
        sessions = [loaded.engine.session(len(tokens)) for loaded in (model, small)]
        kl = 0.0
        for at in range(0, len(tokens), 100):
            rows = []
            for session in sessions:
                scored = session.score(tokens[at : at + 100])
                scored -= scored.max(-1, keepdims=True)
                rows.append(scored - np.log(np.exp(scored).sum(-1, keepdims=True)))
            kl += float((np.exp(rows[0]) * (rows[0] - rows[1])).sum())
        assert 0 < kl / len(tokens) < 5e-3
        assert small.identity() == {**model.identity(), "kv": "q8"}


def test_a_session_gives_what_a_fresh_start_gives(model: Model) -> None:
    with model.session() as s:
        first = s.generate(TEXT, **OPTIONS)
        more = [*model.encode(TEXT), *first.tokens, *model.encode(TEXT)[1:]]
        second = s.generate(more, **OPTIONS)
        assert second.stats.reused_tokens >= len(model.encode(TEXT))
        assert second.tokens == model.generate(more, **OPTIONS).tokens
        assert s.generate(TEXT, **OPTIONS).tokens == first.tokens


def test_going_back_beyond_a_sliding_window(model: Model) -> None:
    """Gemma's local layers keep 512 positions: a prompt that branches off earlier starts anew."""
    with model.session() as s:
        s.generate(TEXT * 20, max_tokens=2)
        assert len(s.tokens) > 700
        assert s.generate(TEXT * 2, **OPTIONS).tokens == model.generate(TEXT * 2, **OPTIONS).tokens


def test_a_saved_session_goes_on(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "session"
    with model.session() as s:
        s.generate(TEXT, max_tokens=4)
        tokens = s.tokens
        s.save(path)
        expected = s.generate([*tokens, 65], **OPTIONS)
    with model.session() as s:
        s.restore(path)
        reply = s.generate([*tokens, 65], **OPTIONS)
        assert reply.tokens == expected.tokens and reply.stats.reused_tokens == len(tokens)
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 4
        path.write_bytes(damaged)
        before = s.tokens
        with pytest.raises(SessionFileError, match="checksum"):
            s.restore(path)
        assert s.tokens == before


@pytest.mark.parametrize("delay", [0.002, 0.05, 0.3])
def test_ctrl_c_leaves_the_session_usable(model: Model, delay: float) -> None:
    expected = model.generate(TEXT, **OPTIONS).tokens

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with model.session() as s:
            signal.setitimer(signal.ITIMER_REAL, delay)
            began = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                s.generate(TEXT * 15, max_tokens=4000)
            assert time.monotonic() - began < delay + 5
            assert s.generate(TEXT, **OPTIONS).tokens == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_two_sessions_in_two_threads(model: Model) -> None:
    prompts = [TEXT, "A recipe for bread: take"]
    expected = [model.generate(p, **OPTIONS).tokens for p in prompts]
    found: dict[int, list[Any]] = {0: [], 1: []}

    def work(i: int) -> None:
        with model.session() as s:
            for _ in range(3):
                found[i].append(s.generate(prompts[i], **OPTIONS).tokens)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [expected[i]] * 3 for i in (0, 1)}


def test_stats_of_a_real_reply(model: Model) -> None:
    stats = model.generate(TEXT, max_tokens=4).stats
    assert stats.prompt_tokens == len(model.encode(TEXT)) and stats.generated_tokens == 4
    size = Path(model.path).stat().st_size
    assert stats.bytes_per_token is not None and 0.8 * size < stats.bytes_per_token < 1.1 * size
    assert stats.peak_memory > stats.bytes_per_token
    assert 0 < stats.generation_tps < 1e5


def test_chat(model: Model) -> None:
    messages = [{"role": "user", "content": "What is 2 plus 2?"}]
    if not model.tokenizer.has_chat_template:
        with pytest.raises(edgert.EdgertError, match="no chat template"):
            model.chat(messages)
        return
    reply = model.chat(messages, max_tokens=200)
    assert reply.finish_reason == "stop" and "4" in reply.text
    assert reply.tokens[-1] in model.tokenizer.eos_ids and "<|im_end|>" not in reply.text
