"""What sparse attention loses against full attention of the same model, along text and in lookups, and its
time.

Every budget goes on from one state, since a document is read in full whatever the budget. What is measured,
a lookup's question included, is read in steps of one token: a step is what selects. Full attention has the
same bits in a pass and in steps, so it takes text in passes but for the steps that are timed, which all
settings take in turns. Where heads have classes a prompt is not read in full by those that stream, and full
attention has a state of its own. With a tier the sequences of the budgets have some pages on the disk; full
attention has all in memory.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from edgert.bench.eval_texts import Document
from edgert.bench.lookups import Question, Series

from edgert import _native
from edgert.engines.native import CHUNK
from edgert.head_classes import ALL_INDEXED, HeadClasses
from edgert.tier import IN_MEMORY, Tier
from edgert.tokenizer import Tokenizer

Rows = npt.NDArray[np.float32]
Progress = Callable[[int], None]  # takes what was done since the last call
Stage = Callable[[str, int], Progress]  # takes a stage's name and how much there is to do

BLOCK = 64  # positions of which full attention's logits are held; also the batches of the standard error
TIMED = 128  # last positions of a document, in steps that take turns
TURN = 16  # steps of a turn: in the first of them a disk may read for nothing, while the others are at work
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
    kv_bytes: dict[str, int] = field(
        default_factory=dict
    )  # tier -> what a step reads of it at the full context
    seconds: list[float] = field(default_factory=list)  # of steps that took turns with the other budgets'
    texts: dict[str, Text] = field(default_factory=dict)
    lookups: dict[str, Lookups] = field(default_factory=dict)
    disk_steps: int = 0  # of text, those that were timed left out
    disk_bytes: int = 0  # that they read
    disk_seconds: float = 0.0  # of reading, of which a step waited for
    waited_seconds: float = 0.0

    @property
    def hidden(self) -> float | None:
        """The share of the time of reading in which no step waited; None where nothing was read."""
        return 1 - self.waited_seconds / self.disk_seconds if self.disk_seconds else None

    def add_disk(self, steps: int, before: dict[str, float], after: dict[str, float]) -> None:
        """``before`` and ``after``: what a tier had done, see Cache.tier."""
        self.disk_steps += steps
        self.disk_bytes += int(after["bytes_read"] - before["bytes_read"])
        self.disk_seconds += after["read_seconds"] - before["read_seconds"]
        self.waited_seconds += after["waited_seconds"] - before["waited_seconds"]
        self.kv_bytes["disk"] = round(self.disk_bytes / self.disk_steps)

    def add_text(self, source: str, text: Text) -> None:
        self.texts[source] = self.texts.get(source, Text()).join(text)

    @property
    def step_seconds(self) -> float | None:
        """The median; None where no text was scored."""
        return statistics.median(self.seconds) if self.seconds else None

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
    """Measures ``budgets`` beside full attention on sequences of at most ``context`` tokens. ``qualities``
    are full attention's and those of the budgets, in their order. ``core`` and ``tokenizer`` are a loaded
    model's. ``tier``: where the budgets' keys and values lie; ``heads``: what their heads keep."""

    def __init__(
        self,
        core: _native.Model,
        tokenizer: Tokenizer,
        context: int,
        kv: str,
        budgets: Sequence[int],
        tier: Tier = IN_MEMORY,
        heads: HeadClasses = ALL_INDEXED,
    ) -> None:
        self._core, self._tokenizer, self._context, self._kv = core, tokenizer, context, kv
        self._tier, self._heads = tier, heads
        self.qualities = [Quality(budget) for budget in (FULL, *budgets)]

    def score(self, document: Document, positions: int, begin: Stage) -> None:
        """Score the last ``positions`` of a document, which has more."""
        tokens, start = document.tokens, len(document.tokens) - positions - 1
        progress = begin(document.source, 2 * start + positions * len(self.qualities))
        full, reader = self._sequence(FULL), self._reader()
        full.read(tokens[:start], progress)
        reader.read(tokens[:start], progress)
        state = reader.save()
        del reader
        sequences = [full, *(self._sequence(quality.budget, state) for quality in self.qualities[1:])]
        del state
        texts = [Text() for _ in sequences]
        timed = start + positions - min(positions, TIMED)
        disks = [s.disk for s in sequences]
        for at in [*range(start, timed, BLOCK), *range(timed, start + positions, BLOCK)]:
            end = at + BLOCK if at >= timed else min(at + BLOCK, timed)
            block, targets = tokens[at : min(end, start + positions)], tokens[at + 1 : end + 1]
            rows = self._take_turns(sequences, block) if at >= timed else [s.score(block) for s in sequences]
            for text, logits in zip(texts, rows, strict=True):
                text.add(rows[0], logits, targets)
            progress(len(block) * len(sequences))
            if end == timed:
                for quality, before, sequence in zip(self.qualities, disks, sequences, strict=True):
                    if before is not None and sequence.disk is not None:
                        quality.add_disk(timed - start, before, sequence.disk)
        for quality, text in zip(self.qualities, texts, strict=True):
            quality.add_text(document.source, text)

    def _take_turns(self, sequences: Sequence[_Sequence], block: Sequence[int]) -> list[Rows]:
        """The logits that each sequence gives to a block. Every other turn goes backwards."""
        rows: list[list[Rows]] = [[] for _ in sequences]
        for at in range(0, len(block), TURN):
            for n in range(len(sequences))[:: 1 if at // TURN % 2 else -1]:
                for token in block[at : at + TURN]:
                    began = time.perf_counter()
                    rows[n].append(sequences[n].step(token))
                    self.qualities[n].seconds.append(time.perf_counter() - began)
        return [np.stack(one) for one in rows]

    def ask(self, series: Series, begin: Stage) -> None:
        """Ask every question of a series."""
        stops = sum(stop.length for stop in series.stops[-1:])
        progress = begin(
            series.kind, stops + len(self.qualities) * sum(len(s.questions) for s in series.stops)
        )
        reader = self._reader()
        whole = self._sequence(FULL) if self._heads.classes else reader
        for stop in series.stops:
            if whole is not reader:
                whole.read(series.tokens[whole.length : stop.length], lambda _: None)
            reader.read(series.tokens[reader.length : stop.length], progress)
            state = reader.save()
            complete = state if whole is reader else whole.save()
            expected: list[bool] = []
            for quality in self.qualities:
                budget = quality.budget
                origin = state if budget else complete
                shared = not budget and whole is reader
                sequence = self._reader(origin) if shared else self._sequence(budget, origin)
                found = []
                for question in stop.questions:
                    found.append(question.answered(self._reply(sequence, question)))
                    sequence.back(origin, stop.length)
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
        tier = IN_MEMORY if budget == FULL else self._tier
        heads = ALL_INDEXED if budget == FULL else self._heads
        cache = _native.Cache(self._core, self._context, self._kv, budget, *tier, heads=heads)
        return _Sequence(cache, self._core, budget == FULL, state)

    def _reader(self, state: bytes | None = None) -> _Sequence:
        """Reads prompts as every budget does, and saves states for all. Without classes of heads it is full
        attention, at other speeds."""
        cache = _native.Cache(self._core, self._context, self._kv, 1, *self._tier, heads=self._heads)
        return _Sequence(cache, self._core, True, state)


class _Sequence:
    def __init__(self, cache: _native.Cache, core: _native.Model, full: bool, state: bytes | None) -> None:
        self._cache, self._core, self._full = cache, core, full
        if state is not None:
            cache.load(state)

    @property
    def length(self) -> int:
        return self._cache.length

    @property
    def disk(self) -> dict[str, float] | None:
        """What its tier has done, if it has one."""
        return self._cache.tier

    def read(self, tokens: Sequence[int], progress: Progress) -> None:
        """Append tokens as a prompt, which is read in full."""
        for at in range(0, len(tokens), CHUNK):
            part = np.asarray(tokens[at : at + CHUNK], np.int32)
            self._core.forward(self._cache, part, full=True)
            progress(len(part))

    def step(self, token: int) -> Rows:
        """Append a token; returns the logits after it, [vocab]."""
        return self._core.forward(self._cache, np.array([token], np.int32), full=self._full)

    def score(self, tokens: Sequence[int]) -> Rows:
        """Append tokens as steps do; returns the logits after each, [n, vocab]."""
        if self._full:
            return self._core.forward(self._cache, np.asarray(tokens, np.int32), all_logits=True, full=True)
        return np.stack([self.step(token) for token in tokens])

    def save(self) -> bytes:
        return self._cache.save()

    def back(self, state: bytes, length: int) -> None:
        """Back to ``length``, where ``state`` was saved."""
        if self._cache.rewind(length) != length:  # a window's ring has forgotten
            self._cache.load(state)


def _log_probabilities(logits: Rows) -> Rows:
    shifted: Rows = logits - logits.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    return shifted
