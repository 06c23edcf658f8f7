"""Which KV heads need the whole past, and which may stream: the work of `edgert heads`.

A head is judged by what the model's output loses when it streams (ablation), on text and on answers that
stand far back, and by the training-free probes of :mod:`edgert.export.head_probes`. Not by how much attention
mass it gives to what lies far back: heads that look things up seldom give any, and ranked that way lookups
are lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from edgert.export.calibration_text import TEXTS
from edgert.export.head_probes import Needles, Scores, make_needles, read_needles, repeated_tokens
from edgert.export.head_trace import Head, Trace, again, divergence, read
from edgert.export.torch_decoder import TorchDecoder

from edgert import _native
from edgert.errors import UnsupportedModelError
from edgert.head_classes import SINKS, WINDOW, seeing_all
from edgert.tokenizer import Tokenizer

SOURCES = ("prose", "code")  # of the calibration text; the first half of each ranks, the second chooses
LENGTH = 2048  # tokens of a document
NEEDLES_LENGTH = 1536
SCORED = 64  # positions of a document by which heads are ranked
HELD_SCORED = 128  # and those that choose how many stream
REPEATED = 400  # random tokens
# A head that reaches one of these keeps everything, whatever its ablation says: Wu et al. call a head with
# the first score a retrieval head, RazorAttention keeps the others.
NEEDLE = 0.1
INDUCTION_SHARE, ECHO_SHARE = 0.14, 0.01
# The most that all streaming heads together may cost on held-out text and on answers, in nats. At 8,000
# tokens they cost 1.7 to 3.4 times what they do here (docs/kernel-log.md).
TEXT_LIMIT, ANSWER_LIMIT = 0.0008, 0.02

Steps = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Judged:
    """One KV head. ``text`` and ``answers``: KL in nats of a position of text, and of a token of an answer,
    when this head alone streams."""

    layer: int
    head: int
    text: float
    answers: float
    induction: float
    echo: float
    needle: float
    kept: bool = False  # by a probe

    @property
    def cost(self) -> float:
        return self.text + self.answers


@dataclass(frozen=True)
class Verdict:
    """``heads``: those that may stream first. ``streaming``: how many of these do. ``text``, ``answers``:
    what that costs together on held-out text and questions, of which ``right`` of ``asked`` are answered, and
    ``right_full`` with full attention."""

    heads: list[Judged]
    streaming: int
    text: float
    answers: float
    asked: int
    right: int
    right_full: int

    def pattern(self, layers: int, columns: int) -> list[list[float]]:
        """The ranks as numbers of a pattern file: streaming heads below one half, 0 in layers with a
        window."""
        rows = [[0.0] * columns for _ in range(layers)]
        kept = len(self.heads) - self.streaming
        for n, head in enumerate(self.heads):
            below, above = n / max(self.streaming, 1), (n - self.streaming + 1) / max(kept, 1)
            rows[head.layer][head.head] = 0.5 * below if n < self.streaming else 0.5 + 0.5 * above
        return rows

    def quality(self) -> dict[str, Any]:
        """What the sidecar says of it."""
        return {
            "streaming": self.streaming,
            "heads": len(self.heads),
            "kl_text": self.text,
            "kl_answers": self.answers,
            "asked": self.asked,
            "right": self.right,
            "right_full": self.right_full,
        }


def classify(file: _native.GgufFile, share: float | None, seed: int, steps: Steps) -> Verdict:
    """Judge the heads of a model and choose which stream: ``share`` of them, or (None) as many as the limits
    allow. Raises UnsupportedModelError where no layer sees everything, or the model's context is too short to
    tell."""
    decoder = TorchDecoder(file)
    layers = seeing_all(decoder.spec)
    if not layers:
        raise UnsupportedModelError(f"{file.path}: every layer has a window: there is nothing to classify")
    length = min(LENGTH, decoder.spec.context_length)
    if length < 2 * (WINDOW + SINKS):
        raise UnsupportedModelError(
            f"{file.path}: made for {length} tokens, of which streaming heads see {WINDOW + SINKS}: "
            "streaming would save next to nothing"
        )
    tokenizer = Tokenizer.from_gguf(file.metadata)
    texts = {name: _halves(tokenizer, name) for name in SOURCES}
    heads = [(i, head) for i in layers for head in range(decoder.spec.layers[i].n_kv_heads)]
    probes = repeated_tokens(decoder, min(REPEATED, length // 3), seed)
    done = steps("reading documents", len(SOURCES) + 1)
    traces = []
    for first, _ in texts.values():
        traces.append(read(decoder, first[:length], SCORED))
        done(1)
    needles = _needles(tokenizer, texts["prose"][0], length, seed)
    trace, found = read_needles(decoder, needles)
    done(1)
    text, answers = _ablate(traces, trace, needles, heads, steps("streaming one head at a time", len(heads)))
    judged = _rank(heads, text, answers, probes, found)
    return _choose(decoder, tokenizer, texts, judged, length, share, seed, steps)


def _halves(tokenizer: Tokenizer, name: str) -> tuple[list[int], list[int]]:
    ids = tokenizer.encode((TEXTS / f"{name}.txt").read_text(encoding="utf-8"))
    return ids[: len(ids) // 2], ids[len(ids) // 2 :]


def _needles(tokenizer: Tokenizer, text: Sequence[int], length: int, seed: int) -> Needles:
    return make_needles(tokenizer, text, min(length, NEEDLES_LENGTH), WINDOW + SINKS, seed)


def _ablate(
    texts: Sequence[Trace],
    asked: Trace,
    needles: Needles,
    heads: Sequence[Head],
    done: Callable[[int], None],
) -> tuple[dict[Head, float], dict[Head, float]]:
    """KL of text and of answers by head; the heads of a layer are computed together."""
    text: dict[Head, float] = {}
    answers: dict[Head, float] = {}
    for layer in dict.fromkeys(layer for layer, _ in heads):
        batch = [[head] for head in heads if head[0] == layer]
        found = sum(divergence(trace, again(trace, batch, WINDOW)).mean(-1) for trace in texts) / len(texts)
        told = divergence(asked, again(asked, batch, WINDOW))[:, needles.predicting].mean(-1)
        assert isinstance(found, torch.Tensor)
        for (head,), kl, lost in zip(batch, found.tolist(), told.tolist(), strict=True):
            text[head], answers[head] = max(kl, 0.0), max(lost, 0.0)
        done(len(batch))
    return text, answers


def _rank(
    heads: Sequence[Head],
    text: dict[Head, float],
    answers: dict[Head, float],
    probes: Scores,
    needle: dict[Head, float],
) -> list[Judged]:
    """Cheapest to stream first, and behind them those that a probe keeps."""
    inducing = _top(probes.induction, math.ceil(INDUCTION_SHARE * len(heads)))
    echoing = _top(probes.echo, math.ceil(ECHO_SHARE * len(heads)))
    judged = [
        Judged(
            *head,
            text[head],
            answers[head],
            probes.induction[head],
            probes.echo[head],
            needle[head],
            needle[head] >= NEEDLE or head in inducing or head in echoing,
        )
        for head in heads
    ]
    return sorted(judged, key=lambda j: (j.kept, j.cost))


def _top(scores: dict[Head, float], count: int) -> set[Head]:
    return set(sorted(scores, key=lambda head: -scores[head])[:count])


def _choose(
    decoder: TorchDecoder,
    tokenizer: Tokenizer,
    texts: dict[str, tuple[list[int], list[int]]],
    judged: list[Judged],
    length: int,
    share: float | None,
    seed: int,
    steps: Steps,
) -> Verdict:
    free = sum(not head.kept for head in judged)
    tries = 1 if share is not None else _halvings(free)
    done = steps("streaming many heads together", len(SOURCES) + 1 + tries)
    traces = []
    for _, second in texts.values():
        traces.append(read(decoder, second[:length], HELD_SCORED))
        done(1)
    needles = _needles(tokenizer, texts["prose"][1], length, seed + 1)
    asked, _ = read_needles(decoder, needles)
    done(1)

    def verdict(count: int) -> Verdict:
        chosen: Collection[Head] = [(j.layer, j.head) for j in judged[:count]]
        kl = [float(divergence(trace, again(trace, [chosen], WINDOW)).mean()) for trace in traces]
        told = again(asked, [chosen], WINDOW)[0]
        lost = float(divergence(asked, told)[needles.predicting].mean())
        done(1)
        right, full = needles.right(told), needles.right(asked.log_probabilities)
        return Verdict(judged, count, sum(kl) / len(kl), lost, len(set(needles.answers)), right, full)

    if share is not None:
        return verdict(round(share * len(judged)))
    low, high = 0, free
    right_full = needles.right(asked.log_probabilities)
    best = Verdict(judged, 0, 0.0, 0.0, len(set(needles.answers)), right_full, right_full)
    for _ in range(tries):
        if low == high:
            done(1)
            continue
        middle = (low + high + 1) // 2
        found = verdict(middle)
        if found.text <= TEXT_LIMIT and found.answers <= ANSWER_LIMIT and found.right >= found.right_full:
            best, low = found, middle
        else:
            high = middle - 1
    return best


def _halvings(n: int) -> int:
    return max(n, 1).bit_length()
