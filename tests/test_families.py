"""The native engine on random models of every family: logits against transformers in float32, and
the same bits however a sequence is cut into calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
from reference import Reference
from tiny_models import NAMES, Tiny, prompt, tiny

from edgert.engines import open_engine
from edgert.engines.base import EngineSession

CONTEXT = 256
LENGTH = 60  # several pages of the cache, and several times the longest window of the tiny models
FLOAT_TYPES = [*((name, "F32") for name in NAMES), ("llama-256", "F16"), ("llama-256", "BF16")]
QUANTISED = [
    *((name, quant) for name in NAMES for quant in ("Q8_0", "Q4_0")),
    *(("llama-256", quant) for quant in ("Q4_1", "Q5_0", "Q5_1", "MXFP4", "mixed")),
]


@contextmanager
def sessions(model: Tiny, threads: int = 2) -> Iterator[Callable[[], EngineSession]]:
    engine = open_engine(model.path, "native", threads=threads)
    yield lambda: engine.session(CONTEXT)
    engine.close()


def native(model: Tiny, tokens: list[int]) -> np.ndarray:
    with sessions(model) as new:
        return new().score(tokens).copy()


def largest(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def rms(found: np.ndarray, expected: np.ndarray) -> float:
    """Root of the mean square of the difference, relative to that of the logits."""
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


@pytest.mark.parametrize(("name", "quant"), FLOAT_TYPES)
def test_float_weights(name: str, quant: str) -> None:
    """With float weights the one coarse rounding is that of keys and values to float16, 2^-11 = 5e-4 each,
    which a few layers with a gain above one amplify; seen: up to 1.7e-3. The oracle with the same rounding
    is ten times closer."""
    model = tiny(name, quant)
    tokens = prompt(model, LENGTH)
    found = native(model, tokens)
    assert largest(found, model.logits(tokens)) < 5e-3
    assert largest(found, Reference(model.path, kv_type=np.float16).logits(tokens)) < 5e-4


@pytest.mark.parametrize(("name", "quant"), QUANTISED)
def test_quantised_weights(name: str, quant: str) -> None:
    """Weights are exact here (transformers has them dequantised); activations are rounded to int8 in
    blocks of 32. A block's largest value is about 2.1 times its spread, so a step is 1.7 % of the spread
    and its error 0.5 % (a step / sqrt 12) for each matrix product. Some ten of them in a row, in random
    networks that double an error in a layer or two, give 2 to 4 % (llama.cpp, which rounds alike: the
    same)."""
    model = tiny(name, quant)
    tokens = prompt(model, LENGTH)
    assert rms(native(model, tokens), model.logits(tokens)) < 0.06


@pytest.mark.parametrize(("name", "quant"), QUANTISED)
def test_quantised_weights_differ_by_the_rounding_of_activations_alone(name: str, quant: str) -> None:
    """The oracle with that rounding gives the same logits to 1e-4. Now and then a value lies so near the
    middle of two int8 codes that float32 and float64 round it differently, and the two part for the rest
    of the prompt; so this asks for a quarter of 24 short prompts."""
    model = tiny(name, quant)
    oracle = Reference(model.path, kv_type=np.float16, int8_blocks=32)
    differences = []
    with sessions(model) as new:
        for seed in range(24):
            tokens = prompt(model, 3, seed)
            differences.append(rms(new().score(tokens), oracle.logits(tokens)))
    assert sorted(differences)[6] < 1e-4, sorted(differences)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
def test_any_cut_of_a_sequence_gives_the_same_bits(name: str, quant: str) -> None:
    """One call, token by token, uneven chunks, one thread: equal to the last bit."""
    model = tiny(name, quant)
    tokens = prompt(model, 150)
    with sessions(model) as new:
        whole = new().score(tokens).copy()
        session = new()
        single = np.stack([session.step(token).copy() for token in tokens])
        session = new()
        cuts = [0, 1, 3, 16, 17, 50, 98, 149, 150]
        chunks = np.concatenate([session.score(tokens[a:b]).copy() for a, b in pairwise(cuts)])
        assert session.length == 150
        last = new().prefill(tokens).copy()
    with sessions(model, threads=1) as new:
        alone = new().score(tokens).copy()
    for other in (single, chunks, alone):
        np.testing.assert_array_equal(whole, other)
    np.testing.assert_array_equal(whole[-1], last)


@pytest.mark.parametrize("name", NAMES)
def test_rewind_and_restore_give_the_same_bits(name: str) -> None:
    """After a rewind (which may keep less than asked where a window or a convolution has forgotten) and
    after a restored snapshot a session goes on as if nothing had been."""
    model = tiny(name)
    tokens = prompt(model, 100)
    with sessions(model) as new:
        whole = new().score(tokens).copy()
        session = new()
        session.prefill(tokens[:70])
        kept = session.rewind(64)
        assert 0 <= kept <= 64
        assert session.length == kept
        np.testing.assert_array_equal(session.score(tokens[kept:]), whole[kept:])
        session = new()
        session.prefill(tokens[:70])
        other = new()
        other.restore(session.snapshot())
        assert other.length == 70
        np.testing.assert_array_equal(other.score(tokens[70:]), whole[70:])
