"""Options of a generation, checked once, and the native sampler made from them."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import _native
from .errors import UsageError

# Ids that may come next, or what gives them after the tokens of the reply so far.
Allowed = Collection[int] | Callable[[Sequence[int]], Collection[int]]


class Options(NamedTuple):
    """What ``stream``, ``generate`` and ``chat`` accept. Sampling steps run in this order: penalties,
    bias, temperature, top-k, top-p, min-p, draw (``native/sampler.h`` has the formulas).

    ``max_tokens``: tokens to generate; None: as many as the context holds.
    ``stop``: a string or several; the text ends before the first of them and never shows a part of it.
    ``temperature``: 0 takes the likeliest token, ties to the lowest id; else 0.01 to 100.
    ``top_k``: ids kept (0: all). ``top_p``: share of the probability kept (1: all).
    ``min_p``: ids less likely than this share of the likeliest are dropped (0: none).
    ``repetition_penalty``: above 1 discourages tokens of the prompt and of the reply.
    ``presence_penalty``, ``frequency_penalty``: subtracted from the logits of tokens of the reply,
    once or for each time they stand in it.
    ``logit_bias``: token id -> number added to its logit; ``-inf`` bans the token.
    ``allowed``: the only token ids that may come, or a function from the ids of the reply so far to
    those that may follow them (a grammar). A reply can end itself only where an end-of-turn id is
    among them. Native reads only their rows of the head, whatever the head.
    ``seed``: 0 to 2**64 - 1; None takes a new one, which ``reply.stats.seed`` tells. The same seed,
    prompt and options give the same tokens, whatever the number of threads.
    ``logprobs``: report the log probability of each token, and of this many likeliest ones beside
    it, under the plain softmax: before penalties, bias, temperature and filters. None: do not.
    """

    max_tokens: int | None = None
    stop: str | Sequence[str] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed: Allowed | None = None
    seed: int | None = None
    logprobs: int | None = None


def make_options(given: Mapping[str, Any], vocab_size: int) -> Options:
    """Options with every value checked, ``stop`` as a tuple and ``seed`` filled in.

    Raises UsageError that names the option, what it allows and what was given."""
    for name in given:
        if name not in Options._fields:
            raise UsageError(f"unknown option {name!r}: expected one of {', '.join(Options._fields)}")
    o = Options(**given)
    bias = {}
    if o.logit_bias is not None:
        if not isinstance(o.logit_bias, Mapping):
            raise UsageError(f"logit_bias must map token ids to numbers, not be {o.logit_bias!r}")
        for token, value in o.logit_bias.items():
            token = _integer("logit_bias", token, 0, vocab_size - 1, what="token id")
            bias[token] = _number("logit_bias", value, -math.inf, 1e30)
    allowed = o.allowed if o.allowed is None or callable(o.allowed) else allowed_ids(o.allowed, vocab_size)
    seed = int.from_bytes(os.urandom(8), "little") if o.seed is None else o.seed
    temperature = _number("temperature", o.temperature, 0.0, 100.0)
    if 0.0 < temperature < 0.01:
        raise UsageError(f"temperature must be 0 (greedy) or 0.01 to 100, not {temperature!r}")
    top_p = _number("top_p", o.top_p, 0.0, 1.0)
    if top_p == 0.0:
        raise UsageError("top_p must be above 0 and at most 1; for the likeliest token use temperature=0")
    repetition = _number("repetition_penalty", o.repetition_penalty, 0.0, 100.0)
    if repetition == 0.0:
        raise UsageError("repetition_penalty must be above 0 and at most 100 (1: none)")
    return Options(
        max_tokens=None if o.max_tokens is None else _integer("max_tokens", o.max_tokens, 1, 2**31 - 1),
        stop=_stop_strings(o.stop),
        temperature=temperature,
        top_k=_integer("top_k", o.top_k, 0, 2**31 - 1),
        top_p=top_p,
        min_p=_number("min_p", o.min_p, 0.0, 1.0),
        repetition_penalty=repetition,
        presence_penalty=_number("presence_penalty", o.presence_penalty, -100.0, 100.0),
        frequency_penalty=_number("frequency_penalty", o.frequency_penalty, -100.0, 100.0),
        logit_bias=bias,
        allowed=allowed,
        seed=_integer("seed", seed, 0, 2**64 - 1),
        logprobs=None if o.logprobs is None else _integer("logprobs", o.logprobs, 0, vocab_size),
    )


def allowed_ids(given: Any, vocab_size: int) -> npt.NDArray[np.uint32]:
    """Token ids of the option ``allowed`` or of what it returned, each once. Raises UsageError."""
    try:
        ids = sorted({_integer("allowed", token, 0, vocab_size - 1, what="token id") for token in given})
    except TypeError:
        raise UsageError(
            f"allowed must be token ids or a function that returns some, not {given!r}"
        ) from None
    if not ids:
        raise UsageError("allowed has no token id left: give at least one, such as the end of the turn")
    return np.array(ids, np.uint32)


def make_sampler(options: Options, vocab_size: int) -> _native.Sampler:
    """The native sampler for options that :func:`make_options` returned."""
    return _native.Sampler(
        vocab_size,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        seed=options.seed or 0,
        bias=list((options.logit_bias or {}).items()),
    )


def _integer(name: str, value: Any, low: int, high: int, what: str = "") -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise UsageError(f"{name} must be a {what or 'whole number'} from {low} to {high}, not {value!r}")
    return number


def _number(name: str, value: Any, low: float, high: float) -> float:
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:  # false for NaN
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
    return number


def _stop_strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Sequence) else (None,)
    if not all(isinstance(s, str) and s for s in strings):
        raise UsageError(f"stop must be a string or a list of strings, none of them empty, not {stop!r}")
    return strings
