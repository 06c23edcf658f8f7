"""Byte-level BPE (GPT-2 and its heirs) on the ``tokenizers`` package.

Text is cut into words by the pre-tokenizer's expressions, each UTF-8 byte of a word becomes one
printable character, and the ranked merges join them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from .errors import TokenizerError
from .tokenizer_vocab import Vocab, read_list

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Contractions are spelled out: under (?i) the long s would count as an s.
_LLAMA3 = (
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Pre-tokenizer -> expressions applied in turn to what the one before left, whether a word that is
# in the vocabulary is taken whole, and whether BOS is added when the file does not say.
PRE_TOKENIZERS: dict[str, tuple[tuple[str, ...], bool, bool]] = {
    "gpt-2": ((_GPT2,), False, False),
    "smollm": ((r"\p{N}", _GPT2), False, False),
    "llama-bpe": ((_LLAMA3 % 3,), True, True),
    "lfm2": ((_LLAMA3 % 3,), True, True),
    "qwen2": ((_LLAMA3 % 1,), False, False),
    "default": ((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"), False, False),
}


def byte_chars() -> list[str]:
    """The printable character that stands for each byte: itself where it is printable in
    Latin-1, else the next free code point from 256 on."""
    chars, free = [], 256
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
            chars.append(chr(byte))
        else:
            chars.append(chr(free))
            free += 1
    return chars


_BYTE_OF = {char: byte for byte, char in enumerate(byte_chars())}


def pre_tokenizer_name(metadata: Mapping[str, Any]) -> str:
    """``tokenizer.ggml.pre``; TokenizerError when edgert does not know it."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"unknown pre-tokenizer {str(name)[:60]!r} (tokenizer.ggml.pre); edgert knows "
            f"{', '.join(PRE_TOKENIZERS)}: use a model with one of these, or engine='llamacpp'"
        )
    return name


def adds_bos(pre: str) -> bool:
    return PRE_TOKENIZERS[pre][2]


class ByteBPE:
    """Encodes text that holds no special tokens; ``bytes_of`` gives what a piece stands for."""

    def __init__(self, vocab: Vocab, metadata: Mapping[str, Any], pre: str) -> None:
        expressions, whole_words, _ = PRE_TOKENIZERS[pre]
        # Control tokens stay out: no plain text may ever turn into one.
        hidden = {vocab.pieces[i] for i in vocab.control}
        pieces = {p: i for p, i in vocab.ids.items() if p not in hidden} if hidden else vocab.ids
        # A vocabulary may lack bytes. They take part as symbols nothing joins with, and are dropped at
        # the end: left out from the start, their neighbours would join over the gap.
        self._size = len(vocab.pieces)
        lacking = [c for c in _BYTE_OF if c not in pieces]
        pieces = {**pieces, **{c: self._size + i for i, c in enumerate(lacking)}} if lacking else pieces
        self._lacking = bool(lacking)
        merges = []
        for line in read_list(metadata, "merges", {str}):
            left, _, right = line.partition(" ")
            if left not in hidden and right not in hidden and left + right not in hidden:
                merges.append((left, right))
        try:
            bpe = models.BPE(vocab=pieces, merges=merges, ignore_merges=whole_words)
        except Exception as error:
            raise TokenizerError(
                f"tokenizer.ggml.merges: {error}; every merge must join two tokens into a third: the model "
                "file is damaged or was converted wrongly, download or convert it again"
            ) from error
        self._tokenizer = Tokenizer(bpe)
        splits = [pre_tokenizers.Split(Regex(e), "isolated") for e in expressions]
        bytes_to_chars = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_to_chars])

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [i for i in ids if i < self._size] if self._lacking else ids

    def bytes_of(self, piece: str) -> bytes:
        return b"".join(bytes((_BYTE_OF[c],)) if c in _BYTE_OF else c.encode() for c in piece)
