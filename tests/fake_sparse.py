"""The model without weights again, with sparse steps: they guess wrong where a test says so, and what they
leave in the cache spoils every full pass over it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from fakes import EOS, VOCAB, ByteTokenizer, FakeEngine, FakeSession

from edgert.model import Model
from edgert.tokenizer import Tokenizer

# Not a token, in place of one that a sparse step computed.
SPOILT = -1


class SparseSession(FakeSession):
    """The head's input is the logits themselves, [VOCAB]."""

    engine: SparseEngine

    def __init__(self, engine: SparseEngine, context: int) -> None:
        super().__init__(engine, context)
        self.highest = 0

    @property
    def tokens(self) -> list[int]:
        return [token if token >= 0 else SPOILT - token - 1 for token in self.cached]

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        logits = super().prefill(tokens)
        self.highest = max(self.highest, self.length)
        return logits

    def step(self, token: int) -> np.ndarray:
        logits = self.prefill([token])
        if not self.engine.sparse:
            return logits
        seen, self.cached = self.cached, self.tokens
        logits = self.logits()
        self.cached = seen
        self.cached[-1] = SPOILT - 1 - int(token)
        if self.engine.wrong(self.length):
            logits = np.roll(logits, 1)
            logits[EOS:] -= 100
        return logits

    hidden = step

    def confirmed(self, earlier: Sequence[np.ndarray], token: int) -> np.ndarray:
        return np.stack([*earlier, self.hidden(token)])

    def states(self, tokens: Sequence[int]) -> np.ndarray:
        self.engine.passes.append(len(tokens))
        return np.stack([self.prefill([token]).copy() for token in tokens])

    def dense(self, hidden: np.ndarray) -> np.ndarray:
        return hidden

    def dense_rows(self, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(VOCAB, dtype=np.uint32)[::-1].copy(), hidden[:, ::-1].copy()

    def best(self, hidden: np.ndarray) -> list[int]:
        return hidden.argmax(1).tolist()

    def flash(self, hidden: np.ndarray, more: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Nine tenths of the tokens, whether they matter or not."""
        rng = np.random.default_rng(list(hashlib.sha256(hidden.tobytes()).digest()))
        scored = rng.random(VOCAB) < 0.9
        scored[list(more)] = True
        return self.among(hidden, np.flatnonzero(scored).tolist())

    def among(self, hidden: np.ndarray, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return np.array(ids, np.uint32), hidden[np.array(ids)]

    def rewind(self, length: int) -> int:
        keep = min(length, self.length)
        if self.engine.window and keep < self.highest - self.engine.window:
            keep = self.highest = 0
        del self.cached[keep:]
        return keep


class SparseEngine(FakeEngine):
    def __init__(self, context: int, window: int, *, sparse: bool) -> None:
        super().__init__(context, window)
        self.sparse = sparse
        self.wrong: Callable[[int], bool] = lambda length: False
        self.passes: list[int] = []  # tokens of each pass over the full cache

    def session(self, context: int) -> SparseSession:
        session = SparseSession(self, context)
        self.sessions.append(session)
        return session

    def describe(self) -> dict[str, Any]:
        sizes = {"weight_bytes_per_step": 1000, "body_bytes_per_step": 600, "flash_bytes_per_step": 650}
        return {**super().describe(), **sizes}


def sparse_model(
    attention: str, head: str, *, context: int = 4096, window: int = 0
) -> tuple[Model, SparseEngine]:
    engine = SparseEngine(context, window, sparse=attention != "full")
    model = Model(
        engine,
        cast(Tokenizer, ByteTokenizer()),
        path="none",
        context=context,
        trained_context=context,
        kv="f16",
        head=head,
        attention=attention,
    )
    return model, engine
