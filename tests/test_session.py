"""Sessions: what is reused, what survives an interrupt, what a saved file must be."""

from __future__ import annotations

import gc
import hashlib
import os
import random
import struct
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, fake_model

from edgert import session_file
from edgert.errors import EngineError, SessionFileError, UsageError
from edgert.model import Model

OPTIONS: dict[str, Any] = {"max_tokens": 12, "temperature": 0.9, "seed": 4}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(random.Random(1).randbytes(5000))
    return path


def fresh(prompt: Any, **more: Any) -> tuple[int, ...]:
    """Tokens of a model that never saw anything else."""
    return fake_model()[0].generate(prompt, **{**OPTIONS, **more}).tokens


def test_the_common_prefix_is_computed_once() -> None:
    model, engine = fake_model()
    with model.session() as s:
        first = s.generate("abcdefgh", **OPTIONS)
        assert first.stats.reused_tokens == 0 and sum(engine.calls) == 8 + 11
        follow_up = [*b"abcdefgh", *first.tokens, *b"more"]
        engine.calls.clear()
        second = s.generate(follow_up, **OPTIONS)
        # The last token of a reply was drawn but never put into the cache.
        assert second.stats.reused_tokens == 8 + 11
        assert engine.calls[0] == 1 + 4
        assert second.tokens == fresh(follow_up)
        third = s.generate("abcdXYZ", **OPTIONS)
        assert third.stats.reused_tokens == 4 and third.tokens == fresh("abcdXYZ")
    assert engine.sessions[0].closed


def test_the_same_prompt_again_computes_its_last_token() -> None:
    model, engine = fake_model()
    s = model.session()
    first = s.generate("abcdefgh", **OPTIONS)
    engine.calls.clear()
    again = s.generate("abcdefgh", **OPTIONS)
    assert again.tokens == first.tokens
    assert again.stats.reused_tokens == 7 and engine.calls[0] == 1
    assert s.generate("abc", **OPTIONS).tokens == fresh("abc")


def test_an_engine_that_forgot_more_is_given_more() -> None:
    """A sliding window cannot be rewound past what its ring still holds."""
    model, _ = fake_model(window=5)
    s = model.session()
    s.generate("abcdefgh", **OPTIONS)
    reply = s.generate("abcdefgh", **OPTIONS)
    assert reply.stats.reused_tokens == 0 and reply.tokens == fresh("abcdefgh")


def test_tokens_are_what_the_cache_holds() -> None:
    model, engine = fake_model()
    s = model.session()
    assert s.tokens == ()
    reply = s.generate("abc", **OPTIONS)
    assert s.tokens == (*b"abc", *reply.tokens[:-1]) == tuple(engine.sessions[0].cached)


@pytest.mark.parametrize("at", [1, 3, 10, 11, 515, 600, 1001, 1004])
@pytest.mark.parametrize("error", [KeyboardInterrupt, EngineError])
def test_an_interrupt_leaves_the_session_usable(at: int, error: type[BaseException]) -> None:
    model, engine = fake_model()
    s = model.session()
    s.generate("abcdefgh", max_tokens=3)
    countdown = at

    def before() -> None:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            raise error("broken")

    engine.before_token = before
    prompt = "abcd" + "z" * 1000
    with pytest.raises(error):
        s.generate(prompt, **OPTIONS)
    assert s.tokens == tuple(engine.sessions[0].cached)
    reply = s.generate(prompt, **OPTIONS)
    assert reply.tokens == fresh(prompt)
    assert reply.stats.reused_tokens == min(4 + at - 1, 1003)  # nothing computed was lost


def test_cancelled_replies_leave_the_session_usable() -> None:
    model, _ = fake_model()
    s = model.session()
    stream = s.stream("abc", **OPTIONS)
    head = [next(stream).token for _ in range(4)]
    s.cancel()
    assert [p.finish_reason for p in stream] == ["cancelled"]
    assert stream.reply.tokens == tuple(head) == fresh("abc")[:4]
    assert s.generate("abc", **OPTIONS).tokens == fresh("abc")
    s.cancel()  # nothing runs


def test_a_new_request_ends_the_one_before() -> None:
    model, _ = fake_model()
    s = model.session()
    old = s.stream("abc", **OPTIONS)
    next(old)
    assert s.generate("xyz", **OPTIONS).tokens == fresh("xyz")
    assert [p.finish_reason for p in old] == ["cancelled"]
    assert len(old.reply.tokens) == 1


def test_sessions_in_two_threads() -> None:
    model, _ = fake_model()
    expected = {prompt: fresh(prompt) for prompt in ("one", "two", "three", "four")}
    wrong: list[str] = []

    def work(prompts: list[str]) -> None:
        with model.session() as s:
            for prompt in prompts * 5:
                if s.generate(prompt, **OPTIONS).tokens != expected[prompt]:
                    wrong.append(prompt)

    threads = [threading.Thread(target=work, args=(p,)) for p in (["one", "two"], ["three", "four"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_one_session_from_two_threads_does_not_break() -> None:
    model, _ = fake_model()
    s = model.session()
    finishes: list[str] = []

    def work(prompt: str) -> None:
        for _ in range(20):
            reply = s.generate(prompt, **OPTIONS)
            assert reply.tokens == fresh(prompt)[: len(reply.tokens)]
            finishes.append(reply.finish_reason)

    threads = [threading.Thread(target=work, args=(p,)) for p in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(finishes) == 40 and set(finishes) <= {"length", "cancelled"}


def test_a_closed_session_says_so() -> None:
    model, _ = fake_model()
    s = model.session()
    stream = s.stream("abc")
    s.close()
    s.close()
    assert [p.finish_reason for p in stream] == ["cancelled"]
    with pytest.raises(UsageError, match="closed"):
        s.generate("abc")
    with pytest.raises(UsageError, match="closed"):
        s.tokens  # noqa: B018


def test_dropping_a_stream_frees_its_cache_at_once() -> None:
    model, engine = fake_model()
    freed: list[int] = []
    stream = model.stream("abc", **OPTIONS)
    next(stream)
    weakref.finalize(engine.sessions.pop(), freed.append, 1)
    gc.disable()
    try:
        del stream
        assert freed == [1]
    finally:
        gc.enable()


# Saved sessions


def saved(model: Model, path: Path) -> tuple[int, ...]:
    with model.session() as s:
        s.generate("Once upon a time", **OPTIONS)
        s.save(path)
        return s.tokens


def test_a_saved_session_goes_on_where_it_was(weights: Path, tmp_path: Path) -> None:
    model, _ = fake_model(weights)
    tokens = saved(model, tmp_path / "s")
    other, engine = fake_model(weights)
    with other.session() as s:
        s.generate("something else", max_tokens=2)
        s.restore(tmp_path / "s")
        assert s.tokens == tokens == tuple(engine.sessions[-1].cached)
        assert engine.sessions[0].closed
        reply = s.generate([*tokens, 65], **OPTIONS)
        assert reply.stats.reused_tokens == len(tokens)
        assert reply.tokens == fresh([*tokens, 65])


def test_an_empty_session_can_be_saved(weights: Path, tmp_path: Path) -> None:
    model, _ = fake_model(weights)
    model.session().save(tmp_path / "s")
    s = model.session()
    s.restore(tmp_path / "s")
    assert s.tokens == ()


def refused(model: Model, path: Path, match: str) -> None:
    """Restoring raises, and the session has lost nothing."""
    s = model.session()
    s.generate("keep me", max_tokens=3)
    before = s.tokens
    with pytest.raises(SessionFileError, match=match) as caught:
        s.restore(path)
    assert caught.value.path == str(path)
    assert s.tokens == before
    assert s.generate([*before, 66], max_tokens=2).stats.reused_tokens == len(before)


def test_a_damaged_file_is_refused(weights: Path, tmp_path: Path) -> None:
    model, _ = fake_model(weights)
    path = tmp_path / "s"
    saved(model, path)
    good = path.read_bytes()
    for cut in (0, 1, 7, 8, 11, 12, 40, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        refused(model, path, "not a saved session" if cut < 8 else "checksum")
    rng = random.Random(0)
    for _ in range(40):
        at, bit = rng.randrange(len(good)), 1 << rng.randrange(8)
        path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
        refused(model, path, "not a saved session" if at < 8 else "checksum")
    path.write_bytes(good + b"x")
    refused(model, path, "checksum")
    path.write_bytes(good)
    model.session().restore(path)


def test_a_header_that_lies_is_refused(weights: Path, tmp_path: Path) -> None:
    model, _ = fake_model(weights)
    path = tmp_path / "s"
    headers = [b"", b"[]", b"{", b"\xff", b'{"model": {}, "tokens": 10, "state": 0}']
    headers += [b'{"model": {}, "tokens": -1, "state": 4}', b'{"model": 3, "tokens": 0, "state": 0}']
    for header in headers:
        for length in (len(header), 2**32 - 1):
            body = session_file.MAGIC + struct.pack("<I", length) + header
            path.write_bytes(body + hashlib.sha256(body).digest())
            refused(model, path, "header makes no sense")


def test_another_model_is_refused(weights: Path, tmp_path: Path) -> None:
    model, _ = fake_model(weights)
    path = tmp_path / "s"
    saved(model, path)
    elsewhere = tmp_path / "copy.gguf"
    elsewhere.write_bytes(weights.read_bytes())
    fake_model(elsewhere)[0].session().restore(path)  # the same weights by another name
    data = bytearray(weights.read_bytes())
    data[4000] ^= 1
    elsewhere.write_bytes(data)
    refused(fake_model(elsewhere)[0], path, "saved with model")
    other_kv, _ = fake_model(weights)
    other_kv.kv = "int8"
    refused(other_kv, path, "saved with kv 'f16', but this model has 'int8'")
    other_engine, engine = fake_model(weights)
    engine.name = "native"
    refused(other_engine, path, "saved with engine 'fake'")


def test_a_state_the_engine_refuses_loses_nothing(weights: Path, tmp_path: Path) -> None:
    model, _ = fake_model(weights)
    path = tmp_path / "s"
    for tokens, state in (([1, 2], b"abc"), ([1, 2, 3], b"\1\0\0\0")):
        session_file.write(path, model.identity(), tokens, state)
        refused(model, path, "does not fit this model")


def test_a_smaller_context_is_refused(weights: Path, tmp_path: Path) -> None:
    tokens = saved(fake_model(weights)[0], tmp_path / "s")
    model, _ = fake_model(weights, context=len(tokens) - 1)
    with pytest.raises(UsageError, match=f"context={len(tokens)} or more"):
        model.session().restore(tmp_path / "s")


def test_saving_is_whole_or_not_at_all(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = fake_model(weights)
    folder = tmp_path / "sessions"
    folder.mkdir()
    saved(model, folder / "s")
    good = (folder / "s").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    s = model.session()
    s.generate("another", max_tokens=3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SessionFileError, match="No space left on device"):
            s.save(folder / "s")
    assert (folder / "s").read_bytes() == good
    assert [p.name for p in folder.iterdir()] == ["s"]
    s.save(folder / "s")
    assert (folder / "s").read_bytes() != good
    with pytest.raises(SessionFileError, match="cannot save"):
        s.save(tmp_path / "nowhere" / "s")
    with pytest.raises(SessionFileError, match="cannot save"):
        s.save(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "sessions"]
    with pytest.raises(SessionFileError, match="cannot read"):
        s.restore(tmp_path / "nowhere")


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="there are no files without a name")
def test_what_a_killed_save_left_goes_with_the_next(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sessions"
    folder.mkdir()
    (folder / ".s.edgert-new").write_bytes(b"complete, but not yet renamed")
    saved(fake_model(weights)[0], folder / "s")
    assert [p.name for p in folder.iterdir()] == ["s"]


def test_the_fingerprint_sees_every_part_of_a_split_model(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(random.Random(0).randbytes(3 << 20))
    before = session_file.fingerprint(parts[0])
    assert session_file.fingerprint(parts[0]) == before
    with parts[1].open("r+b") as file:  # a tensor of a quarter MiB, deep in the second part
        file.seek((1 << 20) + 300_000)
        file.write(bytes(1 << 18))
    assert session_file.fingerprint(parts[0]) != before


def test_the_fake_keeps_the_protocol() -> None:
    from edgert.engines.base import Engine

    engine: Engine = FakeEngine()
    s = engine.session(8)
    s.prefill([1, 2, 3])
    assert s.length == 3 and s.rewind(1) == 1
    state = s.snapshot()
    t = engine.session(8)
    t.restore(state)
    assert (t.step(9) == s.step(9)).all()
