"""Decoding, streaming, and what damaged metadata leads to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import tokenizer_metadata

from edgert.errors import TokenizerError
from edgert.tokenizer import Tokenizer
from edgert.tokenizer_bpe import byte_chars

PRE_TOKENIZERS = ["gpt-2", "smollm", "llama-bpe", "qwen2", "lfm2", "default"]


def byte_level(pre: str = "gpt-2", **changes: Any) -> dict[str, Any]:
    """A byte-level vocabulary: every byte, a few merges, two control tokens and a user-defined one."""
    merges = ["h e", "l l", "he ll", "Ġ t", "Ã ©", "ð Ł", "1 2"]
    tokens = ["<|start|>x", "<|im_end|>", "<tool>", *byte_chars(), *(m.replace(" ", "") for m in merges)]
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3, 3, 4, *[1] * (len(tokens) - 3)],
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "add_bos_token": False,
    }
    metadata |= changes
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def sentence_piece(**changes: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "ab", "▁ab"]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * 5],
    }
    metadata |= changes
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


BPE = {pre: Tokenizer.from_gguf(byte_level(pre)) for pre in PRE_TOKENIZERS}
SPM = Tokenizer.from_gguf(sentence_piece())


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_byte_level_round_trip(pre: str, text: str) -> None:
    assert BPE[pre].decode(BPE[pre].encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
def test_sentence_piece_round_trip(text: str) -> None:
    assert SPM.decode(SPM.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, BPE["gpt-2"].vocab_size - 1), max_size=40), skip=st.booleans())
def test_stream_is_decode(ids: list[int], skip: bool) -> None:
    """Any ids, so mostly broken UTF-8: what comes piece by piece is what Python makes of all bytes."""
    tokenizer = BPE["gpt-2"]
    stream = tokenizer.stream(skip)
    pieces = [stream.push(i) for i in ids]
    kept = [i for i in ids if not (skip and tokenizer.is_control(i))]
    expected = b"".join(map(tokenizer.token_bytes, kept)).decode("utf-8", "replace")
    assert "".join(pieces) + stream.flush() == expected == tokenizer.decode(ids, skip)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_stream_never_splits_a_character(text: str) -> None:
    """Every piece on its own is part of the text: no piece holds half a code point."""
    tokenizer, at = BPE["gpt-2"], 0
    stream = tokenizer.stream()
    for token in tokenizer.encode(text):
        piece = stream.push(token)
        assert text[at : at + len(piece)] == piece
        at += len(piece)
    assert stream.flush() == "" and at == len(text)


def test_incomplete_character_waits() -> None:
    tokenizer = BPE["gpt-2"]
    stream = tokenizer.stream()
    assert [stream.push(3 + b) for b in "é€".encode()] == ["", "é", "", "", "€"]
    assert stream.push(3 + 0xE2) == ""
    assert stream.push(3 + ord("x")) == "\ufffdx"
    assert stream.push(3 + 0xF0) == "" and stream.flush() == "\ufffd"


def test_special_tokens_in_text() -> None:
    tokenizer = BPE["gpt-2"]
    assert 1 not in tokenizer.encode("a<|im_end|>b")
    assert tokenizer.encode("a<|im_end|>b", parse_special=True)[1] == 1
    assert tokenizer.decode([1, 3 + ord("a")]) == "a"
    assert tokenizer.decode([1, 3 + ord("a")], skip_special=False) == "<|im_end|>a"
    # User-defined tokens are text that is always kept whole.
    assert tokenizer.encode("<tool>") == [2] and tokenizer.decode([2]) == "<tool>"


def test_lone_surrogates_become_replacement_characters() -> None:
    tokenizer = BPE["gpt-2"]
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"


def test_bos_and_eos() -> None:
    tokenizer = Tokenizer.from_gguf(byte_level(add_bos_token=True, add_eos_token=True))
    assert tokenizer.encode("") == [0, 1]
    assert tokenizer.encode("", add_special=False) == []
    assert Tokenizer.from_gguf(byte_level("llama-bpe", add_bos_token=None)).encode("") == [0]
    assert Tokenizer.from_gguf(byte_level("qwen2", add_bos_token=None)).encode("") == []
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (0, 1, {1})


def test_plain_text_never_becomes_a_control_token() -> None:
    """Not even where merges or scores would build its text."""
    tokens = [*byte_chars(), "ab", "abc"]
    merges = ["a b", "ab c"]
    changes = {"tokens": tokens, "merges": merges, "token_type": [*[1] * 257, 3], "bos_token_id": None}
    tokenizer = Tokenizer.from_gguf(byte_level("llama-bpe", **changes, eos_token_id=257))
    assert tokenizer.encode("abc") == [256, ord("c")]
    spm = sentence_piece()
    spm["tokenizer.ggml.token_type"][262] = 3
    assert 262 not in Tokenizer.from_gguf(spm).encode("ab")


@pytest.mark.parametrize("token", [-1, 10**6])
def test_unknown_ids(token: int) -> None:
    with pytest.raises(TokenizerError, match="token id"):
        BPE["gpt-2"].decode([token])


DAMAGED = {
    "no model": (byte_level(model=None), "tokenizer.ggml.model"),
    "other model": (byte_level(model="t5"), "'t5'"),
    "other pre-tokenizer": (byte_level(pre="tekken"), "'tekken'"),
    "pre-tokenizer of a wrong type": (byte_level(pre=["gpt-2"]), "tokenizer.ggml.pre"),
    "no tokens": (byte_level(tokens=None), "tokens"),
    "tokens that are numbers": (byte_level(tokens=[1, 2]), "tokens"),
    "no tokens at all": (byte_level(tokens=[]), "tokens"),
    "a token twice": (byte_level(tokens=["a", "b", "a"], token_type=None), "'a' twice"),
    "too few types": (byte_level(token_type=[1]), "token_type"),
    "types that are text": (byte_level(token_type=["1"] * 266), "token_type"),
    "no merges": (byte_level(merges=None), "merges"),
    "merge of an unknown piece": (byte_level(merges=["h zzz"]), "merges"),
    "merge into an unknown piece": (byte_level(merges=["x y"]), "merges"),
    "merge of one piece": (byte_level(merges=["he"]), "merges"),
    "bos out of range": (byte_level(bos_token_id=266), "bos_token_id"),
    "negative eos": (byte_level(eos_token_id=-1), "eos_token_id"),
    "unknown id of a wrong type": (byte_level(unknown_token_id="0"), "unknown_token_id"),
    "flag of a wrong type": (byte_level(add_bos_token=1), "add_bos_token"),
    "bos to add but none": (byte_level(add_bos_token=True, bos_token_id=None), "bos_token_id"),
    "template of a wrong type": (byte_level() | {"tokenizer.chat_template": 7}, "chat_template"),
    "template too long": (byte_level() | {"tokenizer.chat_template": "x" * 70_000}, "chat_template"),
    "no scores": (sentence_piece(scores=None), "scores"),
    "too many scores": (sentence_piece(scores=[0.0] * 265), "scores"),
    "scores that are not numbers": (sentence_piece(scores=[None] * 264), "scores"),
}


@pytest.mark.parametrize(("metadata", "named"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_metadata(metadata: dict[str, Any], named: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_gguf(metadata)
    assert named in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_garbage_metadata(data: st.DataObject) -> None:
    """One key replaced by anything: a tokenizer that works, or a TokenizerError."""
    metadata = data.draw(st.sampled_from([byte_level, sentence_piece]))()
    key = data.draw(st.sampled_from(sorted(metadata)))
    scalars = st.none() | st.booleans() | st.integers(-10, 300) | st.floats() | st.text(max_size=5)
    metadata[key] = data.draw(scalars | st.lists(scalars, max_size=5))
    with contextlib.suppress(TokenizerError):
        Tokenizer.from_gguf(metadata).encode("hello ab <|im_end|>")


def test_names_of_tokens(real_model: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.from_gguf(tokenizer_metadata(real_model("smollm2-135m")))
    assert tokenizer.id_to_piece(2) == "<|im_end|>" and tokenizer.is_control(2)
    assert tokenizer.vocab_size == 49152 and tokenizer.has_chat_template
