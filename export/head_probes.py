"""What attention weights say of KV heads, without training: whether they find what stood before.

Induction and echo scores are those of RazorAttention (arXiv 2407.15891), the needle score with its answer
traced is that of Wu et al. (arXiv 2404.15574). A KV head's score is the largest of its query heads'.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from edgert.export.head_trace import Head, Trace, read
from edgert.export.torch_decoder import TorchDecoder
from torch import Tensor

from edgert.tokenizer import Tokenizer

COPIES = 3  # of random tokens, of which the last one looks back at the others
_NAMES = (
    "locker number of the swimmer",
    "price of the silver lamp",
    "weight of the stone lion",
    "code of the garden gate",
    "number of the night train",
    "height of the radio mast",
    "ticket number of the violinist",
    "length of the north tunnel",
    "population of the harbour town",
    "serial number of the old clock",
    "distance to the lighthouse",
    "account number of the bakery",
)
_LETTERS = "bcdfghjklmnpqrstvwxz"


@dataclass(frozen=True)
class Scores:
    """By KV head, each in [0, 1]."""

    induction: dict[Head, float]
    echo: dict[Head, float]


def repeated_tokens(decoder: TorchDecoder, length: int, seed: int) -> Scores:
    """``length`` random tokens, COPIES times: the mean weight that the last copy gives to the same token in
    earlier copies (echo) and to the token that follows it there (induction)."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(decoder.spec.vocab_size, (length,), generator=rng).tolist()
    scores = Scores({}, {})
    offset = torch.arange(length)

    def look(i: int, q: Tensor, k: Tensor) -> None:
        if decoder.spec.layers[i].window:
            return
        weights = _weights(decoder, q, k)
        same = sum(weights[:, offset, offset + copy * length] for copy in range(COPIES - 1))
        after = sum(weights[:, offset, offset + copy * length + 1] for copy in range(COPIES - 1))
        for kind, found in ((scores.echo, same), (scores.induction, after)):
            assert isinstance(found, Tensor)
            best = found.mean(1).view(k.shape[0], -1).amax(1)
            kind.update({(i, head): float(score) for head, score in enumerate(best)})

    read(decoder, ids * COPIES, length, look)
    return scores


@dataclass(frozen=True)
class Needles:
    """``ids``: a document and, from the last ``end`` tokens on, questions with their answers. ``predicting``:
    the positions, counted in the end, whose next token is one of an answer; ``sources``: where that token
    stands in the document; ``answers``: which question each belongs to."""

    ids: list[int]
    end: int
    predicting: list[int]
    sources: list[int]
    answers: list[int]

    def right(self, log_probabilities: Tensor) -> int:
        """Questions whose answer is likeliest token by token, of [S, vocab] at the end."""
        likeliest = log_probabilities.argmax(-1)
        start = len(self.ids) - self.end
        wrong = {
            answer
            for at, answer in zip(self.predicting, self.answers, strict=True)
            if int(likeliest[at]) != self.ids[start + at + 1]
        }
        return len(set(self.answers)) - len(wrong)


def make_needles(
    tokenizer: Tokenizer, text: Sequence[int], length: int, apart: int, seed: int, questions: int = 6
) -> Needles:
    """Facts in the first part of ``text``, half of them sentences with a number and half random strings with
    one; ``apart`` tokens and more lie between them and the questions. ``length`` tokens in all, more only
    where that is too few for the questions."""
    rng = random.Random(seed)
    facts = [f"The {name} is" for name in rng.sample(_NAMES, questions - questions // 2)]
    facts += ["".join(rng.choices(_LETTERS, k=6)) + " ->" for _ in range(questions // 2)]
    rng.shuffle(facts)
    asked = [tokenizer.encode(f"\n\n{fact}", add_special=False) for fact in facts]
    values = [tokenizer.encode(f" {rng.randint(10000, 99999)}", add_special=False) for _ in facts]
    tail = sum(len(a) + len(v) for a, v in zip(asked, values, strict=True))
    room = max(length - 2 * tail, apart + questions)
    ids: list[int] = []
    begins: list[int] = []
    each = max((room - apart) // questions, 1)
    for n, (question, value) in enumerate(zip(asked, values, strict=True)):
        ids += [*text[n * each : (n + 1) * each], *question]
        begins.append(len(ids))
        ids += value
    ids += text[questions * each : room]
    start = len(ids)
    predicting: list[int] = []
    sources: list[int] = []
    answers: list[int] = []
    for n in rng.sample(range(questions), questions):
        ids += asked[n]
        for j in range(len(values[n])):
            predicting.append(len(ids) - start - 1 + j)
            sources.append(begins[n] + j)
            answers.append(n)
        ids += values[n]
    return Needles(ids, len(ids) - start, predicting, sources, answers)


def read_needles(decoder: TorchDecoder, needles: Needles) -> tuple[Trace, dict[Head, float]]:
    """The trace of a document with questions, and each head's needle score: the share of answer tokens for
    which the position it attends to most is where that token stands in the document."""
    at, sources = torch.tensor(needles.predicting), torch.tensor(needles.sources)
    scores: dict[Head, float] = {}

    def look(i: int, q: Tensor, k: Tensor) -> None:
        if decoder.spec.layers[i].window:
            return
        found = _weights(decoder, q[:, at], k, at + len(needles.ids) - needles.end).argmax(-1) == sources
        best = found.float().mean(1).view(k.shape[0], -1).amax(1)
        scores.update({(i, head): float(score) for head, score in enumerate(best)})

    return read(decoder, needles.ids, needles.end, look), scores


def _weights(decoder: TorchDecoder, q: Tensor, k: Tensor, positions: Tensor | None = None) -> Tensor:
    """[H, S, T] of queries [H, S, hd] at ``positions`` (None: the last)."""
    length = k.shape[1]
    if positions is None:
        positions = torch.arange(length - q.shape[1], length)
    scores = q @ k.repeat_interleave(q.shape[0] // k.shape[0], 0).mT * decoder.spec.attn_scale
    return scores.masked_fill(torch.arange(length) > positions[:, None], -torch.inf).softmax(-1)
