"""The exact modes: tokens drafted cheaply, confirmed by what they stand in for.

A block of tokens is drafted with a FlashHead, with sparse attention or with both; then the block's hidden
states, computed over the full cache, are scored by the head in one go, so that what is expensive is read
once a block. The choice from those logits is what would have been chosen without drafts: sampling is a
function of seed, position and logits alone. The agreed tokens are kept, the first other one is taken from
the exact choice, and the cache goes back to there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .drafter import Drafter, FlashDrafter, SparseDrafter
from .heads import LONGEST
from .judge import DenseJudge, FlashJudge, Judge

if TYPE_CHECKING:
    from . import _native
    from .engines.base import Logits
    from .session import Session


@dataclass
class Counts:
    """What a request came to so far: ``tokens`` confirmed of ``states`` in ``passes``, with ``agreed`` of
    ``drafts`` among them."""

    passes: int = 0
    states: int = 0
    drafts: int = 0
    agreed: int = 0
    tokens: int = 0


class Exact:
    """Gives the exact tokens of one request, block by block."""

    def __init__(self, session: Session, sampler: _native.Sampler, drafter: Drafter, judge: Judge) -> None:
        self._session, self._sampler, self._drafter, self._judge = session, sampler, drafter, judge
        self._length = drafter.shortest
        self.counts = Counts()

    def block(
        self,
        last: int,
        position: int,
        limit: int,
        ends: Collection[int],
        cancelled: Callable[[], bool],
    ) -> list[tuple[int, Logits | None]]:
        """The tokens at ``position`` and after it, with the whole head's logits of each where log
        probabilities are wanted: at least one, at most ``limit``. ``last`` is the token before them, not yet
        in the cache. The sampler has accepted them; the cache holds all but the last of them, as full
        attention writes them. A token of ``ends`` is the last one."""
        session, sampler, counts = self._session, self._sampler, self.counts
        start = session.length
        drafts = self._draft(last, position, min(self._length, limit) - 1, ends, cancelled)
        block = [last, *(drafts[:-1] if drafts and drafts[-1] in ends else drafts)]
        states = self._drafter.states(start, block)
        counts.passes += 1
        counts.states += len(block)
        confirmed: list[tuple[int, Logits | None]] = []
        for i, (token, logits) in enumerate(self._judge.choices(states, position)):
            sampler.accept(token)
            confirmed.append((token, logits))
            counts.tokens += 1
            if i == len(drafts):
                break
            if token != drafts[i]:
                session.rewind(start + i + 1)
                self._length = max(self._drafter.shortest, self._length // 2)
                return confirmed
            counts.agreed += 1
        self._length = min(LONGEST, 2 * self._length)
        return confirmed

    def _draft(
        self, token: int, position: int, count: int, ends: Collection[int], cancelled: Callable[[], bool]
    ) -> list[int]:
        """At most ``count`` tokens that probably come after ``token``. The sampler is as it was."""
        drafts: list[int] = []
        while len(drafts) < count and not cancelled():
            ids, logits = self._drafter.draft(token)
            token = self._sampler.sample(logits, position + len(drafts), ids)
            self._sampler.accept(token)
            drafts.append(token)
            if token in ends:
                break
        for _ in drafts:
            self._sampler.retract()
        self.counts.drafts += len(drafts)
        return drafts

    def bytes_per_token(self, engine: Mapping[str, Any]) -> int | None:
        """Bytes of weights read for one confirmed token, on average; ``engine`` is its description."""
        counts = self.counts
        if not counts.tokens:
            return None
        read = self._drafter.weight_bytes(engine, counts) + self._judge.weight_bytes(engine, counts)
        return round(read / counts.tokens)


def make_exact(
    session: Session,
    sampler: _native.Sampler,
    *,
    attention: str,
    head: str,
    more: Sequence[int] = (),
    logprobs: bool = False,
) -> Exact | None:
    """What confirms the tokens of a request to ``session`` with such modes of attention and head; None when
    neither is exact. ``more``: ids that are scored whether a FlashHead would choose them or not."""
    if attention != "exact" and head != "exact":
        return None
    judge: Judge = (
        FlashJudge(session, sampler, more, logprobs)
        if head == "flash"
        else DenseJudge(session, sampler, logprobs)
    )
    drafter: Drafter = (
        SparseDrafter(session, more, flash=head != "dense")
        if attention == "exact"
        else FlashDrafter(session, more)
    )
    return Exact(session, sampler, drafter, judge)
