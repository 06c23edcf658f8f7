"""The store of KV pages (native/page_store.h) against a dict, and what it reads and writes when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_pages import (
    SECTIONS,
    away,
    content,
    fill,
    section,
    spill,
    store,
    threading_count,
    until,
    written,
)

from edgert import _native
from edgert.errors import EngineError

Step = tuple[str, list[int]]
steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "want", "need", "refill", "sections", "rewrite", "rewind"]),
        st.lists(st.integers(0, 2**16), min_size=1, max_size=5),
    ),
    max_size=60,
)


def run_steps(directory: Path, script: list[Step], slots: int, delay_us: int) -> list[bytes]:
    """What a caller sees of random steps that never ask for more than there are slots."""
    oracle: list[bytes] = []
    seen = []
    s = store(directory, slots, read_delay_us=delay_us)
    for number, (kind, numbers) in enumerate(script):
        chosen = [n % len(oracle) for n in numbers] if oracle else []
        s.want(chosen[: slots - 1] if kind == "want" else [])
        if kind == "add":
            oracle.append(content(len(oracle), number))
            assert s.add(oracle[-1]) == len(oracle) - 1
            s.seal(len(oracle) - 1)
        elif kind in ("want", "need"):
            for page in chosen[: slots - 1]:
                seen.append(s.need(page))
                assert seen[-1] == oracle[page]
        elif kind == "refill":
            for page in chosen:
                s.refill(page, oracle[page])
        elif kind == "sections":
            places = [(page, n % SECTIONS) for page, n in zip(chosen, numbers, strict=False)]
            found = s.read_sections(places)
            assert found == [section(oracle[page], index) for page, index in places]
            seen += found
        elif kind == "rewrite" and oracle:
            oracle[chosen[0]] = content(chosen[0], number)
            s.rewrite(chosen[0], oracle[chosen[0]])
            s.seal(chosen[0])
        elif kind == "rewind" and oracle:
            del oracle[chosen[0] :]
            s.rewind(chosen[0])
    assert s.pages == len(oracle)
    for page, data in enumerate(oracle):
        s.want([page])
        assert s.need(page) == data
    assert s.stats()["damaged_reads"] == 0
    return seen


@settings(max_examples=150, deadline=None)
@given(script=steps, slots=st.integers(2, 6))
def test_any_steps_give_what_was_put_in(
    tmp_path_factory: pytest.TempPathFactory, script: list[Step], slots: int
) -> None:
    directory = tmp_path_factory.getbasetemp() / "kv"
    assert run_steps(directory, script, slots, 0) == run_steps(directory, script, slots, 200)


def test_what_fits_in_memory_never_touches_the_disk(tmp_path: Path) -> None:
    s = store(tmp_path, slots=100)
    threads = threading_count()
    fill(s, 60)
    assert [s.need(page) for page in range(60)] == [content(page) for page in range(60)]
    assert s.stats()["bytes_written"] == s.stats()["bytes_read"] == 0
    assert threading_count() == threads


def test_the_longest_unwanted_page_goes_first(tmp_path: Path) -> None:
    """While pages wait to be written, which of them can go depends on the disk; here nothing does."""
    s = store(tmp_path, slots=4)
    assert spill(s, 4) == []
    s.want([0])
    s.want([2])
    s.want([1, 0])
    for expected in ([3], [2, 3], [0, 2, 3]):
        fill(s, 1)
        written(s, s.pages)
        assert away(s) == expected
    assert s.stats()["evictions"] == 3


def test_wanted_pages_arrive_without_being_needed(tmp_path: Path) -> None:
    s = store(tmp_path, slots=6)
    chosen = spill(s, 20)[:5]
    s.want(chosen)
    until(lambda: all(s.resident(page) for page in chosen))
    before = s.stats()
    assert [s.need(page) for page in chosen] == [content(page) for page in chosen]
    assert s.stats() == before
    assert before["pages_read"] == 5
    assert before["read_seconds"] > 0


@pytest.mark.alone
def test_a_slow_disk_delays_and_changes_nothing(tmp_path: Path) -> None:
    s = store(tmp_path, slots=6, read_delay_us=100_000)
    chosen = spill(s, 20)[:5]
    start = time.monotonic()
    s.want(chosen)
    assert time.monotonic() - start < 0.08
    assert [s.need(page) for page in chosen] == [content(page) for page in chosen]
    stats = s.stats()
    assert stats["waited_seconds"] > 0.05
    assert stats["pages_read"] == 5


def test_a_new_set_replaces_what_was_not_yet_read(tmp_path: Path) -> None:
    s = store(tmp_path, slots=12, read_delay_us=20_000)
    gone = spill(s, 40)
    old, new = gone[:11], gone[11:22]
    s.want(old)
    s.want(new)
    assert [s.need(page) for page in new] == [content(page) for page in new]
    assert s.stats()["pages_read"] <= 11 + 4  # what four threads had begun


def test_a_page_that_the_caller_has_is_not_read(tmp_path: Path) -> None:
    s = store(tmp_path, slots=4)
    gone = spill(s, 20)
    s.want([])
    assert s.refill(gone[0], content(gone[0]))
    assert not s.refill(gone[0], content(gone[0]))  # it is in memory
    s.want([gone[0]])
    assert s.need(gone[0]) == content(gone[0])
    assert s.stats()["pages_read"] == 0
    s.want([gone[1], gone[2], gone[3], gone[4]])
    assert not s.refill(gone[5], content(gone[5]))  # no slot is free
    assert [s.need(page) for page in gone[1:5]] == [content(page) for page in gone[1:5]]


def test_many_threads_need_the_same_pages(tmp_path: Path) -> None:
    s = store(tmp_path, slots=10, read_delay_us=500)
    fill(s, 40)
    wrong: list[int] = []
    for step in range(10):
        chosen = [(step * 7 + i * 3) % 40 for i in range(9)]
        s.want(chosen[::2])

        def work(shift: int, chosen: list[int] = chosen) -> None:
            for page in chosen[shift:] + chosen[:shift]:
                if s.need(page) != content(page):
                    wrong.append(page)

        threads = [threading.Thread(target=work, args=(shift,)) for shift in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert wrong == []
    assert s.stats()["pages_read"] <= 90


def test_a_set_larger_than_memory_is_refused(tmp_path: Path) -> None:
    s = store(tmp_path, slots=3)
    fill(s, 8)
    s.want([0, 1, 2, 3])
    with pytest.raises(EngineError, match=r"all 3 that memory holds belong to the set"):
        for page in range(4):
            s.need(page)
    s.want([3])
    assert s.need(3) == content(3)


def test_a_page_is_written_once_unless_it_changes(tmp_path: Path) -> None:
    s = store(tmp_path, slots=4)
    fill(s, 10)
    for page in range(10):
        s.want([page])
        s.need(page)
        s.seal(page)
    written(s, 10)
    s.want([])
    s.rewrite(3, content(3, 9))
    s.seal(3)
    written(s, 11)


def test_an_open_page_stays(tmp_path: Path) -> None:
    s = store(tmp_path, slots=4)
    fill(s, 3)
    opened = s.add(content(3))
    fill(s, 20)
    assert s.resident(opened)
    assert s.need(opened) == content(3)


@pytest.mark.parametrize(("page_bytes", "sections", "slots"), [(0, 1, 1), (10, 3, 1), (10, 0, 1), (10, 2, 0)])
def test_a_shape_that_makes_no_sense_is_refused(
    tmp_path: Path, page_bytes: int, sections: int, slots: int
) -> None:
    with pytest.raises(EngineError, match=r"equal size|at least 1 page"):
        _native.PageStore(str(tmp_path), page_bytes=page_bytes, sections=sections, slots=slots)


def test_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    s = store(tmp_path)
    fill(s, 2)
    calls: list[Callable[[], object]] = [
        lambda: s.need(2),
        lambda: s.want([0, 2]),
        lambda: s.seal(2),
        lambda: s.refill(2, content(2)),
        lambda: s.read_sections([(2, 0)]),
        lambda: s.read_sections([(0, SECTIONS)]),
    ]
    for call in calls:
        with pytest.raises(EngineError, match="does not exist"):
            call()
    assert [s.need(page) for page in range(2)] == [content(page) for page in range(2)]
