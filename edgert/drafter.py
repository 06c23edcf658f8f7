"""What the exact modes draft with: a way to guess the next token, and to the exact hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from .engines.base import Ids, Logits
    from .exact import Counts
    from .session import Session


class Drafter(Protocol):
    @property
    def shortest(self) -> int:
        """Tokens of a block when drafts fail: fewer would not be worth a pass."""
        ...

    def draft(self, token: int) -> tuple[Ids | None, Logits]:
        """Append a token to the cache. Returns ids (None: all, in order) and their logits after it."""
        ...

    def states(self, start: int, block: Sequence[int]) -> Logits:
        """Make the cache hold the tokens of ``block`` from position ``start`` on, as full attention writes
        them, and return the head's input after each, [n, dim]. The cache holds them already where
        :meth:`draft` was called for them, in their order."""
        ...

    def weight_bytes(self, engine: Mapping[str, Any], counts: Counts) -> int:
        """Bytes of weights that were read, without what the judge reads."""
        ...


class FlashDrafter:
    """Drafts with a FlashHead from states that need no correction."""

    shortest = 2

    def __init__(self, session: Session, more: Sequence[int]) -> None:
        self._session, self._more = session, more
        self._states: list[Logits] = []

    def draft(self, token: int) -> tuple[Ids | None, Logits]:
        self._states.append(self._session.hidden(token))
        return self._session.flash(self._states[-1], self._more)

    def states(self, start: int, block: Sequence[int]) -> Logits:
        states, self._states = self._states, []
        # Of the last token nothing was drafted, unless it ended the reply.
        return self._session.confirmed(states, block[-1]) if len(states) < len(block) else np.stack(states)

    def weight_bytes(self, engine: Mapping[str, Any], counts: Counts) -> int:
        body: int = engine["body_bytes_per_step"]
        flash: int = engine["flash_bytes_per_step"]
        return counts.states * body + counts.drafts * (flash - body)


class SparseDrafter:
    """Drafts with sparse attention, and the FlashHead or the whole head. What such steps leave in the
    cache is not what full attention writes: from the second layer on, keys and values follow from states
    that differ. So the block is computed anew, in one pass over the full cache."""

    shortest = 4  # a pass costs as much as some steps

    def __init__(self, session: Session, more: Sequence[int], *, flash: bool) -> None:
        self._session, self._more, self._flash = session, more, flash

    def draft(self, token: int) -> tuple[Ids | None, Logits]:
        if self._flash:
            return self._session.flash(self._session.hidden(token), self._more)
        return None, self._session.step(token)

    def states(self, start: int, block: Sequence[int]) -> Logits:
        self._session.rewind(start)
        return self._session.states(block)

    def weight_bytes(self, engine: Mapping[str, Any], counts: Counts) -> int:
        step: int = engine["flash_bytes_per_step" if self._flash else "weight_bytes_per_step"]
        return counts.drafts * step + counts.passes * int(engine["body_bytes_per_step"])
