"""The time a run will take, part by part: bytes over the bandwidth of memory and operations over the rate of
the processor, which overlap in part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .cost import page_bytes
from .head_classes import FULL, INDEXED, SINKS, STREAMING
from .rates import BARRIER, MANY, PAGE_READS, READS, SCATTERED, SECTION_READS, TOKEN

if TYPE_CHECKING:
    from .planner import Case
    from .rates import Rates

CHUNK = 256  # tokens of a prefill pass: weights are read once for so many
BARRIERS = 6  # of a layer in decoding
# How reading and computing overlap in a part: 1 would be not at all, infinity is the roofline (Williams et
# al. 2009). With fast memory neither hides the other, as plan_check's table shows.
OVERLAP = 1.2
ALWAYS = 272  # tokens that sparse attention always reads, on average
# Of sparse attention: the scan of a token in times of attending to it, and seconds of a layer for its choice.
SCAN, CHOICE = 0.2, 40e-6
# Share of the longest block that the exact modes draft on average: its length follows the agreement.
BLOCK = 0.7
# Pages that enter the set of a step, times the share of them that lies on the disk, and the most that do.
ENTERING, MOST_ENTERING = 10.0, 8
BEHIND = 1 / 3  # of the layers, while which they are read
PAGE = 16  # tokens
# Seconds that a byte from the disk costs the threads that compute, to which its checksum belongs.
FROM_DISK = 0.2e-9
# Share of full attention's tokens that drafts with sparse attention find, at the default budget.
SPARSE_AGREEMENT = 0.96


@dataclass(frozen=True)
class Step:
    """A part of the time: ``seconds``, the ``bytes`` it reads, and what it waits for ("memory",
    "arithmetic", "disk" or "fixed")."""

    name: str
    seconds: float
    bytes: int
    limit: str


def decode_steps(case: Case, rates: Rates, length: int) -> tuple[Step, ...]:
    """One token with ``length`` positions in the cache."""
    spec, sizes = case.spec, case.sizes
    body = _overlapped("body", sizes.step_body_bytes, _seconds_of_body(case, rates, 1), rates)
    # Pages are short: what they cost in arithmetic hides little of the reading (measured: the sum).
    read, pairs = (
        sizes.kv_step(length, length, case.kv, case.chosen, case.heads),
        _pairs(case, length, rates, case.chosen),
    )
    pairs += _choosing(case, rates, length)
    reading = _reading(read, rates)
    attention = Step("attention", reading + pairs, read, "memory" if reading >= pairs else "arithmetic")
    fixed = TOKEN + BARRIERS * spec.n_layers * BARRIER * (rates.threads > 1)
    steps = [body, attention]
    if case.head == "dense":
        steps.append(_dense_head(case, rates, 1))
    else:
        flash = sizes.flash_bytes(*case.budget)
        seconds = math.hypot(_reading(flash, rates), flash / (rates.threads * SCATTERED))
        steps.append(Step("head", seconds, flash, "memory"))
    steps.append(Step("fixed", fixed, 0, "fixed"))
    steps += _disk(case, rates, length, BEHIND * (body.seconds + attention.seconds))
    if "exact" in (case.head, case.attention):
        steps = _exact(case, rates, steps, length)
    return tuple(steps)


def _choosing(case: Case, rates: Rates, length: int) -> float:
    """What sparse attention takes beside attending: the scan of the index and the choice, layer by layer."""
    spec, seconds = case.spec, 0.0
    if not case.chosen or length <= case.chosen + ALWAYS:
        return seconds
    for layer, heads in zip(spec.layers, case.indexed_heads, strict=True):
        if heads:
            group = spec.n_heads // layer.n_kv_heads
            pairs = rates.pairs(case.kv, spec.head_dim, group)
            seconds += CHOICE + SCAN * heads * group * length / pairs
    return seconds


def _disk(case: Case, rates: Rates, length: int, behind: float) -> list[Step]:
    """Pages that enter the set of a step. They are read while its first layers run, ``behind`` seconds."""
    pages = -(-length // PAGE)
    if not case.slots or pages <= case.slots:
        return []
    size = page_bytes(case.spec, case.kv, sum(case.indexed_heads))
    entering = min(ENTERING * (1 - case.slots / pages), MOST_ENTERING)
    read = round(entering * size)
    waits = max(rates.disk_seconds(entering, size, PAGE_READS) - behind, 0.0)
    disk = Step("disk", waits + read * FROM_DISK, read, "disk")
    return [_predicting(case, rates, length), disk] if case.predicted else [disk]


def _predicting(case: Case, rates: Rates, length: int) -> Step:
    """The retrieval head: its matrices, and the scan of the index with the queries it predicts."""
    spec, read = case.spec, case.sizes.weights()["retrieval_head"]
    group = spec.n_heads // max(layer.n_kv_heads for layer in spec.layers)
    scan = SCAN * case.predicted * group * length / rates.pairs(case.kv, spec.head_dim, group)
    return Step("retrieval head", _reading(read, rates) + scan + CHOICE, read, "arithmetic")


def prefill_steps(case: Case, rates: Rates, length: int) -> tuple[Step, ...]:
    """A prompt of ``length`` tokens, up to the logits after the last."""
    passes = -(-length // CHUNK)
    tokens = min(length, MANY)
    arithmetic = length * _seconds_of_body(case, rates, tokens) / tokens
    body = _overlapped("body", passes * case.sizes.step_body_bytes, arithmetic, rates)
    # Position i attends to i positions, or its window.
    pairs = sum(_pairs(case, n, rates) * min(CHUNK, length) for n in range(CHUNK // 2, length, CHUNK))
    attention = Step("attention", pairs, 0, "arithmetic")
    streamed = [
        step
        for n in range(CHUNK, length, CHUNK)
        for step in _streamed(case, rates, n, CHUNK * _pairs(case, n, rates))
    ]
    read, seconds = sum(step.bytes for step in streamed), sum(step.seconds for step in streamed)
    disk = [Step("disk", seconds, read, "disk")] if streamed else []
    return body, attention, *disk, _dense_head(case, rates, 1)


def _reading(read: int, rates: Rates) -> float:
    return read / (READS * rates.bandwidth)


def _overlapped(name: str, read: int, arithmetic: float, rates: Rates) -> Step:
    memory = _reading(read, rates)
    seconds = (memory**OVERLAP + arithmetic**OVERLAP) ** (1 / OVERLAP)
    return Step(name, seconds, read, "memory" if memory >= arithmetic else "arithmetic")


def _seconds_of_body(case: Case, rates: Rates, tokens: int) -> float:
    """Arithmetic of all matrices of the layers for ``tokens`` tokens at once."""
    return sum(
        weights / rates.weights(kind, tokens)
        for name, kind, weights in case.tensors
        if name.startswith("blk.") and name.endswith(".weight") and "norm" not in name
    )


def _dense_head(case: Case, rates: Rates, tokens: int, parts: int = 2) -> Step:
    """The whole head for ``tokens`` tokens, whose input has ``parts`` int8 parts."""
    sizes = case.sizes
    name = "token_embd.weight" if case.spec.tied_head else "output.weight"
    kind = next(kind for tensor, kind, _ in case.tensors if tensor == name)
    arithmetic = parts * case.spec.vocab_size * case.spec.dim / rates.weights(kind, tokens)
    return _overlapped("head", sizes.step_weight_bytes - sizes.step_body_bytes, arithmetic, rates)


def _pairs(case: Case, length: int, rates: Rates, chosen: int = 0) -> float:
    """Arithmetic of attention for one token after ``length``, of which layers that see everything read
    ``chosen`` and the always read ones (0: all)."""
    spec = case.spec
    seconds = 0.0
    for i, layer in enumerate(spec.layers):
        if layer.kind == "attention":
            seen: float = min(length, layer.window or length)
            if not layer.window:
                choosing = min(length, chosen + ALWAYS) if chosen else length
                reads = {INDEXED: choosing, FULL: length, STREAMING: min(length, case.heads.window + SINKS)}
                classes = case.heads.classes[i] if case.heads.classes else [INDEXED]
                seen = sum(reads[kind] for kind in classes) / len(classes)
            seconds += (
                spec.n_heads * seen / rates.pairs(case.kv, spec.head_dim, spec.n_heads // layer.n_kv_heads)
            )
    return seconds


def _exact(case: Case, rates: Rates, drafts: list[Step], length: int) -> list[Step]:
    """A token of the exact modes: drafts of a block, then what confirms it: a pass over the full cache, the
    whole head or both. With agreement a, a block of L drafts gives (1 - a**L) / (1 - a) tokens; L is shorter
    at times."""
    from .heads import LONGEST

    agreement, tokens = 1.0, float(LONGEST)
    if case.head == "exact":
        agreement *= (case.sidecar and case.sidecar.agreement) or 0.99
    if case.attention == "exact":
        agreement *= SPARSE_AGREEMENT
    if agreement < 1:
        tokens = (1 - agreement**LONGEST) / (1 - agreement)
    steps = [
        Step(s.name, s.seconds * LONGEST / tokens, round(s.bytes * LONGEST / tokens), s.limit) for s in drafts
    ]
    parts = _confirming(case, rates, drafts, length)
    confirming = [step for step in parts if step.limit != "disk"]
    read = sum(step.bytes for step in confirming)
    seconds = sum(step.seconds for step in confirming)
    limit = max(confirming, key=lambda step: step.seconds).limit
    tokens *= BLOCK
    steps.append(Step("confirming", seconds / tokens, round(read / tokens), limit))
    return steps + [
        Step("pages", s.seconds / tokens, round(s.bytes / tokens), s.limit)
        for s in parts
        if s not in confirming
    ]


def _confirming(case: Case, rates: Rates, drafts: list[Step], length: int) -> list[Step]:
    """The parts of what confirms a block of the exact modes."""
    from .heads import LONGEST

    if case.attention != "exact":
        return [_dense_head(case, rates, LONGEST, parts=1)]
    block = round(BLOCK * LONGEST)
    body = _overlapped("body", case.sizes.step_body_bytes, _seconds_of_body(case, rates, block), rates)
    read, pairs = case.sizes.kv_step(length, length, case.kv, 0), block * _pairs(case, length, rates)
    attention = Step("attention", _reading(read, rates) + pairs, read, "arithmetic")
    parts = [body, attention, *_streamed(case, rates, length, attention.seconds)]
    if case.head != "flash":
        return [*parts, _dense_head(case, rates, block, parts=1)]
    flash = next(step for step in drafts if step.name == "head")
    return [*parts, Step("head", block * flash.seconds, block * flash.bytes, flash.limit)]


def _streamed(case: Case, rates: Rates, length: int, behind: float) -> list[Step]:
    """The pages that are not in memory, which a pass over the full cache reads layer by layer while it
    attends to others, ``behind`` seconds in all."""
    away = -(-length // PAGE) - case.slots
    if not case.slots or away <= 0:
        return []
    layers = sum(heads > 0 for heads in case.indexed_heads)
    size = page_bytes(case.spec, case.kv, sum(case.indexed_heads)) // layers
    waits = max(rates.disk_seconds(away * layers, size, SECTION_READS) - behind, 0.0)
    read = away * layers * size
    return [Step("disk", waits + read * FROM_DISK, read, "disk")]
