"""A small but real byte-level BPE vocabulary, so that the files of tiny_models are complete models."""

from __future__ import annotations

import json
from functools import cache

import gguf
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

SPECIAL = ("<pad>", "<bos>", "<eos>")
_TEXT = (
    "A river is older than the town beside it. In spring the water rises, and the people of the town "
    "watch the stones of the bridge: when the third stone is under water, they carry their chairs, "
    "their clocks and their children up the hill. for (int i = 0; i < 10; ++i) { count += i; } "
    "Nobody counts the days. The river counts them. Größe, naïveté, 12 345 and 6.78 are words too."
)


@cache
def _vocabulary(size: int) -> tuple[list[str], list[str]]:
    """Tokens by id and merges in order of rank; 259 tokens are there before the first merge."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT] * 4, trainer)
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    assert len(tokens) == size, f"the text gives {len(tokens)} tokens; {size} are wanted"
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return tokens, [" ".join(pair) for pair in merges]


def add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """Writes a vocabulary of exactly ``size`` tokens (at least 259) to a GGUF file."""
    tokens, merges = _vocabulary(size)
    types = [
        gguf.TokenType.CONTROL if i < len(SPECIAL) else gguf.TokenType.NORMAL for i in range(len(tokens))
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
