"""The native sampler against a plain Python one, which sorts, and against the laws of chance."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from edgert import _native
from edgert.errors import EngineError

GAMMA = 0x9E3779B97F4A7C15
MASK = 2**64 - 1


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def gumbel(seed: int, position: int, token: int) -> float:
    state = mix((mix((seed + GAMMA) & MASK) + position * GAMMA) & MASK)
    v = ((mix((state + (token + 1) * GAMMA) & MASK) >> 12) + 0.5) / 2**52
    return -math.log(-math.log1p(-v))


def adjusted(
    logits: np.ndarray,
    prompt: Sequence[int],
    reply: Sequence[int],
    bias: Sequence[tuple[int, float]],
    **o: Any,
) -> np.ndarray:
    x = logits.astype(np.float32).copy()
    for token in {*prompt, *reply}:
        value, r = float(x[token]), o.get("repetition_penalty", 1.0)
        value = value / r if value > 0 else value * r
        count = list(reply).count(token)
        value -= o.get("frequency_penalty", 0.0) * count + (o.get("presence_penalty", 0.0) if count else 0.0)
        x[token] = np.float32(value)
    for token, value in bias:
        x[token] += np.float32(value)
    return x


def reference(
    logits: np.ndarray,
    position: int,
    *,
    prompt: Sequence[int] = (),
    reply: Sequence[int] = (),
    bias: Sequence[tuple[int, float]] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    **penalties: float,
) -> int:
    x = adjusted(logits, prompt, reply, bias, **penalties).astype(np.float64)
    order = np.lexsort((np.arange(len(x)), -x))  # by logit, ties by id
    order = order[x[order] > -math.inf]
    if temperature == 0.0:
        return int(order[0])
    if top_k:
        order = order[:top_k]
    if top_p < 1.0:
        mass = np.cumsum(np.exp((x[order] - x[order[0]]) / temperature))
        order = order[: int(np.searchsorted(mass, top_p * mass[-1])) + 1]
    if min_p:
        order = order[x[order] >= x[order[0]] + temperature * math.log(min_p)]
    return min(order.tolist(), key=lambda i: (-(x[i] / temperature + gumbel(seed, position, i)), i))


def random_logits(rng: np.random.Generator, n: int) -> np.ndarray:
    kind = rng.integers(5)
    if kind == 0:
        x = rng.normal(0, 3, n)
    elif kind == 1:  # ties everywhere
        x = rng.integers(-2, 3, n).astype(float)
    elif kind == 2:  # a few ids far above the rest
        x = rng.normal(-10, 2, n)
        x[rng.integers(n, size=5)] += 15
    elif kind == 3:  # all but equal
        x = rng.normal(0, 0.01, n)
    else:  # impossible ids among the others
        x = np.where(rng.random(n) < 0.3, -np.inf, rng.normal(0, 3, n))
        x[rng.integers(n)] = 0.0
    return x.astype(np.float32)


@pytest.mark.parametrize("n", [1, 2, 31, 255, 256, 257, 1000, 4099])
def test_same_token_as_the_reference(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(60):
        x = random_logits(rng, n)
        options: dict[str, Any] = {
            "temperature": float(rng.choice([0.0, 0.01, 0.7, 1.0, 3.0])),
            "top_k": int(rng.choice([0, 1, 5, 40, 300, 10**9])),
            "top_p": float(rng.choice([1e-9, 0.3, 0.5, 0.95, 0.9999, 1.0])),
            "min_p": float(rng.choice([0.0, 0.05, 0.5, 1.0])),
            "seed": int(rng.integers(2**63)),
            "bias": [],
        }
        prompt = rng.integers(n, size=int(rng.integers(20))).tolist()
        reply = rng.integers(n, size=int(rng.integers(20))).tolist()
        if rng.random() < 0.5:
            options["repetition_penalty"] = float(rng.choice([0.5, 1.3]))
            options["presence_penalty"] = float(rng.normal())
            options["frequency_penalty"] = float(rng.normal())
        if rng.random() < 0.3:
            options["bias"] = [(int(i), float(rng.normal(0, 3))) for i in rng.integers(n, size=4)]
        sampler = _native.Sampler(n, **options)
        sampler.observe(prompt)
        for token in reply:
            sampler.accept(token)
        position = int(rng.integers(10**6))
        expected = reference(x, position, prompt=prompt, reply=reply, **options)
        assert sampler.sample(x, position) == expected, options


def test_greedy_ties_go_to_the_lowest_id() -> None:
    x = np.zeros(1000, np.float32)
    x[[700, 300, 990]] = 5
    assert _native.Sampler(1000).sample(x, 0) == 300
    x[:] = -0.0
    x[600] = 0.0  # equal to -0.0
    assert _native.Sampler(1000).sample(x, 0) == 0


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations the statistic lies above its mean."""
    df = len(observed) - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return (statistic - df) / math.sqrt(2 * df)


def test_draws_follow_the_softmax() -> None:
    n, draws = 40, 40_000
    x = np.random.default_rng(5).normal(0, 1.0, n).astype(np.float32)
    for temperature in (0.7, 1.5):
        sampler = _native.Sampler(n, temperature=temperature, seed=11)
        counts = np.bincount([sampler.sample(x, p) for p in range(draws)], minlength=n)
        p = np.exp(x / temperature)
        assert chi_square(counts, draws * p / p.sum()) < 5
        wrong = np.exp(x / (temperature * 1.1))  # the test notices 10 % of temperature
        assert chi_square(counts, draws * wrong / wrong.sum()) > 5


@pytest.mark.parametrize("other", ["position", "seed"])
def test_neighbouring_draws_are_independent(other: str) -> None:
    n, draws = 6, 36_000
    x = np.zeros(n, np.float32)
    if other == "position":
        sampler = _native.Sampler(n, temperature=1.0, seed=3)
        tokens = [sampler.sample(x, p) for p in range(draws + 1)]
    else:
        tokens = [_native.Sampler(n, temperature=1.0, seed=s).sample(x, 7) for s in range(draws + 1)]
    pairs = np.bincount([a * n + b for a, b in itertools.pairwise(tokens)], minlength=n * n)
    assert chi_square(pairs, np.full(n * n, draws / n**2)) < 5


def test_a_filter_never_changes_who_wins_among_those_it_keeps() -> None:
    """The draw of an id does not depend on which other ids are there."""
    x = np.random.default_rng(2).normal(0, 2, 500).astype(np.float32)
    free = _native.Sampler(500, temperature=1.0, seed=9)
    cut = _native.Sampler(500, temperature=1.0, seed=9, top_k=100)
    kept = set(np.argsort(-x)[:100].tolist())
    same = [(free.sample(x, p), cut.sample(x, p)) for p in range(300)]
    assert all(a == b for a, b in same if a in kept)
    assert sum(a in kept for a, _ in same) > 150


def test_sampling_twice_is_the_same_and_changes_no_state() -> None:
    x = np.random.default_rng(0).normal(0, 1, 1000).astype(np.float32)
    before = x.copy()
    sampler = _native.Sampler(1000, temperature=1.0, seed=5, presence_penalty=1.0)
    first = [sampler.sample(x, p) for p in range(50)]
    assert [sampler.sample(x, p) for p in reversed(range(50))] == first[::-1]
    assert len(set(first)) > 10
    np.testing.assert_array_equal(x, before)
    other = _native.Sampler(1000, temperature=1.0, seed=6, presence_penalty=1.0)
    assert [other.sample(x, p) for p in range(50)] != first


def test_a_banned_token_is_never_drawn() -> None:
    x = np.zeros(4, np.float32)
    sampler = _native.Sampler(4, temperature=100.0, seed=1, bias=[(2, -math.inf)])
    assert {sampler.sample(x, p) for p in range(200)} == {0, 1, 3}


@pytest.mark.parametrize("n", [3, 256, 5000])
def test_logprobs_are_those_of_the_plain_softmax(n: int) -> None:
    x = np.random.default_rng(n).normal(0, 4, n).astype(np.float32)
    sampler = _native.Sampler(
        n, temperature=0.5, top_k=2, repetition_penalty=1.5, presence_penalty=2.0, bias=[(0, 9.0)]
    )
    sampler.accept(0)
    wide = x.astype(np.float64)
    expected = wide - wide.max() - math.log(np.exp(wide - wide.max()).sum())
    token, top = n // 2, min(n, 7)
    own, best = sampler.logprobs(x, token, top)
    # exp in float32 with a relative error of 2e-7, and x - max rounded to float32
    assert own == pytest.approx(expected[token], abs=2e-6)
    assert [i for i, _ in best] == np.argsort(-wide, kind="stable")[:top].tolist()
    assert [p for _, p in best] == pytest.approx(expected[[i for i, _ in best]].tolist(), abs=2e-6)
    assert sampler.logprobs(x, token)[1] == []


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("at", [0, 300, 511])
def test_logits_that_are_no_numbers_are_refused(bad: float, temperature: float, at: int) -> None:
    x = np.zeros(512, np.float32)
    x[at] = np.copysign(np.float32(bad), bad)
    sampler = _native.Sampler(512, temperature=temperature)
    with pytest.raises(EngineError, match=f"token {at} is"):
        sampler.sample(x, 0)
    with pytest.raises(EngineError, match=f"token {at} is"):
        sampler.logprobs(x, 0, 3)
    x[at] = 1
    assert sampler.sample(x, 0) in range(512)


def test_no_possible_token_is_refused() -> None:
    x = np.full(10, -np.inf, np.float32)
    with pytest.raises(EngineError, match="all 10 logits are -inf"):
        _native.Sampler(10, temperature=1.0).sample(x, 0)
    x[3] = 0
    with pytest.raises(EngineError, match="all 10 logits"):
        _native.Sampler(10, bias=[(3, -math.inf)]).sample(x, 0)


def test_extreme_finite_logits() -> None:
    x = np.array([3e38, -3e38, 2.9e38, 0], np.float32)
    for temperature in (0.0, 0.01, 100.0):
        assert _native.Sampler(4, temperature=temperature, top_p=0.9, min_p=0.1).sample(x, 0) == 0
    own, best = _native.Sampler(4).logprobs(x, 0, 4)
    assert own == 0.0 and best[0] == (0, 0.0)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": 1e-9},
        {"top_p": 0.0},
        {"top_p": math.nan},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"presence_penalty": math.inf},
        {"frequency_penalty": math.nan},
        {"bias": [(100, 0.0)]},
        {"bias": [(1, math.nan)]},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="sampler"):
        _native.Sampler(100, **options)


def test_wrong_arrays_and_tokens_are_refused() -> None:
    sampler = _native.Sampler(100, repetition_penalty=2.0)
    with pytest.raises(EngineError, match="expected 100 logits, found 99"):
        sampler.sample(np.zeros(99, np.float32), 0)
    with pytest.raises(TypeError):
        sampler.sample(np.zeros(100, np.float64), 0)  # no silent copy
    with pytest.raises(TypeError):
        sampler.sample(np.zeros(200, np.float32)[::2], 0)
    for call in (lambda: sampler.accept(100), lambda: sampler.observe([1, 100])):
        with pytest.raises(EngineError, match="outside the vocabulary"):
            call()


@pytest.mark.slow
def test_a_draw_from_262k_ids_is_quick() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(-5, 3, 262_144).astype(np.float32)
    limits = [
        ({}, 0.3e-3),
        ({"temperature": 0.8, "top_k": 40, "top_p": 0.95}, 1.5e-3),
        ({"temperature": 1.0}, 1.5e-3),
    ]
    for options, limit in limits:
        sampler = _native.Sampler(len(x), **options)
        times = []
        for position in range(100):
            began = time.perf_counter()
            sampler.sample(x, position)
            times.append(time.perf_counter() - began)
        assert min(times) < limit, options
