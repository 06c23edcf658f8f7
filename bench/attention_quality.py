"""What sparse attention loses against full attention of the same model: KL divergence along text, and lookups.

All sequences keep records (native/kv.h), in which a pass over several tokens, and a step that asks for it, have the
bits of full attention: so a document is read once, and every budget and full attention itself go on from the
same state. The tokens that are measured, a lookup's question included, are read in steps of one token: a step
is what selects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from edgert.bench.eval_texts import Document
from edgert.bench.lookups import Question, Series

from edgert import _native
from edgert.engines.native import CHUNK
from edgert.tokenizer import Tokenizer

Rows = npt.NDArray[np.float32]
Progress = Callable[[int], None]  # takes what was done since the last call
Stage = Callable[[str, int], Progress]  # takes a stage's name and how much there is to do

BLOCK = 64  # positions of which full attention's logits are held; also the batches of the standard error
FULL = 0  # the budget that stands for full attention


@dataclass
class Text:
    """Sums over scored positions of one source."""

    positions: int = 0
    agreed: int = 0
    loss_full: float = 0.0  # nats
    loss: float = 0.0
    blocks: list[tuple[int, float]] = field(default_factory=list)  # positions, and their summed KL

    def add(self, full: Rows, other: Rows, targets: Sequence[int]) -> None:
        """Logits of consecutive positions, [n, vocab], and the tokens that came after them."""
        p, q = _log_probabilities(full), _log_probabilities(other)
        at = np.arange(len(targets)), np.asarray(targets)
        self.positions += len(targets)
        self.agreed += int((full.argmax(1) == other.argmax(1)).sum())
        self.loss_full -= float(p[at].sum(dtype=np.float64))
        self.loss -= float(q[at].sum(dtype=np.float64))
        self.blocks.append((len(targets), float((np.exp(p) * (p - q)).sum(dtype=np.float64))))

    def join(self, other: Text) -> Text:
        return Text(
            self.positions + other.positions,
            self.agreed + other.agreed,
            self.loss_full + other.loss_full,
            self.loss + other.loss,
            self.blocks + other.blocks,
        )

    def of_full(self) -> Text:
        """Full attention's own sums."""
        blocks = [(n, 0.0) for n, _ in self.blocks]
        return Text(self.positions, self.positions, self.loss_full, self.loss_full, blocks)

    @property
    def kl(self) -> float:
        """Mean KL(full || other) of a position, in nats."""
        return max(0.0, sum(kl for _, kl in self.blocks) / self.positions)

    @property
    def kl_error(self) -> float:
        """Its standard error from the means of blocks: neighbours are not independent."""
        if len(self.blocks) < 2:
            return math.nan
        weights = np.array([n for n, _ in self.blocks], np.float64)
        off = np.array([kl for _, kl in self.blocks]) - weights * self.kl
        return float(np.sqrt((off**2).sum() * len(off) / (len(off) - 1)) / weights.sum())

    @property
    def agreement(self) -> float:
        return self.agreed / self.positions

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.positions)

    @property
    def perplexity_ratio(self) -> float:
        return math.exp((self.loss - self.loss_full) / self.positions)


@dataclass
class Lookups:
    """Counts of one kind."""

    asked: int = 0
    right: int = 0
    lost: int = 0  # right with full attention, wrong here
    gained: int = 0

    def add(self, full: bool, here: bool) -> None:
        self.asked += 1
        self.right += here
        self.lost += full and not here
        self.gained += here and not full

    def join(self, other: Lookups) -> Lookups:
        return Lookups(
            self.asked + other.asked,
            self.right + other.right,
            self.lost + other.lost,
            self.gained + other.gained,
        )


@dataclass
class Quality:
    """What one budget gives (FULL: full attention)."""

    budget: int
    kv_bytes: int = 0  # that a step reads at the full context
    texts: dict[str, Text] = field(default_factory=dict)
    lookups: dict[str, Lookups] = field(default_factory=dict)

    def add_text(self, source: str, text: Text) -> None:
        self.texts[source] = self.texts.get(source, Text()).join(text)

    @property
    def text(self) -> Text:
        """Of all sources."""
        whole = Text()
        for text in self.texts.values():
            whole = whole.join(text)
        return whole

    @property
    def lookup(self) -> Lookups:
        """Of all kinds."""
        whole = Lookups()
        for lookups in self.lookups.values():
            whole = whole.join(lookups)
        return whole


class AttentionQuality:
    """Measures ``budgets`` beside full attention on sequences of at most ``context`` tokens. ``qualities`` are full
    attention's and those of the budgets, in their order. ``core`` and ``tokenizer`` are a loaded model's."""

    def __init__(
        self, core: _native.Model, tokenizer: Tokenizer, context: int, kv: str, budgets: Sequence[int]
    ) -> None:
        self._core, self._tokenizer, self._context, self._kv = core, tokenizer, context, kv
        self.qualities = [Quality(budget) for budget in (FULL, *budgets)]

    def score(self, document: Document, positions: int, begin: Stage) -> None:
        """Score the last ``positions`` of a document, which has more."""
        tokens, start = document.tokens, len(document.tokens) - positions - 1
        progress = begin(document.source, start + 2 * positions * (len(self.qualities) - 1))
        reader = self._sequence(FULL)
        reader.read(tokens[:start], progress)
        state = reader.save()
        del reader
        for quality in self.qualities[1:]:
            text = Text()
            full, sparse = self._sequence(FULL, state), self._sequence(quality.budget, state)
            for at in range(start, len(tokens) - 1, BLOCK):
                block = tokens[at : min(at + BLOCK, len(tokens) - 1)]
                expected = full.score(block)
                progress(len(block))
                text.add(expected, sparse.score(block), tokens[at + 1 : at + 1 + len(block)])
                progress(len(block))
            quality.add_text(document.source, text)
        self.qualities[0].add_text(document.source, text.of_full())

    def ask(self, series: Series, begin: Stage) -> None:
        """Ask every question of a series."""
        stops = sum(stop.length for stop in series.stops[-1:])
        progress = begin(series.kind, stops + len(self.qualities) * sum(len(s.questions) for s in series.stops))
        reader = self._sequence(FULL)
        for stop in series.stops:
            reader.read(series.tokens[reader.length : stop.length], progress)
            state = reader.save()
            expected: list[bool] = []
            for quality in self.qualities:
                sequence = self._sequence(quality.budget, state)
                found = []
                for question in stop.questions:
                    found.append(question.answered(self._reply(sequence, question)))
                    sequence.back(state, stop.length)
                    progress(1)
                expected = expected or found
                lookups = quality.lookups.setdefault(series.kind, Lookups())
                for full, here in zip(expected, found, strict=True):
                    lookups.add(full, here)

    def _reply(self, sequence: _Sequence, question: Question) -> str:
        logits = sequence.score(question.tokens)[-1]
        reply: list[int] = []
        while len(reply) < question.room:
            reply.append(int(logits.argmax()))
            if reply[-1] in self._tokenizer.eos_ids:
                break
            logits = sequence.score(reply[-1:])[-1]
        return self._tokenizer.decode(reply)

    def _sequence(self, budget: int, state: bytes | None = None) -> _Sequence:
        return _Sequence(self._core, self._context, self._kv, budget, state)


class _Sequence:
    def __init__(
        self, core: _native.Model, context: int, kv: str, budget: int, state: bytes | None = None
    ) -> None:
        self._core, self._full = core, budget == FULL
        self._cache = _native.Cache(core, context, kv, budget or 1)  # any budget: full steps do not look at it
        if state is not None:
            self._cache.load(state)

    @property
    def length(self) -> int:
        return self._cache.length

    def read(self, tokens: Sequence[int], progress: Progress) -> None:
        """Append tokens as a prompt, which is read in full."""
        for at in range(0, len(tokens), CHUNK):
            part = np.asarray(tokens[at : at + CHUNK], np.int32)
            self._core.forward(self._cache, part, full=True)
            progress(len(part))

    def score(self, tokens: Sequence[int]) -> Rows:
        """Append tokens as steps of one token do; returns the logits after each, [n, vocab]."""
        ids = np.asarray(tokens, np.int32)
        if self._full:  # the same bits in one pass
            return self._core.forward(self._cache, ids, all_logits=True, full=True)
        return np.stack([self._core.forward(self._cache, ids[i : i + 1]) for i in range(len(ids))])

    def save(self) -> bytes:
        return self._cache.save()

    def back(self, state: bytes, length: int) -> None:
        """Back to ``length``, where ``state`` was saved."""
        if self._cache.rewind(length) != length:  # a window's ring has forgotten
            self._cache.load(state)


def _log_probabilities(logits: Rows) -> Rows:
    shifted = logits - logits.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    return shifted
