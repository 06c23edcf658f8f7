"""Hugging Face model directories for tests: tiny models as transformers saves them, and what converting them
takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny_tokenizer
from edgert.export.hf_directory import convert
from edgert.models import load_spec
from tiny_models import tiny
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from edgert.engines import open_engine

TEXTS = [tiny_tokenizer._TEXT] * 4
SPECIAL = ["<pad>", "<bos>", "<eos>"]
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"


def nothing(_: int) -> None: ...


def steps(_: str, __: int) -> Callable[[int], None]:
    return nothing


def run(directory: Path, quant: str = "f32", output: Path | None = None) -> Path:
    return convert(directory, quant, output, str, steps)


def byte_level(size: int, splits: Sequence[Any] = (), use_regex: bool = True) -> HfTokenizer:
    """A small byte-level BPE tokenizer."""
    tokenizer = HfTokenizer(BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last]) if splits else last
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS,
        BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def add_tokenizer(directory: Path, tokenizer: HfTokenizer, **settings: Any) -> Path:
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": {"content": "<pad>"}, **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    return directory


def save(name: str, directory: Path, **options: Any) -> Path:
    """What `save_pretrained` makes of a tiny model, and a tokenizer of fewer tokens than it has rows."""
    tiny(name).model.save_pretrained(directory, **options)
    return add_tokenizer(directory, byte_level(280), chat_template=CHAT)


def spec_of(file: Any) -> Any:
    return load_spec(file.metadata, {t.name: tuple(t.shape) for t in file.tensors}).as_dict() | {"name": ""}


def logits(path: Path, tokens: list[int], engine: str = "native") -> np.ndarray:
    opened = open_engine(path, engine, threads=1)
    try:
        return opened.session(64).score(tokens).copy()
    finally:
        opened.close()


def rms(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


def change(directory: Path, file: str, **values: Any) -> None:
    path = directory / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
