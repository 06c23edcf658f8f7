"""The exact head: tokens drafted by a FlashHead, confirmed by the whole head.

A block of tokens is decoded with the FlashHead; then the block's hidden states are scored by the whole
head on one way through it, so that its bytes are read once a block. The choice from those logits is
what the dense head would have chosen: sampling is a function of seed, position and logits alone. The
agreed tokens are kept, the first other one is taken from the dense choice, and the cache goes back to
there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .heads import LONGEST

if TYPE_CHECKING:
    from . import _native
    from .engines.base import Logits
    from .session import Session


class ExactHead:
    """Gives the dense head's tokens of one request, block by block."""

    def __init__(
        self, session: Session, sampler: _native.Sampler, more: Sequence[int], logprobs: bool
    ) -> None:
        self._session, self._sampler, self._more, self._logprobs = session, sampler, more, logprobs
        self._length = 2
        self._steps = self._drafts = self._blocks = self._tokens = 0

    def block(
        self,
        last: int,
        position: int,
        limit: int,
        ends: Collection[int],
        cancelled: Callable[[], bool],
    ) -> list[tuple[int, Logits | None]]:
        """The tokens at ``position`` and after it, with the dense logits of each where log probabilities
        are wanted: at least one, at most ``limit``. ``last`` is the token before them, not yet in the cache.
        The sampler has accepted them; the cache holds all but the last of them. A token of ``ends`` is the
        last one."""
        session, sampler = self._session, self._sampler
        start = session.length
        drafts: list[int] = []
        states: list[Logits] = []
        token = last
        for i in range(min(self._length, limit)):
            states.append(session.hidden(token))
            if i + 1 == min(self._length, limit) or cancelled():
                break
            scored, values = session.flash(states[i], self._more)
            token = sampler.sample(values, position + i, scored)
            self._drafts += 1
            if token in ends:
                break
            sampler.accept(token)
            drafts.append(token)
        for _ in drafts:
            sampler.retract()
        self._steps += len(states)
        self._blocks += 1
        confirmed: list[tuple[int, Logits | None]] = []
        for token, logits in self._chosen(np.stack(states), position):
            sampler.accept(token)
            confirmed.append((token, logits))
            self._tokens += 1
            i = len(confirmed) - 1
            if i < len(drafts) and token != drafts[i]:
                session.rewind(start + i + 1)
                self._length = max(2, self._length // 2)
                return confirmed
        self._length = min(LONGEST, 2 * self._length)
        return confirmed

    def _chosen(self, states: Logits, position: int) -> Iterator[tuple[int, Logits | None]]:
        """The dense head's choice after each of ``states``, and its logits where they were needed."""
        if self._sampler.plain_greedy and not self._logprobs:
            for token in self._session.best(states):
                yield token, None
            return
        if self._sampler.order_free and not self._logprobs:
            ids, rows = self._session.dense_rows(states)
            for i, row in enumerate(rows):
                yield self._sampler.sample(row, position + i, ids), None
            return
        for i, logits in enumerate(self._session.dense(states)):
            yield self._sampler.sample(logits, position + i), logits

    def bytes_per_token(self, engine: Mapping[str, Any]) -> int | None:
        """Bytes of weights read for one confirmed token, on average; ``engine`` is its description."""
        if not self._tokens:
            return None
        body: int = engine["body_bytes_per_step"]
        dense: int = engine["weight_bytes_per_step"] - body
        flash: int = engine["flash_bytes_per_step"] - body
        read = self._steps * body + self._drafts * flash + self._blocks * dense
        return round(read / self._tokens)
