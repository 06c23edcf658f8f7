"""The sequences a retrieval head is fitted to and measured on: the calibration text, the model's own words
and lookups, each as long as the context in which pages are to be chosen."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
from edgert.export.calibration_text import Domain

from edgert import _native
from edgert.engines.native import CHUNK, NativeEngine
from edgert.tokenizer import Tokenizer

Ids = list[int]
OWN_PREFIX = 64  # tokens of text that the model continues
LOOKUPS = 12  # questions of a sequence
_PLACES = (
    "harbour",
    "archive",
    "mill",
    "observatory",
    "tunnel",
    "market",
    "greenhouse",
    "foundry",
    "quarry",
    "depot",
)
_THINGS = (
    "gate code",
    "locker number",
    "meter reading",
    "seat number",
    "file number",
    "signal number",
    "batch number",
)


def text_sequences(domains: Sequence[Domain], length: int, held: bool) -> list[Ids]:
    """The pieces of the domains one after the other, in sequences of ``length`` tokens. What is left at the
    end is one more if it is half as long; all there is, if that is less."""
    found: list[Ids] = []
    for domain in domains:
        ids = [token for piece in (domain.held if held else domain.fit) for token in piece]
        found += [ids[at : at + length] for at in range(0, len(ids), length)]
    long = [ids for ids in found if 2 * len(ids) >= length]
    if long:
        return long
    return [[token for ids in found for token in ids][:length]]


def own_sequence(
    engine: NativeEngine, prefix: Sequence[int], length: int, seed: int, progress: Callable[[int], None]
) -> Ids:
    """``prefix`` and what the model writes behind it, drawn at temperature 0.8, ``length`` tokens in all."""
    model = engine._model
    sampler = _native.Sampler(engine.vocab_size, temperature=0.8, seed=seed)
    cache, ids = _native.Cache(model, length), list(prefix[:OWN_PREFIX])
    logits = model.forward(cache, np.asarray(ids, np.int32))
    while len(ids) < length:
        ids.append(sampler.sample(logits, len(ids)))
        logits = model.forward(cache, np.asarray(ids[-1:], np.int32))
        if len(ids) % CHUNK == 0:
            progress(CHUNK)
    return ids


def lookup_sequence(tokenizer: Tokenizer, filler: Sequence[int], length: int, seed: int) -> Ids:
    """Numbers spread in text, and at the end questions that give some of them again: what a head must find
    far back, which ordinary text seldom asks of it."""
    rng = random.Random(seed)
    names = rng.sample([f"{thing} of the {place}" for place in _PLACES for thing in _THINGS], 2 * LOOKUPS)
    lines = [f"\n\nThe {name} is {rng.randint(10000, 99999)}." for name in names]
    encoded = [tokenizer.encode(line, add_special=False) for line in lines]
    asked = rng.sample(encoded, LOOKUPS)
    end = [token for line in asked for token in line]
    room = max(0, length - len(end) - sum(map(len, encoded)))
    ids: Ids = []
    for i, line in enumerate(encoded):
        at, to = room * i // len(encoded), room * (i + 1) // len(encoded)
        ids += [filler[j % len(filler)] for j in range(at, to)] + line
    return (ids + end)[-length:]
