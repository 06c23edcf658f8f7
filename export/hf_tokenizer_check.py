"""Whether the runtime's tokenizer gives the ids of the original, on text of many kinds."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path

from edgert.export.calibration_text import TEXTS
from tokenizers import Tokenizer as HfTokenizer

from edgert.errors import TokenizerError
from edgert.tokenizer import Tokenizer
from edgert.tokenizer_spm import SPACE

_SAMPLED = 3000  # pieces of the vocabulary that are encoded as text of their own
# Where tokenizers differ: white space, digits, contractions, scripts, compatibility characters, controls.
_HARD = (
    "", " ", "  ", "a", " a", "a ", "  a  b   c", "a\n", "\n\na", "a\r\n\r\n  b", "\ta\t\tb", "a \n b",
    "\u00a0a\u3000b", "1", "12", "123", "1234567", "3.14159", "1,000,000", "x1y22z333", "١٢٣", "½²Ⅸ",
    "I'm, we'LL, it'S", "don’t", "hello", "Hello World", "HELLO", "camelCaseWord", "snake_case_word",
    "x=1;y+=2", "((()))", "...!?!?", "a" * 33, "-" * 40, "=" * 70, "ha" * 20, "ﬁn ＡＢ ①", "e\u0301t\u00e9",
    "日本語の文章", "简体中文", "한국어 문장", "नमस्ते", "مرحبا", "שלום", "Привет", "สวัสดี",
    "\U0001f642\U0001f469\u200d\U0001f4bb\U0001f1e9\U0001f1ea", "▁a ▁", "\x00\x01\x7f", "\ufeffa\u200bb",
    "𝕏𠀀", "Ġa Ċ",
)  # fmt: skip


def compare(path: Path, original: HfTokenizer, tokenizer: Tokenizer, composed: bool) -> None:
    """Raise TokenizerError, naming ``path``, for a text that gets other ids. ``composed``: leave out text
    that is not in composed form (NFC), which is known to differ."""
    added = {token.content for token in original.get_added_tokens_decoder().values()}
    # Ends of a turn by their text alone, as in llama.cpp: with the original they are ordinary text.
    control = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size) if tokenizer.is_control(i)]
    hidden = [piece for piece in control if piece not in added]
    for text in _texts(original, tokenizer):
        if (composed and not unicodedata.is_normalized("NFC", text)) or any(p in text for p in hidden):
            continue
        expected = original.encode(text, add_special_tokens=True).ids
        found = tokenizer.encode(text, parse_special=True)
        if found != expected:
            raise TokenizerError(
                f"{path}: this tokenizer cannot be expressed faithfully in GGUF: {text!r:.80} should give "
                f"{expected!s:.80}, but would give {found!s:.80}; use a GGUF file of this model instead"
            )


def _texts(original: HfTokenizer, tokenizer: Tokenizer) -> Iterator[str]:
    yield from _HARD
    for path in sorted(TEXTS.glob("*.txt")):
        yield from path.read_text(encoding="utf-8").split("\n\n")
    for i, token in list(original.get_added_tokens_decoder().items())[:200]:
        if i < tokenizer.vocab_size and SPACE not in token.content:
            yield f"a{token.content}b"
            yield f"a {token.content} b {token.content}\n"
    for i in range(0, tokenizer.vocab_size, max(1, tokenizer.vocab_size // _SAMPLED)):
        yield tokenizer.decode([i])
