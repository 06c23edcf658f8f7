"""Exact attention: whatever sparse steps draft, the tokens are those of full attention, and so is what stays
in the cache."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from fake_sparse import SparseEngine, SparseSession, sparse_model
from fakes import EOS
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import EngineError
from edgert.heads import LONGEST
from edgert.model import Model
from edgert.session import Session

HEADS = ["dense", "flash", "exact"]
PROMPT = [*b"Once upon"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 4},
    {"temperature": 1.0, "seed": 5, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"logit_bias": {65: 3.0, 66: -math.inf}, "temperature": 0.5, "seed": 1},
    {"logprobs": 2, "temperature": 0.7, "seed": 9},
    {"logprobs": 0},
    {"allowed": [*b"abc", EOS]},
    {"allowed": lambda tokens: [97 + len(tokens) % 5, 120], "temperature": 1.0, "seed": 2},
    {"stop": ["a", "z"], "temperature": 2.0, "seed": 3},
]


def full(head: str) -> Model:
    """What the exact mode must agree with; the exact head's own tokens are the dense head's."""
    return sparse_model("full", "dense" if head == "exact" else head)[0]


def check_cache(session: Session, engine: SparseEngine) -> None:
    """The cache holds the session's tokens, every one as full attention computes it."""
    inner = engine.sessions[-1]
    assert session.tokens == tuple(inner.cached) and inner.length == len(session.tokens)


@settings(max_examples=150, deadline=None)
@given(
    head=st.sampled_from(HEADS),
    options=st.sampled_from(OPTIONS),
    wrong=st.one_of(st.sets(st.integers(0, 90)), st.sampled_from([range(0), range(200)])),
    end=st.none() | st.integers(1, 50),
    count=st.integers(1, 60),
    window=st.sampled_from([0, 40]),
)
def test_tokens_and_cache_are_those_of_full_attention(
    head: str, options: dict[str, Any], wrong: set[int], end: int | None, count: int, window: int
) -> None:
    model, engine = sparse_model("exact", head, window=window)
    reference = full(head)
    engine.wrong = wrong.__contains__
    if end is not None:
        for e in (engine, reference.engine):
            e.script[len(PROMPT) + end] = EOS
    wanted = reference.generate(PROMPT, max_tokens=count, **options)
    with model.session() as session:
        reply = session.generate(PROMPT, max_tokens=count, **options)
        assert (reply.tokens, reply.text, reply.logprobs) == (wanted.tokens, wanted.text, wanted.logprobs)
        assert (reply.finish_reason, reply.stop_string) == (wanted.finish_reason, wanted.stop_string)
        check_cache(session, engine)
        longer = [*PROMPT, *reply.tokens[:20], 1]
        again = session.generate(longer, max_tokens=10, **options)
        assert again.tokens == reference.generate(longer, max_tokens=10, **options).tokens
        if len(reply.tokens) < 20:
            assert again.stats.reused_tokens >= len(PROMPT) + len(reply.tokens) - 1


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("at", range(1, 60, 3))
@pytest.mark.parametrize("error", [KeyboardInterrupt, EngineError])
def test_an_interrupt_anywhere_leaves_no_draft_behind(
    head: str, at: int, error: type[BaseException], tmp_path: Path
) -> None:
    model, engine = sparse_model("exact", head)
    engine.wrong = lambda length: length % 7 == 0
    model.path = str(tmp_path / "weights")
    Path(model.path).write_bytes(b"weights")
    wanted = full(head).generate(PROMPT, max_tokens=40)
    left = at

    def before() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise error("broken")

    engine.before_token = before
    with model.session() as session:
        with pytest.raises(error):
            session.generate(PROMPT, max_tokens=40)
        spoilt = [token for token in engine.sessions[-1].cached if token < 0]
        assert session.tokens == tuple(engine.sessions[-1].cached[: len(session.tokens)])
        assert len(session.tokens) == engine.sessions[-1].length - len(spoilt)
        # A saved session holds nothing that sparse steps computed, nor does one that goes on.
        session.save(tmp_path / "saved")
        check_cache(session, engine)
        with model.session() as other:
            other.restore(tmp_path / "saved")
            assert other.generate([*PROMPT, *wanted.tokens[:30]], max_tokens=10).tokens == wanted.tokens[30:]
        assert session.generate(PROMPT, max_tokens=40).tokens == wanted.tokens


def test_a_request_after_an_interrupt_takes_the_drafts_back() -> None:
    """Without a save in between, and with a prompt that goes on with the very tokens that were drafted."""
    model, engine = sparse_model("exact", "dense")
    wanted = full("dense").generate(PROMPT, max_tokens=40)
    for at in range(len(PROMPT) + 1, 40):
        calls = iter(range(1, 999))

        def before(calls: Any = calls, at: int = at) -> None:
            if next(calls) == at:
                raise KeyboardInterrupt

        with model.session() as session:
            engine.before_token = before
            with pytest.raises(KeyboardInterrupt):
                session.generate(PROMPT, max_tokens=40)
            reply = session.generate([*PROMPT, *wanted.tokens[:30]], max_tokens=10)
            assert reply.tokens == wanted.tokens[30:]
            check_cache(session, engine)


@pytest.mark.parametrize("head", HEADS)
def test_cancelled_while_drafting(head: str) -> None:
    wanted = full(head).generate(PROMPT, max_tokens=40)
    for at in range(1, 50, 4):
        model, engine = sparse_model("exact", head)
        with model.session() as session:
            calls = iter(range(1, 999))

            def before(calls: Any = calls, at: int = at, session: Session = session) -> None:
                if next(calls) == len(PROMPT) + at:
                    session.cancel()

            engine.before_token = before
            reply = session.generate(PROMPT, max_tokens=40)
            assert reply.finish_reason == "cancelled"
            assert reply.tokens == wanted.tokens[: len(reply.tokens)] and len(reply.tokens) < 40
            # No draft after it: what was drafted is confirmed, and that is all.
            assert next(calls) - 1 <= len(PROMPT) + at + engine.passes[-1]
            check_cache(session, engine)
            assert session.generate(PROMPT, max_tokens=40).tokens == wanted.tokens


def test_the_context_can_be_filled_to_its_last_position() -> None:
    wanted = sparse_model("full", "dense", context=40)[0].generate(PROMPT)
    for missing in range(3):
        model, engine = sparse_model("exact", "dense", context=40)
        engine.wrong = lambda length, missing=missing: length % (missing + 2) == 0
        reply = model.generate(PROMPT)
        assert reply.tokens == wanted.tokens and reply.finish_reason == "length"


def test_nothing_comes_after_the_end_of_a_reply() -> None:
    model, engine = sparse_model("exact", "dense")
    engine.says(PROMPT, "twenty tokens of text")
    with model.session() as session:
        reply = session.generate(PROMPT)
        assert reply.tokens == (*b"twenty tokens of text", EOS)
        assert session.tokens == (*PROMPT, *reply.tokens[:-1])
        check_cache(session, engine)
    assert reply.stats.drafts == reply.stats.agreed


def test_blocks_grow_while_drafts_are_right_and_shrink_when_not() -> None:
    model, engine = sparse_model("exact", "dense")
    model.generate(PROMPT, max_tokens=101)
    # 4 + 8 + 16 + ... = 100 tokens after the first.
    assert engine.passes == [4, 8, *[LONGEST] * 5, 8]
    engine.passes.clear()
    engine.wrong = lambda length: True
    reply = model.generate(PROMPT, max_tokens=6)
    assert engine.passes == [4, 4, 3, 2, 1]
    assert (reply.stats.drafts, reply.stats.agreed, reply.stats.passes) == (3 + 3 + 2 + 1, 0, 5)


def test_no_pass_is_longer_than_the_cache_can_go_back() -> None:
    model, engine = sparse_model("exact", "dense", window=LONGEST)
    engine.wrong = lambda length: random.Random(length).random() < 0.1
    assert (
        model.generate(PROMPT, max_tokens=200).tokens == full("dense").generate(PROMPT, max_tokens=200).tokens
    )
    assert max(engine.passes) == LONGEST


def test_stats_say_what_was_drafted_and_read() -> None:
    for head, draft, confirm in (("dense", 1000, 1000), ("exact", 650, 1000), ("flash", 650, 600)):
        model, engine = sparse_model("exact", head)
        engine.wrong = lambda length: length % 5 == 0
        stats = model.generate(PROMPT, max_tokens=61).stats
        assert stats.passes == len(engine.passes) and 0 < stats.agreed < stats.drafts
        # A pass gives what it agreed to and, unless that was a whole block, one more.
        assert stats.agreed + stats.passes == 60
        read = stats.drafts * draft + stats.passes * confirm + (60 * 50 if head == "flash" else 0)
        assert stats.bytes_per_token == round(read / 60)
    plain = sparse_model("full", "dense")[0].generate(PROMPT, max_tokens=9).stats
    assert (plain.drafts, plain.agreed, plain.passes, plain.bytes_per_token) == (0, 0, 0, 1000)


def test_the_exact_head_over_full_attention_reports_the_same() -> None:
    model, _ = sparse_model("full", "exact")
    stats = model.generate(PROMPT, max_tokens=61).stats
    assert stats.agreed + stats.passes == 60 and stats.agreed < stats.drafts
    states = 60 + stats.drafts - stats.agreed
    read = states * 600 + stats.drafts * 50 + stats.passes * 400
    assert stats.bytes_per_token == round(read / 60)


def test_a_cache_with_a_draft_in_it_is_noticed_by_this_test() -> None:
    """The stand-in: what a sparse step leaves changes what a full pass over it gives."""
    _, engine = sparse_model("exact", "dense")
    clean, spoilt = SparseSession(engine, 20), SparseSession(engine, 20)
    clean.prefill([1, 2])
    spoilt.prefill([1])
    spoilt.step(2)
    assert spoilt.tokens == clean.cached != spoilt.cached
    assert (clean.states([3]) != spoilt.states([3])).any()
