"""Tokenizers of Hugging Face directories as GGUF keys, against the `tokenizers` package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from edgert.export.hf_tokenizer import _GPT2, _LLAMA3, tokenizer_keys
from hf_files import (
    CHAT,
    TEXTS,
    add_tokenizer,
    byte_level,
)
from tokenizer_corpus import corpus
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.trainers import BpeTrainer

from edgert.errors import ModelFileError, TokenizerError
from edgert.tokenizer import Tokenizer


def keys_of(directory: Path, size: int = 320, ends: Sequence[int] = (2,), family: str = "llama") -> Any:
    return tokenizer_keys(directory, size, ends, family, str)


def llama3_split(digits: str) -> Any:
    return pre_tokenizers.Split(Regex(_LLAMA3 % digits), "isolated")


@pytest.mark.parametrize(
    ("pre", "family", "tokenizer"),
    [
        ("gpt-2", "llama", lambda: byte_level(320)),
        ("smollm", "llama", lambda: byte_level(320, [pre_tokenizers.Digits(True)])),
        ("llama-bpe", "llama", lambda: byte_level(320, [llama3_split("{1,3}")], False)),
        ("lfm2", "lfm2", lambda: byte_level(320, [llama3_split("{1,3}")], False)),
        ("qwen2", "qwen2", lambda: byte_level(320, [llama3_split("")], False)),
        ("gpt-2", "llama", lambda: byte_level(320, [pre_tokenizers.Split(Regex(_GPT2), "isolated")], False)),
    ],
)
def test_byte_level_tokenizers(
    pre: str, family: str, tokenizer: Callable[[], HfTokenizer], tmp_path: Path
) -> None:
    original = tokenizer()
    original.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    keys = keys_of(add_tokenizer(tmp_path, original), 330, family=family)
    assert keys["tokenizer.ggml.pre"] == pre
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.padding_token_id"]) == (1, 0)
    assert keys["tokenizer.ggml.tokens"][325] == "[PAD325]" and keys["tokenizer.ggml.token_type"][325] == 5
    ours = Tokenizer.from_gguf(keys)
    for text in [*corpus(400), "a <tool> b<eos>"]:
        assert ours.encode(text, parse_special=True) == original.encode(text).ids, text
    assert ours.decode(ours.encode("naïve Größe 12")) == "naïve Größe 12"


def sentencepiece(size: int, prefix: bool) -> HfTokenizer:
    """BPE with byte fallback whose merges are all pairs that make a piece, as converters of SentencePiece
    models write them."""
    steps = [normalizers.Replace(" ", "▁")]
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if prefix else steps)
    trained = HfTokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    names = ["<unk>", "<bos>", "<eos>", *(f"<0x{b:02X}>" for b in range(256))]
    trained.train_from_iterator(TEXTS, BpeTrainer(vocab_size=size, special_tokens=names, show_progress=False))
    vocab = trained.get_vocab()
    pieces = sorted(vocab, key=lambda piece: vocab[piece])
    merges = [
        (p[:i], p[i:]) for p in pieces[259:] for i in range(1, len(p)) if {p[:i], p[i:]} <= vocab.keys()
    ]
    tokenizer = HfTokenizer(
        BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(["<unk>", "<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    return tokenizer


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers(prefix: bool, tmp_path: Path) -> None:
    original = sentencepiece(380, prefix)
    keys = keys_of(add_tokenizer(tmp_path, original, pad_token=None), 380)
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.add_space_prefix"] is prefix
    assert keys["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    ours = Tokenizer.from_gguf(keys)
    for text in [*corpus(400), "a <eos> b<bos>"]:
        assert ours.encode(text, parse_special=True) == original.encode(text).ids, text


def test_ends_of_a_generation(tmp_path: Path) -> None:
    """Those the file names by id, and two more; a third is more than GGUF has names for."""
    directory = add_tokenizer(tmp_path, byte_level(320))
    assert Tokenizer.from_gguf(keys_of(directory, ends=[2, 40, 41])).eos_ids == {2, 40, 41}
    with pytest.raises(TokenizerError, match=r"ends at \[40, 41, 42\]"):
        keys_of(directory, ends=[40, 41, 42])
    (directory / "tokenizer_config.json").unlink()
    assert keys_of(directory, ends=[40, 41])["tokenizer.ggml.eos_token_id"] == 40


def test_where_chat_templates_are_found(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "one"}]
    directory = add_tokenizer(tmp_path, byte_level(300), chat_template=several)
    assert keys_of(directory)["tokenizer.chat_template"] == "one"
    (directory / "chat_template.jinja").write_text(CHAT)
    ours = Tokenizer.from_gguf(keys_of(directory))
    assert (
        ours.decode(ours.apply_chat_template([{"role": "user", "content": "Hi"}]), False) == "<|user|>Hi<eos>"
    )
    (directory / "chat_template.jinja").unlink()
    for wrong in (7, "\ud800"):
        add_tokenizer(tmp_path, byte_level(300), chat_template=wrong)
        with pytest.raises(ModelFileError, match=r"chat_template: expected text, found (7|'.ud800')"):
            keys_of(directory)


def test_tokens_without_a_row_are_left_out_and_said(tmp_path: Path) -> None:
    lines: list[str] = []
    tokenizer = byte_level(300)
    tokenizer.add_special_tokens(["<image>"])
    keys = tokenizer_keys(add_tokenizer(tmp_path, tokenizer), 300, [2], "llama", lines.append)
    assert "<image>" not in keys["tokenizer.ggml.tokens"]  # type: ignore[operator]
    assert lines[0].endswith("<image> have no row in the model and are left out")
    with pytest.raises(TokenizerError, match=r"token 29., .* has no row in the model, which has 290"):
        keys_of(tmp_path, 290)


def lowercased() -> HfTokenizer:
    tokenizer = byte_level(300)
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def stripping() -> HfTokenizer:
    tokenizer = byte_level(300)
    tokenizer.add_special_tokens([AddedToken("<greedy>", lstrip=True, rstrip=True)])
    return tokenizer


def two_after() -> HfTokenizer:
    tokenizer = byte_level(300)
    tokenizer.post_processor = processors.TemplateProcessing("$A <eos> <eos>", special_tokens=[("<eos>", 2)])
    return tokenizer


def no_bytes() -> HfTokenizer:
    return HfTokenizer(BPE(vocab={"a": 0, "<unk>": 1}, merges=[], byte_fallback=True, unk_token="<unk>"))


def prefixed() -> HfTokenizer:
    tokenizer = byte_level(300)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lowercased, "cannot be expressed faithfully in GGUF: "),
        (stripping, "cannot be expressed faithfully in GGUF: 'a <greedy> b"),
        (two_after, "special tokens around a text"),
        (no_bytes, "expected tokens for all 256 bytes, found 0"),
        (prefixed, "unknown pre-tokenizer ByteLevel"),
        (lambda: byte_level(300, [pre_tokenizers.Whitespace()]), "unknown pre-tokenizer Whitespace then"),
        (lambda: HfTokenizer(WordPiece({"a": 0}, unk_token="a")), "model.type 'WordPiece'"),
        (
            lambda: HfTokenizer(BPE(vocab={"a": 0}, merges=[], end_of_word_suffix="</w>")),
            "model.end_of_word_suffix = '</w>'",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_expressed(
    tokenizer: Callable[[], HfTokenizer], message: str, tmp_path: Path
) -> None:
    add_tokenizer(tmp_path, tokenizer(), bos_token=None, eos_token=None, pad_token=None)
    with pytest.raises(TokenizerError) as caught:
        keys_of(tmp_path)
    assert message in str(caught.value) and "use a GGUF file of this model" in str(caught.value)
