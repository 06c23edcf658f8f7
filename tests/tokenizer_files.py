"""Vocabulary-only GGUF files and llama.cpp as the referee, for the tokenizer tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp

from edgert._native import GgufFile

_PREFIX = "tokenizer."


def tokenizer_metadata(path: Path) -> dict[str, Any]:
    metadata = GgufFile(str(path)).metadata
    return {key: value for key, value in metadata.items() if key.startswith(_PREFIX)}


def write_vocab_file(path: Path, metadata: Mapping[str, Any]) -> Path:
    """A GGUF file that holds ``metadata`` and no tensors; llama.cpp loads it with vocab_only."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor_data_layout("Meta AI original pth")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Referee:
    """llama.cpp's tokenizer of one file."""

    def __init__(self, path: Path) -> None:
        self._llama = llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
        self._vocab = self._llama._model.vocab

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        ids: list[int] = self._llama.tokenize(text.encode(), add_bos=add_special, special=parse_special)
        return ids

    def ends_generation(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def bos(self) -> int:
        return int(llama_cpp.llama_vocab_bos(self._vocab))

    def token_bytes(self, token: int) -> bytes:
        buffer = bytes(1024)
        size = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        assert size >= 0, f"token {token} is longer than {len(buffer)} bytes"
        return buffer[:size]
