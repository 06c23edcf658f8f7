"""A model without weights: every promise of the engine protocol, logits that are a hash of the
sequence, and a tokenizer of bytes. What is tested on it is everything above the engine."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from edgert.errors import EngineError
from edgert.model import Model
from edgert.tokenizer import Tokenizer

VOCAB = 300
EOS = 256
TURN = 257  # ends the prompt of a chat


class FakeSession:
    """Logits are uniform noise of a hash of all tokens in the cache, plus 1000 for a scripted one."""

    def __init__(self, engine: FakeEngine, context: int) -> None:
        self.engine, self.context = engine, context
        self.cached: list[int] = []
        self.closed = False

    @property
    def length(self) -> int:
        return len(self.cached)

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        assert len(tokens) > 0 and not self.closed
        self.engine.calls.append(len(tokens))
        for token in tokens:
            self.engine.before_token()
            if self.length >= self.context:
                raise EngineError(f"the cache holds {self.context} positions and is full")
            self.cached.append(int(token))
        return self.logits()

    def step(self, token: int) -> np.ndarray:
        return self.prefill([token])

    def score(self, tokens: Sequence[int]) -> np.ndarray:
        return np.stack([self.step(token).copy() for token in tokens])

    def logits(self) -> np.ndarray:
        digest = hashlib.sha256(struct.pack(f"<{len(self.cached)}i", *self.cached)).digest()
        rng = np.random.default_rng(list(digest))
        out = rng.normal(0, 2, VOCAB).astype(np.float32)
        out[EOS:] -= 100
        forced = self.engine.script.get(self.length)
        if forced is not None:
            out[forced] += 1000
        return self.engine.after(out)

    def rewind(self, length: int) -> int:
        keep = min(length, self.length)
        if self.engine.window and keep < self.length - self.engine.window:
            keep = 0  # the window's ring no longer holds what came before
        del self.cached[keep:]
        return keep

    def snapshot(self) -> bytes:
        return struct.pack(f"<{self.length}i", *self.cached)

    def restore(self, state: bytes) -> None:
        if len(state) % 4 or len(state) // 4 > self.context:
            raise EngineError("not a snapshot of this engine")
        self.cached = list(struct.unpack(f"<{len(state) // 4}i", state))

    def close(self) -> None:
        self.closed = True


class FakeEngine:
    name = "fake"
    vocab_size = VOCAB

    def __init__(self, context: int = 4096, window: int = 0) -> None:
        self.context_length = context
        self.window = window
        self.script: dict[int, int] = {}  # length of the cache -> the token that follows
        self.calls: list[int] = []  # tokens of each forward call
        self.before_token: Callable[[], None] = lambda: None
        self.after: Callable[[np.ndarray], np.ndarray] = lambda logits: logits
        self.sessions: list[FakeSession] = []

    def session(self, context: int) -> FakeSession:
        self.sessions.append(FakeSession(self, context))
        return self.sessions[-1]

    def says(self, prompt: Sequence[int], reply: str | bytes | Sequence[int]) -> None:
        """Make the greedy continuation of ``prompt`` this text and an end-of-generation token."""
        ids = reply.encode() if isinstance(reply, str) else reply
        self.script.update({len(prompt) + i: token for i, token in enumerate([*ids, EOS])})

    def memory(self) -> dict[str, int]:
        return {"body": 1000}

    def describe(self) -> dict[str, Any]:
        return {"engine": self.name, "threads": 1, "weight_bytes_per_step": 1000}

    def close(self) -> None: ...


class _Decoder:
    def __init__(self) -> None:
        self._held = b""

    def push(self, token: int) -> str:
        self._held += bytes([token]) if token < 256 else b""
        for cut in range(len(self._held), max(len(self._held) - 4, -1), -1):
            try:
                text = self._held[:cut].decode()
            except UnicodeDecodeError:
                continue
            self._held = self._held[cut:]
            return text
        text, self._held = self._held.decode(errors="replace"), b""
        return text

    def flush(self) -> str:
        text, self._held = self._held.decode(errors="replace"), b""
        return text


class ByteTokenizer:
    vocab_size = VOCAB
    eos_ids = frozenset({EOS})
    has_chat_template = True

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def stream(self) -> _Decoder:
        return _Decoder()

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        ids: list[int] = []
        for message in messages:
            ids += [*f"{message['role']}:{message['content']}".encode(), TURN]
        return ids


def fake_model(path: Path | None = None, *, context: int = 4096, window: int = 0) -> tuple[Model, FakeEngine]:
    """``path``: the file that stands for the weights; saving a session reads it."""
    engine = FakeEngine(context, window)
    tokenizer = cast(Tokenizer, ByteTokenizer())
    model = Model(engine, tokenizer, path=str(path), context=context, trained_context=context, kv="f16")
    return model, engine
