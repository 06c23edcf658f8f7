"""Options, stop strings, streams and replies, on a model without weights."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes import EOS, TURN, VOCAB, fake_model
from hypothesis import given
from hypothesis import strategies as st

from edgert.errors import EngineError, UsageError
from edgert.generate import StopStrings, Stream
from edgert.sampling import make_options

SENTENCE = "The sky is blue: short waves scatter more. Später 🌊 mehr."


def collect(stream: Stream) -> list[Any]:
    return list(stream)


# Stop strings


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What may be shown, by looking at every prefix of the text in turn."""
    for end in range(len(text) + 1):
        hits = [s for s in stops if text[:end].endswith(s)]
        if hits:
            found = max(hits, key=len)
            return text[: end - len(found)], found
    return text, None


@given(
    st.text("ab\n", max_size=30),
    st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3, unique=True),
    st.randoms(use_true_random=False),
)
def test_stop_strings_whatever_the_token_boundaries(text: str, stops: list[str], random: Any) -> None:
    expected, found = first_stop(text, stops)
    matcher = StopStrings(stops)
    shown, rest = "", text
    while rest and not matcher.found:
        n = random.randint(1, len(rest))
        shown += matcher.push(rest[:n])
        rest = rest[n:]
        assert expected.startswith(shown)  # never a character that must be taken back
    assert matcher.found == found
    assert shown + ("" if found else matcher.flush()) == expected


def test_text_is_held_back_no_longer_than_it_must() -> None:
    matcher = StopStrings(["###"])
    assert [matcher.push(t) for t in ("a", "b#", "#", "c", "#d")] == ["a", "b", "", "##c", "#d"]


def test_a_stop_string_ends_the_reply_before_it() -> None:
    model, engine = fake_model()
    engine.says(b"Q", SENTENCE)
    stream = model.stream("Q", stop=["scatter", "mehr"])
    pieces = collect(stream)
    shown = SENTENCE[: SENTENCE.index("scatter")]
    assert "".join(p.text for p in pieces) == shown == stream.reply.text
    assert (stream.reply.finish_reason, stream.reply.stop_string) == ("stop", "scatter")
    assert len(stream.reply.tokens) == len(shown) + len("scatter")
    assert pieces[-1].finish_reason == "stop" and not any(p.finish_reason for p in pieces[:-1])
    so_far = ""
    for piece in pieces:
        so_far += piece.text
        assert not so_far.endswith("s") or shown.startswith((so_far + " ", so_far + "h"))


def test_what_looked_like_a_stop_string_is_shown_at_the_end() -> None:
    model, engine = fake_model()
    engine.says(b"Q", "wait, sca")
    assert model.generate("Q", stop="scatter").text == "wait, sca"
    assert model.generate("Q", stop="scatter", max_tokens=8).text == "wait, sc"


# Streams and replies


def test_pieces_make_up_the_reply() -> None:
    model, engine = fake_model()
    engine.says(b"Hi", SENTENCE)
    stream = model.stream("Hi")
    pieces = collect(stream)
    reply = stream.reply
    assert reply.text == "".join(p.text for p in pieces) == SENTENCE
    assert reply.tokens == tuple(p.token for p in pieces) == (*SENTENCE.encode(), EOS)
    assert reply.finish_reason == reply.stats.finish_reason == "stop" and reply.stop_string is None
    assert reply.logprobs is None and pieces[0].logprob is None
    assert model.generate("Hi").text == SENTENCE
    assert engine.sessions[0].closed  # a stream of its own frees its cache


def test_half_a_code_point_is_never_shown() -> None:
    model, engine = fake_model()
    engine.says(b"Hi", "🌊".encode() + b"\xc3")
    pieces = collect(model.stream("Hi"))
    assert [p.text for p in pieces] == ["", "", "", "🌊", "", "\N{REPLACEMENT CHARACTER}"]


def test_max_tokens_and_the_context_end_with_length() -> None:
    model, engine = fake_model(context=20)
    engine.says(b"0123456789", "x" * 50)
    reply = model.generate("0123456789", max_tokens=3)
    assert (reply.text, reply.finish_reason, reply.stats.generated_tokens) == ("xxx", "length", 3)
    reply = model.generate("0123456789")
    assert (reply.text, reply.finish_reason) == ("x" * 10, "length")
    assert model.generate("0123456789", max_tokens=99).text == "x" * 10
    assert model.generate("x" * 19).stats.generated_tokens == 1


@pytest.mark.parametrize("n", [20, 21, 500])
def test_a_prompt_that_does_not_fit_names_the_remedy(n: int) -> None:
    model, _ = fake_model(context=20)
    with pytest.raises(UsageError, match=f"prompt has {n} tokens and the context 20.*shorten the prompt"):
        model.stream("x" * n)
    model.trained_context = 64
    with pytest.raises(UsageError, match=r"larger context \(up to 64\)"):
        model.stream("x" * n)


def test_stats_count_and_time() -> None:
    model, engine = fake_model()
    engine.says(b"12345", "abc")
    stats = model.generate("12345").stats
    assert (stats.prompt_tokens, stats.reused_tokens, stats.generated_tokens) == (5, 0, 4)
    assert 0 < stats.prompt_seconds <= stats.time_to_first_token
    assert stats.prompt_tps == pytest.approx(5 / stats.prompt_seconds)
    assert stats.generation_tps == pytest.approx(3 / stats.generation_seconds)
    assert stats.bytes_per_token == 1000
    assert 10e6 < stats.peak_memory < 100e9


def test_times_leave_out_the_caller() -> None:
    model, engine = fake_model()
    engine.says(b"1", "abcdef")
    stream = model.stream("1")
    for _ in stream:
        threading.Event().wait(0.05)
    assert stream.reply.stats.generation_seconds < 0.2
    assert stream.reply.stats.time_to_first_token < 0.05


def test_logprobs_are_of_the_plain_softmax() -> None:
    model, engine = fake_model()
    seen: list[np.ndarray] = []

    def keep(logits: np.ndarray) -> np.ndarray:
        seen.append(logits.astype(np.float64))
        return logits

    engine.after = keep
    stream = model.stream("Hello", max_tokens=8, temperature=1.5, top_k=20, seed=1, logprobs=3,
                          presence_penalty=1.0)  # fmt: skip
    pieces = collect(stream)
    for piece, x, (own, best) in zip(pieces, seen, stream.reply.logprobs or (), strict=True):
        expected = x - x.max() - math.log(np.exp(x - x.max()).sum())
        assert piece.logprob == own == pytest.approx(expected[piece.token], abs=2e-6)
        assert [t for t, _ in best] == np.argsort(-expected)[:3].tolist()
        assert best == piece.top_logprobs
    assert [top for _, top in model.generate("Hello", max_tokens=2, logprobs=0).logprobs or ()] == [(), ()]


def test_same_seed_same_tokens() -> None:
    model, _ = fake_model()
    options = {"max_tokens": 20, "temperature": 1.0, "top_p": 0.9}
    first = model.generate("once", seed=7, **options)
    assert model.generate("once", seed=7, **options).tokens == first.tokens
    assert model.generate("once", seed=8, **options).tokens != first.tokens
    unseeded = model.generate("once", **options)
    assert model.generate("once", seed=unseeded.stats.seed, **options).tokens == unseeded.tokens
    assert model.generate("once", **options).stats.seed != unseeded.stats.seed


def test_penalties_and_bias_reach_the_sampler() -> None:
    model, engine = fake_model()
    flat = np.zeros(VOCAB, np.float32)
    flat[65], flat[66] = 1.0, 0.5
    engine.after = lambda _: flat
    assert model.generate("z", max_tokens=4).text == "AAAA"
    assert model.generate("z", max_tokens=4, presence_penalty=0.7).text == "ABAA"
    assert model.generate("z", max_tokens=4, frequency_penalty=0.3).text == "AABA"
    assert model.generate("z", max_tokens=2, logit_bias={66: 1.0}).text == "BB"
    assert model.generate("z", max_tokens=2, logit_bias={65: -math.inf}).text == "BB"
    # The repetition penalty counts the prompt, the other two do not.
    assert model.generate("A", max_tokens=1, repetition_penalty=3.0).text == "B"
    assert model.generate("A", max_tokens=1, presence_penalty=0.7).text == "A"


def test_chat_goes_through_the_template() -> None:
    model, engine = fake_model()
    engine.says([*b"user:Hi", TURN], "Hello.")
    messages = [{"role": "user", "content": "Hi"}]
    assert model.chat(messages).text == "Hello."
    assert "".join(p.text for p in model.chat_stream(messages)) == "Hello."


def test_token_ids_are_a_prompt_too() -> None:
    model, _ = fake_model()
    text = model.generate("abc", max_tokens=5)
    assert model.generate([97, 98, 99], max_tokens=5).tokens == text.tokens
    assert model.generate(np.array([97, 98, 99]), max_tokens=5).tokens == text.tokens


# Ending early


def test_cancel_ends_before_the_next_token() -> None:
    model, engine = fake_model()
    engine.says(b"Q", SENTENCE)
    stream = model.stream("Q", stop=["sk!"])
    texts = []
    for piece in stream:
        texts.append(piece.text)
        if len(texts) == 6:  # "The sk", of which "sk" is held back
            stream.cancel()
    assert "".join(texts) == stream.reply.text == "The sk"
    assert stream.reply.finish_reason == "cancelled"
    assert stream.reply.tokens == tuple(b"The sk")
    assert next(stream, None) is None


def test_cancel_from_another_thread_stops_a_long_prompt() -> None:
    model, engine = fake_model()
    stream = model.stream("x" * 4000, max_tokens=5)
    count = 0

    def before() -> None:
        nonlocal count
        count += 1
        if count == 700:
            thread = threading.Thread(target=stream.cancel)
            thread.start()
            thread.join()

    engine.before_token = before
    assert [p.text for p in stream] == [""]
    assert stream.reply.finish_reason == "cancelled" and stream.reply.tokens == ()
    assert count < 4000


def test_close_and_leaving_the_loop() -> None:
    model, engine = fake_model()
    engine.says(b"Q", SENTENCE)
    stream = model.stream("Q")
    for piece in stream:
        if piece.text == " ":
            break
    stream.close()
    assert stream.reply.text == "The " and stream.reply.finish_reason == "cancelled"
    assert list(stream) == [] and engine.sessions[0].closed


@pytest.mark.parametrize("error", [KeyboardInterrupt, EngineError])
@pytest.mark.parametrize("at", [1, 4, 7])
def test_an_exception_in_the_engine_ends_the_stream(error: type[BaseException], at: int) -> None:
    model, engine = fake_model()
    engine.says(b"1234", "abcdef")
    calls = iter(range(1, 99))

    def before() -> None:
        if next(calls) == at:
            raise error("broken")

    engine.before_token = before
    stream = model.stream("1234")
    with pytest.raises(error):
        collect(stream)
    assert stream.reply.text == "abcdef"[: max(0, at - 4)]
    assert stream.reply.finish_reason == "cancelled" and list(stream) == []


def test_logits_that_are_no_numbers_are_an_error() -> None:
    model, engine = fake_model()
    engine.after = lambda x: np.full_like(x, np.nan)
    with pytest.raises(EngineError, match="NaN"):
        model.generate("x")


# Options

BAD = [
    ("max_tokens", [0, -1, 1.5, "3", True, 2**40]),
    ("stop", [3, "", ["a", ""], [None], {"a": 1}]),
    ("temperature", [-0.1, math.nan, math.inf, 1e6, 0.001, "hot", True, None]),
    ("top_k", [-1, 2.5, None]),
    ("top_p", [0, -1, 1.01, math.nan]),
    ("min_p", [-0.1, 1.1, math.nan]),
    ("repetition_penalty", [0, -1, math.nan, math.inf]),
    ("presence_penalty", [math.nan, 1e9, "x"]),
    ("frequency_penalty", [math.inf, -1e9]),
    ("logit_bias", [{-1: 0.0}, {VOCAB: 0.0}, {1: math.nan}, {1: math.inf}, {"a": 1.0}, [(1, 2.0)]]),
    ("seed", [-1, 2**64, 1.0, "x"]),
    ("logprobs", [-1, VOCAB + 1, 0.5, True]),
]


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD for v in values])
def test_bad_options_are_named(name: str, value: Any) -> None:
    model, engine = fake_model()
    with pytest.raises(UsageError, match=name):
        model.stream("x", **{name: value})
    assert all(session.closed for session in engine.sessions)


def test_unknown_options_are_named() -> None:
    model, _ = fake_model()
    with pytest.raises(UsageError, match=r"unknown option 'max_token': expected one of max_tokens, stop"):
        model.generate("x", max_token=3)


def test_numbers_of_numpy_are_numbers() -> None:
    given_options = {
        "max_tokens": np.int64(3),
        "temperature": np.float32(0.5),
        "logit_bias": {np.int32(4): 1},
    }
    options = make_options(given_options, VOCAB)
    assert (options.max_tokens, options.temperature, options.logit_bias) == (3, 0.5, {4: 1.0})


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.stream(""),
        lambda m: m.stream([]),
        lambda m: m.stream(None),
        lambda m: m.stream(b"abc"),
        lambda m: m.stream([1, VOCAB]),
        lambda m: m.stream([-1]),
        lambda m: m.stream(["a"]),
        lambda m: m.stream([{"role": "user", "content": "x"}]),
        lambda m: m.chat([]),
        lambda m: m.chat("Hi"),
        lambda m: m.chat({"role": "user", "content": "x"}),
        lambda m: m.chat(["Hi"]),
        lambda m: m.chat([{"role": "user"}]),
        lambda m: m.chat([{"role": "user", "content": None}]),
    ],
)
def test_bad_prompts_are_refused(call: Callable[[Any], Any]) -> None:
    model, _ = fake_model()
    with pytest.raises(UsageError):
        call(model)


def test_a_closed_model_says_so() -> None:
    model, _ = fake_model()
    with model:
        stream = model.stream("x", max_tokens=2)
        collect(stream)
    model.close()
    assert stream.reply.stats.generated_tokens == 2
    with pytest.raises(UsageError, match="closed"):
        model.generate("x")


def test_the_package_shows_eight_names_and_imports_little() -> None:
    script = (
        "import sys, edgert\n"
        "names = 'EdgertError Model Plan Reply Session __version__ load plan'\n"
        "assert edgert.__all__ == names.split(), edgert.__all__\n"
        "heavy = {'numpy', 'tokenizers', 'jinja2', 'rich', 'torch', 'transformers', 'onnx', 'llama_cpp'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert all(getattr(edgert, name) for name in edgert.__all__)\n"
        "assert not (heavy - {'numpy', 'tokenizers', 'jinja2'}) & set(sys.modules), sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
