"""Lookups in long documents, for `edgert eval attention`: numbers in prose, random strings among many of
their kind, and what a chat is asked about a document.

A series is one growing document that is stopped at several lengths; at each, questions are asked about what
was read so far. So a document is read once for all its questions. What a model of 135 million parameters can
answer decided the forms: with one kind of key for forty owners full attention itself finds one of ten, which
measures nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from edgert.bench.text import phrases, prose

from edgert.tokenizer import Tokenizer

STOPS = 4  # lengths, equally far apart, the last one the whole document
PAIRS = 96  # of strings in a document
CHAT_ROOM = 32  # tokens of a chat's reply

_SUBJECTS = phrases(
    "pass key of the vault|telephone number of the ferry office|serial number of the blue engine|"
    "price of the stolen painting in crowns|number of books in the abbey library|postal code of Tarnhill|"
    "membership number of Doctor Abelard|licence number of the red tractor|population of Eastmere|"
    "combination of the bicycle lock|account number of the orphanage|catalogue number of the comet|"
    "weight of the great bell in pounds|number of steps in the salt mine|frequency of the pirate radio|"
    "depth of the crater lake in inches|patient number of Mrs Lindqvist|size of the locust swarm in acres|"
    "reward for the white falcon in marks|number of prisoners on the island|case number of the flood trial|"
    "length of the old aqueduct in feet|score of the winning pilot|annual rainfall of the plateau in drops|"
    "ticket number of the lottery winner|room number of the Swedish envoy|age of the oldest fossil in years|"
    "number of cherry trees in the valley|badge number of Inspector Okafor|yield of the copper pit in tons|"
    "invoice number of the piano dealer|distance to the weather station in yards|speed of the test rocket|"
    "number of votes for Helena Brandt|insurance number of the circus|altitude of the monastery in feet|"
    "production code of the film|number of soldiers in the fortress|registration number of the yacht|"
    "cost of the planetarium in dollars"
)
_LETTERS = "abcdefghjkmnpqrstuvwxyz"


@dataclass(frozen=True)
class Question:
    """``tokens`` are read after the document; the reply of at most ``room`` tokens must then give ``answer``:
    at once, or in a chat (``free``) anywhere."""

    tokens: list[int]
    answer: str
    room: int
    free: bool = False

    def answered(self, reply: str) -> bool:
        """Whether ``reply`` gives the answer, as a whole word."""
        word = rf"(?<![\w,.]){re.escape(self.answer)}(?!\w|[,.]\d)"
        return bool(re.search(word, reply) if self.free else re.match(rf"\s*{word}", reply))


@dataclass(frozen=True)
class Stop:
    """``questions`` are asked when ``length`` tokens of the document were read."""

    length: int
    questions: list[Question]


@dataclass(frozen=True)
class Series:
    kind: str
    tokens: list[int]
    stops: list[Stop]


@dataclass(frozen=True)
class _Fact:
    name: str
    value: str
    line: str
    end: int = 0  # tokens of the document up to here


@dataclass
class _Document:
    """Prose with facts evenly spread in it."""

    tokens: list[int]
    facts: list[_Fact] = field(default_factory=list)


def make_lookups(tokenizer: Tokenizer, length: int, count: int, seed: int = 1) -> list[Series]:
    """``count`` questions, two fifths on passkeys, two fifths on strings, the rest in chats. A document and
    any of its questions and replies take at most ``length`` tokens."""
    shares = [count * 2 // 5, count * 2 // 5]
    shares.append(count - sum(shares))
    return [
        make(tokenizer, length, share, random.Random(seed + i))
        for i, (make, share) in enumerate(zip((_passkeys, _strings, _chats), shares, strict=True))
        if share
    ]


def _passkeys(tokenizer: Tokenizer, length: int, count: int, rng: random.Random) -> Series:
    """Five-digit numbers in prose. The question is the beginning of the sentence that gave one."""

    def ask(facts: Sequence[_Fact]) -> Question:
        fact = facts[-1]
        return _question(tokenizer, f"\n\nThe {fact.name} is", fact.value)

    document = _document(tokenizer, tokenizer.encode(""), length - 48, _numbers(rng), len(_SUBJECTS), rng)
    return Series("passkey", document.tokens, _stops(document, count, ask))


def _strings(tokenizer: Tokenizer, length: int, count: int, rng: random.Random) -> Series:
    """Random strings, each with a number of five digits, in prose. The question is one of the strings."""

    def ask(facts: Sequence[_Fact]) -> Question:
        fact = facts[-1]
        return _question(tokenizer, f"\n\n{fact.name} ->", fact.value)

    document = _document(tokenizer, tokenizer.encode(""), length - 48, _pairs(rng), PAIRS, rng)
    return Series("strings", document.tokens, _stops(document, count, ask))


def _chats(tokenizer: Tokenizer, length: int, count: int, rng: random.Random) -> Series:
    """The document stands in the first turn; numbers are asked for in the second, or in the third after
    another question and its right answer. In the model's chat template where it has one."""

    def ask(facts: Sequence[_Fact]) -> Question:
        asked = [facts[-1]] if len(facts) % 2 else [facts[len(facts) // 2 - 1], facts[-1]]
        turns = []
        for fact in asked:
            turns += [f"What is the {fact.name}?", f"The {fact.name} is {fact.value}."]
        return Question(_next_turns(tokenizer, turns[:-1]), facts[-1].value, CHAT_ROOM, free=True)

    begin = _first_turn(tokenizer)
    document = _document(tokenizer, begin, length - 192, _numbers(rng), len(_SUBJECTS), rng)
    return Series("chat", document.tokens, _stops(document, count, ask))


_ASKED_TO_READ = "Read this document, then answer my questions about it.\n\n"


def _first_turn(tokenizer: Tokenizer) -> list[int]:
    """A conversation up to where the document begins."""
    mark = "\u2042"
    if not tokenizer.has_chat_template:
        return tokenizer.encode(f"User: {_ASKED_TO_READ}")
    messages = [{"role": "user", "content": f"{_ASKED_TO_READ}{mark}"}]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    empty = [{"role": "user", "content": _ASKED_TO_READ}]
    return _shared(whole, tokenizer.apply_chat_template(empty, add_generation_prompt=False))


def _next_turns(tokenizer: Tokenizer, turns: Sequence[str]) -> list[int]:
    """The end of the first turn, the model's answer to it, and ``turns``, the last of which is a question."""
    turns = ["", "I have read the document. What would you like to know?", *turns]
    roles = ("user", "assistant")
    if not tokenizer.has_chat_template:
        said = [f"{roles[i % 2].title()}: {text}" for i, text in enumerate(turns)]
        return _ids(tokenizer, "\n\n".join(["", *said[1:], "Assistant:"]))
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    messages[0]["content"] = _ASKED_TO_READ
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    begin = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=False)
    return whole[len(_shared(begin, _first_turn(tokenizer))) :]


def _shared(a: Sequence[int], b: Sequence[int]) -> list[int]:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return list(a[:n])


def _numbers(rng: random.Random) -> Iterator[_Fact]:
    for name in rng.sample(_SUBJECTS, len(_SUBJECTS)):
        value = str(rng.randint(10000, 99999))
        yield _Fact(name, value, f"The {name} is {value}.")


def _pairs(rng: random.Random) -> Iterator[_Fact]:
    for _ in range(PAIRS):
        name, value = "".join(rng.choices(_LETTERS, k=6)), str(rng.randint(10000, 99999))
        yield _Fact(name, value, f"{name} -> {value}")


def _document(
    tokenizer: Tokenizer,
    begin: list[int],
    length: int,
    facts: Iterator[_Fact],
    count: int,
    rng: random.Random,
) -> _Document:
    """``begin`` and prose with ``count`` facts evenly spread in it, at most ``length`` tokens in all."""
    document = _Document(list(begin))
    paragraphs = iter(prose(length, rng.randint(1, 2**31)).split("\n\n"))
    while True:
        due = len(document.tokens) >= len(document.facts) * length / count
        fact = next(facts, None) if due else None
        piece = _ids(tokenizer, f"\n\n{fact.line if fact else next(paragraphs)}")
        if len(document.tokens) + len(piece) > length:
            return document
        document.tokens += piece
        if fact:
            document.facts.append(_Fact(fact.name, fact.value, fact.line, len(document.tokens)))


def _stops(document: _Document, count: int, ask: Callable[[Sequence[_Fact]], Question]) -> list[Stop]:
    """``count`` questions, spread over the lengths and at each length over the facts read so far. ``ask``
    gets the facts up to the one to ask for."""
    stops = []
    for i in range(STOPS):
        length = len(document.tokens) * (i + 1) // STOPS
        known = [fact for fact in document.facts if fact.end <= length]
        n = count * (i + 1) // STOPS - count * i // STOPS
        if n and known:
            stops.append(Stop(length, [ask(known[: int((j + 0.5) * len(known) / n) + 1]) for j in range(n)]))
    return stops


def _question(tokenizer: Tokenizer, text: str, answer: str) -> Question:
    return Question(_ids(tokenizer, text), answer, len(_ids(tokenizer, f" {answer}.")))


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special=False)
