"""KV heads with classes in the core: what streaming, full and indexed heads read, side by side in one layer,
and that neither threads nor cuts nor rewinding nor saving nor a disk change a bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgert.models import FAMILIES
from reference import Reference
from tiny_models import kv_types, prompt, tiny

from edgert import _native
from edgert.engines import native_spec
from edgert.errors import EngineError

INDEXED, FULL, STREAMING = 0, 1, 2
WINDOW = 40
LENGTH = 700
Heads = tuple[int, list[list[int]]]


def open_model(name: str, threads: int = 2) -> _native.Model:
    file = _native.GgufFile(str(tiny(name).path))
    return _native.Model(file, native_spec(file, file.metadata).as_dict(), threads)


def pattern(name: str, classes: list[int], window: int = WINDOW) -> Heads:
    """The classes in turn, over all KV heads that see everything."""
    rows: list[list[int]] = []
    n = 0
    for layer in tiny(name).spec.layers:
        sees_all = layer.kind == "attention" and not layer.window
        rows.append([classes[(n + i) % len(classes)] for i in range(layer.n_kv_heads if sees_all else 0)])
        n += len(rows[-1])
    return window, rows


MIXED = [STREAMING, INDEXED, FULL, STREAMING, INDEXED]


def ids_of(name: str, length: int = LENGTH) -> np.ndarray:
    return np.array(prompt(tiny(name), length), dtype=np.int32)


def cache(
    model: _native.Model, kv: str = "f16", budget: int = 30, heads: Heads = (0, []), **tier: Any
) -> _native.Cache:
    return _native.Cache(model, 4096, kv, budget, heads=heads, **tier)


def read(model: _native.Model, into: _native.Cache, ids: np.ndarray, cut: int = 256) -> np.ndarray:
    parts = [model.forward(into, ids[at : at + cut], True, full=True) for at in range(0, len(ids), cut)]
    return np.concatenate(parts)


def steps(model: _native.Model, into: _native.Cache, ids: np.ndarray) -> np.ndarray:
    return np.stack([model.forward(into, ids[i : i + 1]) for i in range(len(ids))])


def streaming_of(heads: Heads) -> frozenset[tuple[int, int]]:
    return frozenset((i, h) for i, row in enumerate(heads[1]) for h, c in enumerate(row) if c == STREAMING)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_passes_and_steps_are_the_oracles(name: str) -> None:
    """With a budget for everything, so that indexed heads read what full ones read."""
    length, stepped = 300, 12
    model, ids, heads = open_model(name), ids_of(name, length), pattern(name, MIXED)
    assert streaming_of(heads)
    for kv in kv_types(name):
        into = cache(model, kv, budget=4096, heads=heads)
        found = np.concatenate(
            [read(model, into, ids[:-stepped], 101), steps(model, into, ids[length - stepped :])]
        )
        rounding = 32 if tiny(name).quant != "F32" else 0
        kept = "q8" if kv == "q8" else np.float16
        options = {"kv_type": kept, "int8_blocks": rounding}
        expected = Reference(tiny(name).path, streaming=streaming_of(heads), window=WINDOW, **options).logits(
            ids.tolist()
        )
        everything = Reference(tiny(name).path, **options).logits(ids.tolist())
        tolerance = 0.02 * np.abs(expected).max()
        assert np.abs(found - expected).max() < tolerance
        assert np.abs(everything - expected)[WINDOW + 17 :].max() > 2 * tolerance


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_sequence_alone_decides(name: str) -> None:
    """Not threads, nor how the prompt was cut, nor what was rewound or saved."""
    ids, heads = ids_of(name), pattern(name, MIXED)
    start = LENGTH - 20
    for kv in kv_types(name):
        found: list[np.ndarray] = []
        for threads, cut in ((1, 256), (2, 100), (3, 37)):
            model = open_model(name, threads)
            into = cache(model, kv, heads=heads)
            rows = read(model, into, ids[:start], cut)
            state = into.save()
            found.append(np.concatenate([rows, steps(model, into, ids[start:])]))
            assert np.array_equal(found[0], found[-1])
        assert into.rewind(start) == start
        assert np.array_equal(found[0][start:], steps(model, into, ids[start:]))
        other = cache(model, kv, heads=heads)
        other.load(state)
        assert np.array_equal(found[0][start:], steps(model, other, ids[start:]))
        # Back by a pass, which the rings still hold.
        back = LENGTH - (30 if name == "lfm2" else 200)  # its convolutions remember less
        assert other.rewind(back) == back
        assert np.array_equal(found[0][back:start], read(model, other, ids[back:start], 64))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_streaming_steps_have_the_bits_of_a_pass(name: str) -> None:
    """At lengths around the end of the window and of the first page, and where rings have turned."""
    model, ids = open_model(name), ids_of(name, 1500)
    for kv, window in (("f16", WINDOW), ("f16", 16), ("f16", 300), *((k, 256) for k in kv_types(name)[1:])):
        heads = pattern(name, [STREAMING, FULL], window)
        passed = read(model, cache(model, kv, heads=heads), ids)
        for at in (1, window - 1, window + 10, 511, 1450):
            into = cache(model, kv, heads=heads)
            read(model, into, ids[:at])
            assert np.array_equal(passed[at : at + 20], steps(model, into, ids[at : at + 20])), (window, at)


def test_what_a_ring_forgot_is_read_again() -> None:
    model, ids = open_model("llama"), ids_of("llama", 2100)
    into = cache(model, heads=pattern("llama", [STREAMING]))
    expected = read(model, into, ids)
    assert into.rewind(2000) == 2000
    assert into.rewind(900) == 0
    assert np.array_equal(read(model, into, ids, 99), expected)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_classes_that_are_all_indexed_change_nothing(name: str) -> None:
    model, ids = open_model(name), ids_of(name)
    found = []
    for heads in ((0, []), pattern(name, [INDEXED])):
        into = cache(model, heads=heads)
        found.append(np.concatenate([read(model, into, ids[:-9]), steps(model, into, ids[-9:])]))
        size = into.nbytes, into.step_bytes
        found.append(np.array(size))
    assert np.array_equal(found[0], found[2])
    assert np.array_equal(found[1], found[3])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_full_heads_have_the_bits_of_full_attention(name: str) -> None:
    model, ids = open_model(name), ids_of(name)
    for kv in kv_types(name):
        found = []
        for into in (_native.Cache(model, 4096, kv), cache(model, kv, heads=pattern(name, [FULL]))):
            found.append(np.concatenate([read(model, into, ids[:-9]), steps(model, into, ids[-9:])]))
        assert np.array_equal(*found)


def test_streaming_heads_save_memory_and_reads() -> None:
    spec, model, length = tiny("llama").spec, open_model("llama"), 3000
    ids, heads = ids_of("llama", length), pattern("llama", [STREAMING, INDEXED])
    plain, classed = cache(model), cache(model, heads=heads)
    for into in (plain, classed):
        read(model, into, ids)
    streaming = len(streaming_of(heads))
    record, index = 4 * spec.head_dim, 8 * spec.head_dim + 256 * spec.head_dim // 4
    indexed = (length - 128) // 256 * 256
    saved = record * (length - indexed + 16 + 30) + index * indexed // 256 - record * (WINDOW + 16)
    assert plain.step_bytes - classed.step_bytes == streaming * saved
    state = len(plain.save()) - len(classed.save())
    # Whole chunks are kept of ring and cache, a chunk holds 256 tokens, and the saved index is its blocks.
    ring = 3 * 256 + 16
    assert abs(state - streaming * (record * (length - ring) + index * 11)) < streaming * record * 256


def test_the_plan_is_what_a_cache_takes() -> None:
    for name in ("llama", "gemma3", "lfm2"):
        made, model = tiny(name), open_model(name)
        sizes = _native.Sizes(_native.GgufFile(str(made.path)), made.spec.as_dict(), 2)
        for heads in (pattern(name, MIXED), pattern(name, [STREAMING])):
            into = cache(model, heads=heads)
            before = 0
            for length in (5, 600, 2000):
                read(model, into, ids_of(name, length)[before:])
                before = length
                shares, index, conv = sizes.kv(4096, length, "f16", 30, heads)
                assert into.nbytes == sum(share[1] for share in shares) + index + conv
                assert into.step_bytes == sizes.kv_step(4096, length, "f16", 30, heads)
            classes = {(share[2], share[3]) for share in shares if share[3]}
            count = [c for row in heads[1] for c in row].count
            assert classes == {(c, count(c)) for c in (INDEXED, FULL, STREAMING) if count(c)}


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
def test_a_disk_tier_holds_the_indexed_heads(name: str, tmp_path: Path) -> None:
    """Passes are those of a cache in memory; steps those of a tier with room for all."""
    classes = [INDEXED, STREAMING, FULL, INDEXED, STREAMING]
    model, ids, heads = open_model(name), ids_of(name, 2140), pattern(name, classes)
    for kv in kv_types(name):
        plain = cache(model, kv, heads=heads)
        small, slow, wide = (
            cache(model, kv, heads=heads, slots=slots, directory=str(tmp_path), read_delay_us=delay)
            for slots, delay in ((75, 0), (75, 2000), (200, 0))
        )
        expected = read(model, plain, ids[:2100])
        for into in (small, slow, wide):
            assert np.array_equal(read(model, into, ids[:2100]), expected)
        assert small.tier and small.tier["sections_read"] > 0
        state = small.save()
        walked = steps(model, small, ids[2100:])
        assert small.tier["pages_read"] > 0
        assert np.array_equal(steps(model, slow, ids[2100:]), walked)
        assert np.array_equal(steps(model, wide, ids[2100:]), steps(model, plain, ids[2100:]))
        again = cache(model, kv, heads=heads, slots=75, directory=str(tmp_path))
        again.load(state)
        assert np.array_equal(steps(model, again, ids[2100:]), walked)
        assert again.rewind(2090) == 2090
        assert np.array_equal(read(model, again, ids[2090:2100]), expected[2090:])


def test_a_tier_needs_heads_that_choose(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="heads that choose"):
        cache(open_model("llama"), heads=pattern("llama", [STREAMING]), slots=90, directory=str(tmp_path))


def test_saved_caches_are_of_their_classes() -> None:
    model = open_model("llama")
    one, other = pattern("llama", [STREAMING, INDEXED]), pattern("llama", [INDEXED, STREAMING])
    saved = cache(model, heads=one)
    read(model, saved, ids_of("llama", 100))
    for heads in (other, (0, []), (WINDOW + 1, one[1])):
        with pytest.raises(EngineError, match="classes of heads"):
            cache(model, heads=heads).load(saved.save())


@pytest.mark.parametrize(
    ("heads", "budget", "message"),
    [
        ((WINDOW, [[0, 0]]), 30, "1 layers, the model has"),
        ((15, None), 30, "at least the last 16 tokens"),
        ((WINDOW, None), 0, "for sparse attention"),
    ],
)
def test_wrong_classes_are_refused(heads: Any, budget: int, message: str) -> None:
    window, rows = heads
    rows = rows if rows is not None else pattern("gemma3", [STREAMING])[1]
    with pytest.raises(EngineError, match=message):
        cache(open_model("gemma3"), budget=budget, heads=(window, rows))


def test_classes_of_layers_with_a_window_are_refused() -> None:
    rows = [[STREAMING] * layer.n_kv_heads for layer in tiny("gemma3").spec.layers]
    with pytest.raises(EngineError, match="0 KV heads that see everything"):
        cache(open_model("gemma3"), heads=(WINDOW, rows))
    with pytest.raises(EngineError, match="unknown class"):
        cache(open_model("gemma3"), heads=(WINDOW, [[3] for _ in rows]))
