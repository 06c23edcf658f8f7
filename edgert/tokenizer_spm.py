"""SentencePiece-style BPE with scores and byte fallback (Llama 2, Gemma).

Starting from single characters, the neighbours whose union is the piece with the highest score
are joined, leftmost first among equals, until nothing can be joined; a character that is no piece
becomes its UTF-8 bytes. This is done here and not by ``tokenizers``: its BPE wants every
piece spelled out as merges (half a million for Gemma), which takes seconds to derive and build at
every start, and cannot express equal scores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from heapq import heapify, heappop, heappush
from typing import Any

from .tokenizer_vocab import BYTE, Vocab, read_list

SPACE = "\u2581"  # stands for a space in pieces
_CACHED_WORDS = 32768
_CACHED_LENGTH = 64


class SentencePieceBPE:
    """Encodes text that holds no special tokens; ``bytes_of`` gives what a piece stands for."""

    def __init__(self, vocab: Vocab, metadata: Mapping[str, Any]) -> None:
        self._scores = read_list(metadata, "scores", {float, int}, len(vocab.pieces))
        self._ids = vocab.ids
        # Never made out of plain text: control tokens and the names of bytes.
        self._hidden = vocab.control.union(i for i, t in enumerate(vocab.types) if t == BYTE)
        self._byte_ids = [vocab.ids.get(f"<0x{b:02X}>", vocab.unk_id or 0) for b in range(256)]
        # Words are cut before a space, where no piece crosses from one word into the next.
        crossing = {
            pair[0]
            for piece in vocab.pieces
            if piece.find(SPACE, 1) > 0
            for pair in re.findall(f"[^{SPACE}]{SPACE}", piece)
        }
        joined = "".join(map(re.escape, crossing))
        self._cut = re.compile(f"(?<=[^{SPACE}{joined}])(?={SPACE})")
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        out: list[int] = []
        cache = self._cache
        for word in self._cut.split(text.replace(" ", SPACE)):
            ids = cache.get(word)
            if ids is None:
                ids = self._encode_word(word)
                if len(word) <= _CACHED_LENGTH:
                    if len(cache) >= _CACHED_WORDS:
                        cache.clear()
                    cache[word] = ids
            out += ids
        return out

    def _piece_id(self, text: str) -> int | None:
        found = self._ids.get(text)
        return None if found in self._hidden else found

    def _encode_word(self, word: str) -> list[int]:
        scores, piece_id = self._scores, self._piece_id
        # A doubly linked list of symbols; symbol i starts at character i of the word. A joined
        # symbol leaves an empty text behind.
        texts = list(word)
        before = list(range(-1, len(texts) - 1))
        after = [*range(1, len(texts)), -1]
        queue = []
        for i in range(len(texts) - 1):
            joined = word[i : i + 2]
            found = piece_id(joined)
            if found is not None:
                queue.append((-scores[found], i, i + 1, joined))
        heapify(queue)
        while queue:
            _, left, right, joined = heappop(queue)
            # Out of date when either symbol has grown or was swallowed since.
            if not texts[left] or not texts[right] or len(texts[left]) + len(texts[right]) != len(joined):
                continue
            texts[left], texts[right] = joined, ""
            beyond = after[left] = after[right]
            if beyond >= 0:
                before[beyond] = left
            for a, b in ((before[left], left), (left, beyond)):
                if a >= 0 and b >= 0:
                    pair = texts[a] + texts[b]
                    found = piece_id(pair)
                    if found is not None:
                        heappush(queue, (-scores[found], a, b, pair))
        out: list[int] = []
        for symbol in filter(None, texts):
            found = piece_id(symbol)
            if found is not None:
                out.append(found)
            else:
                out += [self._byte_ids[b] for b in symbol.encode()]
        return out

    def bytes_of(self, piece: str) -> bytes:
        return piece.replace(SPACE, " ").encode()
