"""A working set whose store is partly on a disk: what is read, and how, and what befalls a disk."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from kv_pages import damage, files_of
from onnx_directories import exported
from tier_runs import on_disk
from tiny_models import prompt, tiny

from edgert import _native
from edgert.engines.onnx import OnnxEngine
from edgert.engines.onnx_sparse import LEAST_SLOTS, PAGE, WorkingSet
from edgert.engines.onnx_sparse_session import SparseSession
from edgert.errors import EngineError
from edgert.onnx_directory import OnnxDirectory
from edgert.tier import IN_MEMORY, Tier

READ, STEPS = 1700, 40
FEWEST = 68  # pages in memory
ALIGNED = 4096  # bytes


def session(tier: Tier, kv: str = "f32") -> SparseSession:
    made = OnnxEngine(
        OnnxDirectory.open(exported("llama", "f32", kv=kv)), threads=2, slots=LEAST_SLOTS, tier=tier
    )
    made.spec = made.spec.__class__(**{**vars(made.spec), "context_length": 4096})
    opened = made.session(2000)
    assert isinstance(opened, SparseSession)
    return opened


@functools.cache
def expected(kv: str) -> np.ndarray:
    """Logits of the steps when all is in memory."""
    tokens = prompt(tiny("llama"), READ + STEPS)
    here = session(IN_MEMORY, kv)
    here.prefill(tokens[:READ])
    return np.stack([here.step(token).copy() for token in tokens[READ:]])


def filled(directory: Path, kv: str, pages: int = 120) -> WorkingSet:
    """All in slots, and in a store that is larger than its memory."""
    rng = np.random.default_rng(0)
    made = WorkingSet(onnxruntime, tiny("llama").spec, kv, 3000, LEAST_SLOTS, 2, Tier(FEWEST, str(directory)))
    made.whole(PAGE * pages)
    for buffer in made.buffers.values():
        buffer.read()[:] = rng.normal(size=buffer.read().shape)
    made.append(0, PAGE * pages, np.zeros((0, made.query_width), np.float32))
    return made


def pages_of(made: WorkingSet, page: int) -> dict[str, np.ndarray]:
    at = slice(PAGE * page, PAGE * page + PAGE)
    return {name: buffer.read()[:, :, at].copy() for name, buffer in made.buffers.items()}


def read(made: WorkingSet, pages: list[int], first: int = 0) -> float:
    """To the places from ``first`` on; returns how many came from the disk."""
    assert made.tier
    before = made.tier["pages_read"]
    made._store.read(pages, made._slots, list(range(first, first + len(pages))))
    return made.tier["pages_read"] - before


@pytest.mark.parametrize("kv", ["f32", "f16"])
def test_a_page_is_one_request_and_has_its_bits(kv: str) -> None:
    with on_disk() as directory:
        made = filled(directory, kv)
        before = {page: pages_of(made, page) for page in range(40)}
        made._store.expect(list(range(1, 40)))
        assert read(made, list(range(1, 40)), 60) <= 39  # some were read when they were expected
        tier = made.tier
        assert tier and tier["pages_read"] >= 39
        assert tier["sections_read"] == 0
        assert tier["bytes_read"] / tier["pages_read"] % ALIGNED == 0
        for page in range(1, 40):
            for name, values in pages_of(made, 59 + page).items():
                rounded = before[page][name].astype(np.float16).astype(values.dtype)
                np.testing.assert_array_equal(values, rounded)


@pytest.mark.parametrize("kv", ["f32", "f16"])
def test_a_page_that_left_slots_comes_back_without_the_disk(kv: str) -> None:
    with on_disk() as directory:
        made = filled(directory, kv)
        before = pages_of(made, 20)

        def take_its_memory() -> None:
            for _ in range(2):
                assert read(made, [*range(1, 20), *range(21, 100)], 10) > 30

        take_its_memory()
        assert read(made, [20], 5) == 1
        take_its_memory()
        assert read(made, [20], 5) == 1
        take_its_memory()
        made._store.keep([20, 0, 119], made._slots, [5, 0, 119])
        assert read(made, [20], 7) == 0
        for name, values in pages_of(made, 7).items():
            np.testing.assert_array_equal(values, before[name].astype(np.float16).astype(values.dtype))


def test_what_has_no_place_or_does_not_exist_is_refused() -> None:
    with on_disk() as directory:
        made = filled(directory, "f32")
        for call in (
            lambda: made._store.read([120], made._slots, [0]),
            lambda: made._store.read([1], made._slots, [120]),
            lambda: made._store.read([1, 2], made._slots, [0]),
            lambda: made._store.keep([120], made._slots, [0]),
            lambda: made._store.expect([120]),
        ):
            with pytest.raises(EngineError):
                call()


@pytest.mark.parametrize("kv", ["f32", "f16"])
def test_a_slow_disk_gives_the_same_bits(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = functools.partial(_native.SlotStore, read_delay_us=2000)
    monkeypatch.setattr("edgert.engines.onnx_sparse._native.SlotStore", slow)
    tokens = prompt(tiny("llama"), READ + STEPS)
    with on_disk() as directory:
        here = session(Tier(FEWEST, str(directory)), kv)
        here.prefill(tokens[:READ])
        found = np.stack([here.step(token).copy() for token in tokens[READ:]])
        assert here.tier and here.tier["waited_seconds"] > 2e-3
        here.close()
    np.testing.assert_array_equal(found, expected(kv))


def test_a_prompt_with_pages_on_the_disk_reads_each_once() -> None:
    tokens = prompt(tiny("llama"), READ + 50)
    with on_disk() as directory:
        here, everything = session(Tier(FEWEST, str(directory))), session(IN_MEMORY)
        for each in (here, everything):
            each.prefill(tokens[:READ])
        found, right = (each.prefill(tokens[READ:]).copy() for each in (here, everything))
        assert here.tier
        assert READ // PAGE - FEWEST <= here.tier["pages_read"] <= READ // PAGE - FEWEST + 32
        here.close()
    np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds the nameless file under /proc")
def test_a_page_that_came_back_damaged_is_never_seen(cut: bool) -> None:
    """The step ends with an error, the sequence is what it was, and read again it is right."""
    tokens = prompt(tiny("llama"), READ + STEPS)
    with on_disk() as directory:
        here = session(Tier(FEWEST, str(directory)))
        here.prefill(tokens[:READ])
        (path,) = files_of(directory)
        if cut:
            with path.open("r+b") as file:
                file.truncate(ALIGNED)
        else:
            for at in range(1000, path.stat().st_size, ALIGNED):
                damage(directory, at)
        # What is written later makes a file that was cut as long again, with nothing in between.
        found_bad = "cut short|is damaged" if cut else "is damaged, expected checksum"
        with pytest.raises(EngineError, match=found_bad) as caught:
            for token in tokens[READ:]:
                here.step(token)
        assert "check the disk, choose a directory on another one, or allow more memory" in str(caught.value)
        assert READ <= here.length < READ + STEPS
        here.rewind(0)
        here.prefill(tokens[:READ])
        found = np.stack([here.step(token).copy() for token in tokens[READ:]])
        here.close()
    np.testing.assert_array_equal(found, expected("f32"))


def test_a_full_disk_takes_nothing_that_memory_has_room_for() -> None:
    """Steps go on with pages that cannot be written in memory, and end when a new one finds no place."""
    tokens = prompt(tiny("llama"), READ + 200)
    spec = tiny("llama").spec
    page = 2 * 2 * PAGE * sum(layer.n_kv_heads for layer in spec.layers) * spec.head_dim
    written = READ // PAGE - FEWEST + 4
    with on_disk() as directory:
        stride = -(-page // ALIGNED) * ALIGNED
        here = session(Tier(FEWEST, str(directory), written * stride))
        here.prefill(tokens[:READ])
        found = []
        with pytest.raises(EngineError, match=r"may not outgrow .*raise that limit"):
            for token in tokens[READ:]:
                found.append(here.step(token).copy())
        assert 20 < len(found) < 200
        assert here.length == READ + len(found)
        here.close()
    np.testing.assert_array_equal(np.stack(found[:STEPS]), expected("f32")[: len(found)])


class Watched:
    """A store that tells how many pages came from the disk while slots were filled, and which it kept."""

    def __init__(self, store: Any) -> None:
        self._store, self.in_steps, self.kept = store, 0, set[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, *of: Any) -> None:
        before = self._store.tier["pages_read"]
        self._store.read(*of)
        self.in_steps += self._store.tier["pages_read"] - before

    def keep(self, pages: list[int], *of: Any) -> None:
        self._store.keep(pages, *of)
        self.kept |= set(pages)


def test_pages_are_read_when_a_step_ends_and_kept_when_they_leave() -> None:
    tokens = prompt(tiny("llama"), READ + STEPS)
    with on_disk() as directory:
        here = session(Tier(FEWEST, str(directory)))
        here.prefill(tokens[:READ])
        here.step(tokens[READ])
        store = Watched(here.working_set._store)
        here.working_set._store = store  # type: ignore[assignment]
        before, left = store.tier["pages_read"], set[int]()
        for token in tokens[READ + 1 :]:
            pages = set(here.working_set.pages)
            here.step(token)
            left |= pages - set(here.working_set.pages)
            time.sleep(0.01)  # as if something were done with its logits
        assert store.in_steps < (store.tier["pages_read"] - before) / 2
        assert left and left == store.kept
        here.close()
