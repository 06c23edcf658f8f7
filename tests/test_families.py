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

from edgert import _native
from edgert.cost import kv_bytes
from edgert.engines import open_engine
from edgert.engines.base import EngineSession
from edgert.errors import EngineError, UsageError

CONTEXT = 1100  # more than the rings of window layers hold
LENGTH = 60  # several pages of the cache, and several times the longest window of the tiny models
FLOAT_TYPES = [*((name, "F32") for name in NAMES), ("llama-256", "F16"), ("llama-256", "BF16")]
# Names and types of cache: q8 wants heads of a multiple of 32 channels.
Q8 = ("llama3", "llama-256", "qwen3", "gemma3", "lfm2")
CACHES = [*((name, "f16") for name in NAMES), *((name, "q8") for name in Q8)]
QUANTISED = [
    *((name, quant) for name in NAMES for quant in ("Q8_0", "Q4_0")),
    *(("llama-256", quant) for quant in ("Q4_1", "Q5_0", "Q5_1", "MXFP4", "mixed")),
]


@contextmanager
def sessions(model: Tiny, threads: int = 2, kv: str = "f16") -> Iterator[Callable[[], EngineSession]]:
    engine = open_engine(model.path, "native", threads=threads, kv=kv)
    yield lambda: engine.session(CONTEXT)
    engine.close()


def native(model: Tiny, tokens: list[int], kv: str = "f16") -> np.ndarray:
    with sessions(model, kv=kv) as new:
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


@pytest.mark.parametrize("name", Q8)
def test_keys_and_values_in_int8(name: str) -> None:
    """A code is off by up to half a step of 1/127 of its block's largest: 0.5 % of the spread, as for int8
    activations, here once a layer. The oracle with that rounding in float64 is far closer: what is left is
    a code in ten thousand that float32 rounds to its neighbour."""
    model = tiny(name)
    tokens = prompt(model, LENGTH)
    found = native(model, tokens, "q8")
    assert rms(found, model.logits(tokens)) < 0.03
    assert rms(found, Reference(model.path, kv_type="q8").logits(tokens)) < 1e-3


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


@pytest.mark.parametrize(("name", "kv"), CACHES)
@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
def test_any_cut_of_a_sequence_gives_the_same_bits(name: str, kv: str, quant: str) -> None:
    """One call, token by token, uneven chunks, one thread: equal to the last bit."""
    model = tiny(name, quant)
    tokens = prompt(model, 150)
    with sessions(model, kv=kv) as new:
        whole = new().score(tokens).copy()
        session = new()
        single = np.stack([session.step(token).copy() for token in tokens])
        session = new()
        cuts = [0, 1, 3, 16, 17, 50, 98, 149, 150]
        chunks = np.concatenate([session.score(tokens[a:b]).copy() for a, b in pairwise(cuts)])
        assert session.length == 150
        last = new().prefill(tokens).copy()
    with sessions(model, threads=1, kv=kv) as new:
        alone = new().score(tokens).copy()
    for other in (single, chunks, alone):
        np.testing.assert_array_equal(whole, other)
    np.testing.assert_array_equal(whole[-1], last)


@pytest.mark.parametrize(("name", "kv"), CACHES)
def test_rewind_and_restore_give_the_same_bits(name: str, kv: str) -> None:
    """After a rewind (which may keep less than asked where a window or a convolution has forgotten) and
    after a restored snapshot a session goes on as if nothing had been."""
    model = tiny(name)
    tokens = prompt(model, 100)
    with sessions(model, kv=kv) as new:
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


@pytest.mark.parametrize("kv", ["f16", "q8"])
@pytest.mark.parametrize("name", ["gemma3", "lfm2"])
def test_a_ring_that_has_gone_round_gives_the_same_bits(name: str, kv: str) -> None:
    """Window layers keep three chunks of 256 here, and the sequence is longer."""
    model = tiny(name)
    tokens = prompt(model, 1000)
    with sessions(model, kv=kv) as new:
        whole = new().score(tokens).copy()
        session = new()
        session.prefill(tokens[:900])
        single = np.stack([session.step(token).copy() for token in tokens[900:]])
        np.testing.assert_array_equal(single, whole[900:])
        other = new()
        other.restore(session.snapshot())
        kept = other.rewind(980)
        np.testing.assert_array_equal(other.score(tokens[kept:]), whole[kept:])


def test_a_snapshot_of_the_other_cache_is_refused() -> None:
    model = tiny("qwen3")
    with sessions(model) as half, sessions(model, kv="q8") as small:
        for one, other in ((half, small), (small, half)):
            session = one()
            session.prefill(prompt(model, 20))
            with pytest.raises(EngineError, match="keys and values of another type"):
                other().restore(session.snapshot())


def test_heads_that_q8_cannot_hold_are_refused() -> None:
    with pytest.raises(UsageError, match=r"multiple of 32 channels, this model's have 48.*kv='f16'"):
        open_engine(tiny("mistral").path, "native", kv="q8")
    model = open_engine(tiny("mistral").path, "native")._model
    with pytest.raises(EngineError, match='not 48: use kv="f16"'):
        _native.Cache(model, 16, "q8")
    with pytest.raises(EngineError, match="unknown type of keys and values: q4"):
        _native.Cache(model, 16, "q4")


def test_q8_counts_its_bytes() -> None:
    """34 bytes for 32 values, in the cache and in what a step reads of it."""
    model = tiny("qwen3")
    with sessions(model) as half, sessions(model, kv="q8") as small:
        read = []
        for new in (half, small):
            session = new()
            session.prefill(prompt(model, 64))
            read.append(session.step_bytes)
    assert read[0] == kv_bytes(model.spec, 64, "f16")
    assert read[1] == kv_bytes(model.spec, 64, "q8") == read[0] * 34 / 64
