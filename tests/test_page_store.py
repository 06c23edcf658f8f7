"""The store of KV pages (native/page_store.h) against a dict, and through every trouble a disk can make."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert import _native
from edgert.errors import EngineError

linux = pytest.mark.skipif(sys.platform != "linux", reason="finds the nameless file under /proc")
SECTIONS, SECTION = 3, 3000  # bytes; neither a section nor a page is a multiple of a disk's block
PAGE, STRIDE = SECTIONS * SECTION, 12288  # bytes of a page, and from one to the next in the file


def store(directory: Path, slots: int = 4, **options: Any) -> _native.PageStore:
    return _native.PageStore(str(directory), page_bytes=PAGE, sections=SECTIONS, slots=slots, **options)


def content(page: int, version: int = 0) -> bytes:
    return b"".join(bytes([page % 251, version % 251, s, i]) * (SECTION // 4) for i, s in enumerate(range(3)))


def section(data: bytes, index: int) -> bytes:
    return data[index * SECTION : (index + 1) * SECTION]


def fill(s: _native.PageStore, pages: int) -> None:
    for _ in range(pages):
        s.want([])
        s.seal(s.add(content(s.pages)))


def away(s: _native.PageStore) -> list[int]:
    """Pages that are on the disk only, nothing being in flight."""
    return [page for page in range(s.pages) if not s.resident(page)]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def files_of(directory: Path) -> list[Path]:
    """The nameless files of this process that were made in the directory, to be opened by these paths."""
    entries = [entry for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    return [e for e in entries if (t := os.readlink(e)).startswith(f"{directory}/") and "edgert-kv-" in t]


def damage(directory: Path, offset: int, change: bytes | None = None) -> None:
    (path,) = files_of(directory)
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        old = file.read(len(change) if change else 1)
        file.seek(offset)
        file.write(change or bytes([old[0] ^ 4]))
        os.fsync(file.fileno())


Step = tuple[str, list[int]]
steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "want", "need", "sections", "rewrite", "rewind"]),
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
    """Until all are written, which page can go depends on the writer; from then on nothing does."""
    s = store(tmp_path, slots=4)
    fill(s, 4)
    until(lambda: s.stats()["bytes_written"] == 4 * STRIDE)
    assert away(s) == []
    s.want([0])
    s.want([2])
    s.want([1, 0])
    for expected in ([3], [2, 3], [0, 2, 3]):
        fill(s, 1)
        until(lambda: s.stats()["bytes_written"] == s.pages * STRIDE)
        assert away(s) == expected
    assert s.stats()["evictions"] == 3


def test_wanted_pages_arrive_without_being_needed(tmp_path: Path) -> None:
    s = store(tmp_path, slots=6)
    fill(s, 20)
    chosen = away(s)[:5]
    until(lambda: s.stats()["bytes_written"] == 20 * STRIDE)
    s.want(chosen)
    until(lambda: all(s.resident(page) for page in chosen))
    before = s.stats()
    assert [s.need(page) for page in chosen] == [content(page) for page in chosen]
    assert s.stats() == before
    assert before["pages_read"] == 5
    assert before["read_seconds"] > 0


def test_a_slow_disk_delays_and_changes_nothing(tmp_path: Path) -> None:
    s = store(tmp_path, slots=6, read_delay_us=20_000)
    fill(s, 20)
    chosen = away(s)[:5]
    start = time.monotonic()
    s.want(chosen)
    assert time.monotonic() - start < 0.015
    assert [s.need(page) for page in chosen] == [content(page) for page in chosen]
    stats = s.stats()
    assert stats["waited_seconds"] > 0.015
    assert stats["pages_read"] == 5


def test_a_new_set_replaces_what_was_not_yet_read(tmp_path: Path) -> None:
    s = store(tmp_path, slots=12, read_delay_us=20_000)
    fill(s, 40)
    until(lambda: s.stats()["bytes_written"] == 40 * STRIDE)
    old, new = away(s)[:11], away(s)[11:22]
    s.want(old)
    s.want(new)
    assert [s.need(page) for page in new] == [content(page) for page in new]
    assert s.stats()["pages_read"] <= 11 + 4  # what four threads had begun


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


@linux
@pytest.mark.parametrize("where", range(SECTIONS))
def test_a_flipped_byte_is_found(tmp_path: Path, where: int) -> None:
    s = store(tmp_path)
    fill(s, 12)
    page, other = away(s)[:2]
    damage(tmp_path, page * STRIDE + where * SECTION + 1234)
    text = rf"page {page} of the KV cache .* section {where} is damaged, expected checksum \w{{16}}, found"
    for _ in range(2):  # also when a first try is over
        with pytest.raises(EngineError, match=text):
            s.need(page)
    with pytest.raises(EngineError, match=text):
        s.read_sections([(other, where), (page, where)])
    good = [(page, index) for index in range(SECTIONS) if index != where]
    assert s.read_sections(good) == [section(content(page), index) for _, index in good]
    assert s.need(other) == content(other)
    assert s.stats()["damaged_reads"] == 5  # twice each time for a page, once for a section
    damage(tmp_path, page * STRIDE + where * SECTION + 1234)
    s.want([])
    assert s.need(page) == content(page)


@linux
def test_a_damaged_read_in_the_background_is_tried_again(tmp_path: Path) -> None:
    s = store(tmp_path)
    fill(s, 12)
    page = away(s)[0]
    damage(tmp_path, page * STRIDE)
    s.want([page])
    until(lambda: s.stats()["damaged_reads"] == 1)
    damage(tmp_path, page * STRIDE)
    assert s.need(page) == content(page)


@linux
def test_a_page_that_lies_in_anothers_place_is_found(tmp_path: Path) -> None:
    s = store(tmp_path)
    fill(s, 12)
    first, second = away(s)[:2]
    damage(tmp_path, first * STRIDE, content(second))
    with pytest.raises(EngineError, match="damaged"):
        s.need(first)


@linux
def test_a_lost_write_is_found(tmp_path: Path) -> None:
    """The disk has the page's former content, with which nothing is wrong by itself."""
    s = store(tmp_path)
    fill(s, 12)
    page = away(s)[0]
    s.want([page])
    s.rewrite(page, content(page, 1))
    s.seal(page)
    fill(s, 8)
    until(lambda: not s.resident(page))
    damage(tmp_path, page * STRIDE, content(page, 0))
    with pytest.raises(EngineError, match="damaged"):
        s.need(page)


@linux
def test_a_file_cut_short_is_found(tmp_path: Path) -> None:
    s = store(tmp_path)
    fill(s, 12)
    first, *_, last = away(s)
    (path,) = files_of(tmp_path)
    os.truncate(path, last * STRIDE + 100)
    with pytest.raises(EngineError, match=rf"page {last} .* the file was cut short"):
        s.need(last)
    with pytest.raises(EngineError, match=rf"page {last} .* the file was cut short"):
        s.read_sections([(last, 0)])
    s.want([])
    assert s.need(first) == content(first)


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_nothing_is_lost_when_the_file_cannot_grow(tmp_path: Path) -> None:
    s = store(tmp_path, slots=4)
    with file_limit(5 * STRIDE):
        with pytest.raises(EngineError, match=r"no memory is left for page 9 .* cannot be written: File too"):
            fill(s, 20)
        assert s.pages == 9
        assert "File too large" in s.failed
        assert away(s) == [0, 1, 2, 3, 4]
        assert [s.need(page) for page in range(5, 9)] == [content(page) for page in range(5, 9)]
        assert s.read_sections([(page, 1) for page in range(9)]) == [section(content(p), 1) for p in range(9)]
        with pytest.raises(EngineError, match="no memory is left for page 0"):
            s.need(0)
        s.rewind(8)  # one slot
        s.want([])
        assert s.need(0) == content(0)
    fill(s, 10)  # there is room again
    assert s.failed == ""
    for page in range(18):
        s.want([])
        assert s.need(page) == content(page)


@linux
def test_nothing_is_lost_on_a_full_disk(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "kv", tmp_path], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        s = store(tmp_path, slots=4)
        assert s.in_memory
        with pytest.raises(EngineError, match="No space left on device; free space there"):
            fill(s, 20)
        assert s.pages == 8 + 4
        assert "No space left" in s.failed
        for page in range(12):
            assert s.read_sections([(page, 2)]) == [section(content(page), 2)]
        del s
        assert os.statvfs(tmp_path).f_bfree == os.statvfs(tmp_path).f_blocks
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_the_file_never_outgrows_its_cap(tmp_path: Path) -> None:
    s = store(tmp_path, slots=4, disk_cap_bytes=5 * STRIDE + 1)
    with pytest.raises(EngineError, match="may not outgrow 0 MiB; raise that limit"):
        fill(s, 20)
    assert s.pages == 9
    assert s.stats()["bytes_written"] == 5 * STRIDE
    assert s.failed == ""
    s.rewind(3)
    fill(s, 2)
    for page in range(5):
        s.want([])
        assert s.need(page) == content(page)


def test_a_cap_of_nothing_keeps_all_in_memory(tmp_path: Path) -> None:
    s = store(tmp_path, slots=4, disk_cap_bytes=0)
    fill(s, 4)
    with pytest.raises(EngineError, match="raise that limit"):
        fill(s, 1)
    assert [s.need(page) for page in range(4)] == [content(page) for page in range(4)]


def test_a_page_is_written_once_unless_it_changes(tmp_path: Path) -> None:
    s = store(tmp_path, slots=4)
    fill(s, 10)
    for page in range(10):
        s.want([page])
        s.need(page)
        s.seal(page)
    until(lambda: s.stats()["bytes_written"] == 10 * STRIDE)
    s.want([])
    s.rewrite(3, content(3, 9))
    s.seal(3)
    until(lambda: s.stats()["bytes_written"] == 11 * STRIDE)


def test_an_open_page_stays(tmp_path: Path) -> None:
    s = store(tmp_path, slots=4)
    fill(s, 3)
    opened = s.add(content(3))
    fill(s, 20)
    assert s.resident(opened)
    assert s.need(opened) == content(3)


def test_the_file_has_no_name_and_two_stores_share_a_directory(tmp_path: Path) -> None:
    directory = tmp_path / "made" / "here"
    a, b = store(directory), store(directory)
    fill(a, 12)
    for page in range(12):
        b.want([])
        b.seal(b.add(content(page, 77)))
    assert list(directory.iterdir()) == []
    for page in range(12):
        for s, version in ((a, 0), (b, 77)):
            s.want([])
            assert s.need(page) == content(page, version)
    if sys.platform == "linux":
        assert [path.stat().st_mode & 0o777 for path in files_of(directory)] == [0o600, 0o600]


KILLED = """
import os, sys
from edgert import _native
s = _native.PageStore(sys.argv[1], page_bytes=9000, slots=4)
for page in range(40):
    s.want([])
    s.seal(s.add(bytes(9000)))
print("full", flush=True)
s.want(range(3))
sys.stdin.read()
"""


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"full\n"
        child.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_only_empty_files_of_this_kind_are_removed(tmp_path: Path) -> None:
    """An empty one is what a process leaves that is killed between making its file and unlinking it."""
    (tmp_path / "edgert-kv-17-4711.pages").touch()
    kept = ["edgert-kv-17-4712.pages", "edgert-kv-17.gguf", "my-edgert-kv-17.pages", "edgert-kv-link.pages"]
    (tmp_path / kept[0]).write_bytes(b"something")
    for name in kept[1:3]:
        (tmp_path / name).touch()
    (tmp_path / kept[3]).symlink_to(tmp_path / kept[1])
    (tmp_path / "edgert-kv-folder.pages").mkdir()
    if os.geteuid() == 0:
        kept.append("edgert-kv-17-4713.pages")
        (tmp_path / kept[-1]).touch()
        os.chown(tmp_path / kept[-1], 12345, 12345)
    store(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "edgert-kv-folder.pages"}


def test_a_place_that_holds_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"cannot keep a file in .*/file.*choose a directory"):
        store(tmp_path / "file")
    with pytest.raises(EngineError, match="the directory cannot be made: Not a directory"):
        store(tmp_path / "file" / "below")


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
        lambda: s.read_sections([(2, 0)]),
        lambda: s.read_sections([(0, SECTIONS)]),
    ]
    for call in calls:
        with pytest.raises(EngineError, match="does not exist"):
            call()
    assert [s.need(page) for page in range(2)] == [content(page) for page in range(2)]


def threading_count() -> int:
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 0


def test_two_hundred_stores_leave_no_descriptor_and_no_thread(tmp_path: Path) -> None:
    def use() -> None:
        s = store(tmp_path, read_delay_us=1000)
        fill(s, 8)
        s.read_sections([(page, 0) for page in range(8)])
        s.want(away(s)[:3])  # in flight when the store ends

    use()
    memory = _native.allocated()
    fds, threads = (os.listdir("/dev/fd"), threading_count())
    for _ in range(200):
        use()
    assert len(os.listdir("/dev/fd")) == len(fds)
    assert threading_count() == threads
    assert _native.allocated() == memory
