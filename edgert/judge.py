"""What the exact modes decide with: a head's choice after each hidden state of a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from . import _native
    from .engines.base import Logits
    from .exact import Counts
    from .session import Session


class Judge(Protocol):
    def choices(self, states: Logits, position: int) -> Iterator[tuple[int, Logits | None]]:
        """The token at ``position`` and those after it, one for each of ``states`` [n, dim], and the whole
        head's logits where log probabilities are wanted. The sampler must have accepted a token before the
        next one is asked for."""
        ...

    def weight_bytes(self, engine: Mapping[str, Any], counts: Counts) -> int:
        """Bytes of the head that were read."""
        ...


class DenseJudge:
    """The whole head, which is read once for all states."""

    def __init__(self, session: Session, sampler: _native.Sampler, logprobs: bool) -> None:
        self._session, self._sampler, self._logprobs = session, sampler, logprobs

    def choices(self, states: Logits, position: int) -> Iterator[tuple[int, Logits | None]]:
        if self._sampler.plain_greedy and not self._logprobs:
            for token in self._session.best(states):
                yield token, None
        elif self._sampler.order_free and not self._logprobs:
            ids, rows = self._session.dense_rows(states)
            for i, row in enumerate(rows):
                yield self._sampler.sample(row, position + i, ids), None
        else:
            for i, logits in enumerate(self._session.dense(states)):
                yield self._sampler.sample(logits, position + i), logits

    def weight_bytes(self, engine: Mapping[str, Any], counts: Counts) -> int:
        return counts.passes * int(engine["weight_bytes_per_step"] - engine["body_bytes_per_step"])


class FlashJudge:
    """The FlashHead, for each state up to the first that is not what was drafted."""

    def __init__(
        self, session: Session, sampler: _native.Sampler, more: Sequence[int], logprobs: bool
    ) -> None:
        self._session, self._sampler, self._more, self._logprobs = session, sampler, more, logprobs

    def choices(self, states: Logits, position: int) -> Iterator[tuple[int, Logits | None]]:
        for i, state in enumerate(states):
            ids, logits = self._session.flash(state, self._more)
            whole = self._session.dense(state[None])[0] if self._logprobs else None
            yield self._sampler.sample(logits, position + i, ids), whole

    def weight_bytes(self, engine: Mapping[str, Any], counts: Counts) -> int:
        return counts.tokens * int(engine["flash_bytes_per_step"] - engine["body_bytes_per_step"])
