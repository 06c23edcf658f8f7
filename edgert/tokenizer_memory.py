"""The memory that a tokenizer takes, from the header of the file it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import _native

# Resident bytes of the tokenizers library with the chat template's. tests/test_plan.py holds this to the
# measured peaks.
TOKENIZER_BYTES = 8_000_000
# Bytes for each string and each number of the file's metadata, in the core and as Python values, and for
# each piece and merge in a tokenizer.
STRING_BYTES = 130
NUMBER_BYTES = 24
BPE_BYTES = 172
SPM_BYTES = 75
# Share of the metadata's bytes that is given back once a model is loaded.
FREED_METADATA = 0.3


def tokenizer_bytes(file: _native.GgufFile) -> tuple[int, int, int]:
    """Bytes of the tokenizer, of the metadata in ``file`` that it is made of, and of what stays of that."""
    pieces, merges, scores, types = (
        file.count(f"tokenizer.ggml.{name}") for name in ("tokens", "merges", "scores", "token_type")
    )
    metadata = STRING_BYTES * (pieces + merges) + NUMBER_BYTES * (scores + types)
    if file.get("tokenizer.ggml.model") == "gpt2":
        tokenizer = BPE_BYTES * (pieces + merges)
    else:
        tokenizer = SPM_BYTES * pieces
    return TOKENIZER_BYTES + tokenizer, metadata, round(metadata * (1 - FREED_METADATA))
