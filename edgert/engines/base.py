"""The engine protocol: what a backend must offer so that sessions, samplers and the bench can
drive it. Three backends implement it: ``native``, ``llamacpp`` and ``onnx``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.uint32]


class EngineSession(Protocol):
    """One sequence and its KV cache."""

    @property
    def length(self) -> int:
        """Positions in the cache."""
        ...

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Append ``tokens`` (at least one) and return the logits after the last, shape [vocab].

        The array may be a view that is valid until the next call. Raises EngineError past the
        context."""
        ...

    def step(self, token: int) -> Logits:
        """Append one token and return the logits after it, shape [vocab]."""
        ...

    def score(self, tokens: Sequence[int]) -> Logits:
        """Append ``tokens`` and return the logits after each of them, shape [len(tokens), vocab]."""
        ...

    def rewind(self, length: int) -> int:
        """Forget positions from ``length`` on; returns the length really kept, which is smaller
        when state that cannot be rebuilt (a window ring, a convolution) was overwritten."""
        ...

    def snapshot(self) -> bytes:
        """The cache as bytes that :meth:`restore` of a session of the same model accepts."""
        ...

    def restore(self, state: bytes) -> None: ...

    def close(self) -> None: ...


class HeadSession(EngineSession, Protocol):
    """A sequence whose head can be told apart from the layers before it: what a FlashHead needs. Head inputs
    that one of these methods returned are best given to the others as that very array: an engine may have
    their scores already."""

    def hidden(self, token: int) -> Logits:
        """Append one token and return the head's input after it, [dim]."""
        ...

    def confirmed(self, earlier: Sequence[Logits], token: int) -> Logits:
        """Append one token. Returns the head's inputs ``earlier`` and that after the token, [n, dim], all of
        which the whole head is going to score."""
        ...

    def flash(self, hidden: Logits, more: Sequence[int]) -> tuple[Ids, Logits]:
        """The tokens that the FlashHead scores after one head input, each once, those of ``more`` among them,
        and their logits."""
        ...

    def dense(self, hidden: Logits) -> Logits:
        """Logits of rows of head inputs by the whole head, [n, vocab]."""
        ...

    def dense_rows(self, hidden: Logits) -> tuple[Ids | None, Logits]:
        """The tokens of the head's rows (None: in order), and their logits, [n, rows]."""
        ...

    def best(self, hidden: Logits) -> list[int]:
        """The likeliest token of each head input, by the whole head; of equals the first."""
        ...


class Engine(Protocol):
    """A loaded model."""

    name: str

    @property
    def vocab_size(self) -> int: ...

    @property
    def context_length(self) -> int:
        """Longest sequence the model was made for."""
        ...

    def session(self, context: int) -> EngineSession:
        """A new empty sequence of at most ``context`` positions; memory grows with use."""
        ...

    def memory(self) -> dict[str, int]:
        """Resident bytes by part."""
        ...

    def describe(self) -> dict[str, Any]:
        """Engine name, ISA level, threads, build: what a benchmark row records."""
        ...

    def close(self) -> None: ...
