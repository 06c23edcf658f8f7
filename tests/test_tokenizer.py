"""Token ids and pieces against llama.cpp, on both real vocabularies and on files written for the
pre-tokenizers that have none here."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_corpus import corpus
from tokenizer_files import Referee, tokenizer_metadata, write_vocab_file

from edgert.tokenizer import Tokenizer

CORPUS = corpus(10_500)


def assert_same_ids(path: Path, lines: list[str], parse_special: bool) -> None:
    ours, theirs = Tokenizer.from_gguf(tokenizer_metadata(path)), Referee(path)
    different = []
    for line in lines:
        expected, found = theirs.encode(line, True, parse_special), ours.encode(line, True, parse_special)
        if expected != found:
            different.append((line, expected, found))
    assert not different, f"{len(different)} of {len(lines)} lines differ, the first: {different[0]}"


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma-3-270m"])
def real_file(request: pytest.FixtureRequest, real_model: Callable[[str], Path]) -> Path:
    return real_model(request.param)


def test_corpus_is_large_and_varied() -> None:
    assert len(set(CORPUS)) == 10_500
    text = "".join(CORPUS)
    for sample in (
        "\u200d",
        "河",
        "ال",
        "े",
        "\u0301",
        "\x01",
        " " * 40,
        "\n\n\n",
        "<|im_end|>",
    ):
        assert sample in text
    assert corpus(200) == CORPUS[:200], "the corpus must be the same in every run"


@pytest.mark.parametrize("parse_special", [False, True], ids=["text", "special"])
def test_real_models(real_file: Path, parse_special: bool) -> None:
    # llama.cpp looks for each of Gemma's 6,400 special tokens in each line, which takes its time.
    assert_same_ids(real_file, CORPUS[::3] if parse_special else CORPUS, parse_special)


def test_whole_documents(real_file: Path) -> None:
    """Long inputs, where words meet and caches fill."""
    rng = random.Random(3)
    documents = ["".join(rng.choice(CORPUS) for _ in range(400)) for _ in range(3)]
    documents += ["x" * 5000, " " * 3000, "\n" * 500, "河" * 3000, "ab" * 2000, "\u0301" * 500]
    assert_same_ids(real_file, documents, False)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "lfm2", "default"])
def test_pre_tokenizers(pre: str, real_model: Callable[[str], Path], tmp_path: Path) -> None:
    metadata = tokenizer_metadata(real_model("smollm2-135m"))
    metadata["tokenizer.ggml.pre"] = pre
    del metadata["tokenizer.ggml.add_bos_token"]  # what the pre-tokenizer does by itself
    assert_same_ids(write_vocab_file(tmp_path / "vocab.gguf", metadata), CORPUS, True)


@pytest.mark.parametrize("add_eos", [False, True])
def test_space_prefix(add_eos: bool, real_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Llama-2 style: a space before the text and after each special token."""
    metadata = tokenizer_metadata(real_model("gemma-3-270m"))
    metadata["tokenizer.ggml.add_space_prefix"] = True
    metadata["tokenizer.ggml.add_eos_token"] = add_eos
    path = write_vocab_file(tmp_path / "vocab.gguf", metadata)
    assert_same_ids(path, CORPUS[::8], True)
    tokenizer = Tokenizer.from_gguf(metadata)
    for text in ("word", " word", "", " ", "two words"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def random_spm(rng: random.Random) -> dict[str, Any]:
    """A small vocabulary with many equal scores, where the order of joining shows."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"ab▁<>", "ab>"]
    pieces += {"".join(rng.choices("ab▁<>0xé", k=rng.randint(2, 5))) for _ in range(120)} - set(pieces)
    types = [2, 3, 3, *[6] * 256]
    types += [rng.choice([1, 1, 5]) for _ in range(len(pieces) - len(types))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [float(rng.randint(-6, 0)) for _ in pieces],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": rng.random() < 0.5,
    }


@pytest.mark.parametrize("seed", range(6))
def test_scores_order_the_joins(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    metadata = random_spm(rng)
    path = write_vocab_file(tmp_path / "vocab.gguf", metadata)
    lines = ["".join(rng.choices("ab ▁<>0xéc", k=rng.randint(1, 40))) for _ in range(1500)]
    assert_same_ids(path, lines, False)


def test_pieces_and_special_ids(real_file: Path) -> None:
    ours, theirs = Tokenizer.from_gguf(tokenizer_metadata(real_file)), Referee(real_file)
    every = range(ours.vocab_size)
    assert [i for i in every if ours.token_bytes(i) != theirs.token_bytes(i)] == []
    assert ours.eos_ids == {i for i in every if theirs.ends_generation(i)}
    assert ours.bos_id == theirs.bos()
