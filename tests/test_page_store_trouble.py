"""The store of KV pages through every trouble that a disk, a directory or a killed process can make."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from file_limit import file_limit
from kv_pages import (
    SECTION,
    SECTIONS,
    STRIDE,
    away,
    content,
    damage,
    descriptor_count,
    files_of,
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

linux = pytest.mark.skipif(sys.platform != "linux", reason="finds the nameless file under /proc")


@linux
@pytest.mark.parametrize("where", range(SECTIONS))
def test_a_flipped_byte_is_found(tmp_path: Path, where: int) -> None:
    s = store(tmp_path)
    page, other = spill(s, 12)[:2]
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
    page = spill(s, 12)[0]
    damage(tmp_path, page * STRIDE)
    s.want([page])
    until(lambda: s.stats()["damaged_reads"] == 1)
    damage(tmp_path, page * STRIDE)
    assert s.need(page) == content(page)


@linux
def test_a_page_that_lies_in_anothers_place_is_found(tmp_path: Path) -> None:
    s = store(tmp_path)
    first, second = spill(s, 12)[:2]
    damage(tmp_path, first * STRIDE, content(second))
    with pytest.raises(EngineError, match="damaged"):
        s.need(first)


@linux
def test_a_lost_write_is_found(tmp_path: Path) -> None:
    """The disk has the page's former content, with which nothing is wrong by itself."""
    s = store(tmp_path)
    page = spill(s, 12)[0]
    s.want([page])
    s.rewrite(page, content(page, 1))
    s.seal(page)
    fill(s, 8)
    written(s, 12 + 1 + 8)
    assert not s.resident(page)
    damage(tmp_path, page * STRIDE, content(page, 0))
    with pytest.raises(EngineError, match="damaged"):
        s.need(page)


@linux
def test_a_file_cut_short_is_found(tmp_path: Path) -> None:
    s = store(tmp_path)
    first, *_, last = spill(s, 12)
    (path,) = files_of(tmp_path)
    os.truncate(path, last * STRIDE + 100)
    with pytest.raises(EngineError, match=rf"page {last} .* the file was cut short"):
        s.need(last)
    with pytest.raises(EngineError, match=rf"page {last} .* the file was cut short"):
        s.read_sections([(last, 0)])
    s.want([])
    assert s.need(first) == content(first)


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
    written(s, 18)
    assert s.failed == ""
    for page in range(18):
        s.want([])
        assert s.need(page) == content(page)


@linux
def test_nothing_is_lost_on_a_full_disk(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "kv", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
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
    kept += ["edgert-kv-folder.pages", "edgert-kv-pipe.pages"]
    (tmp_path / kept[4]).mkdir()
    os.mkfifo(tmp_path / kept[5])
    if os.geteuid() == 0:
        kept.append("edgert-kv-17-4713.pages")
        (tmp_path / kept[-1]).touch()
        os.chown(tmp_path / kept[-1], 12345, 12345)
    store(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


def test_a_place_that_holds_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"cannot keep a file in .*/file.*choose a directory"):
        store(tmp_path / "file")
    with pytest.raises(EngineError, match="the directory cannot be made: Not a directory"):
        store(tmp_path / "file" / "below")


def test_two_hundred_stores_leave_no_descriptor_and_no_thread(tmp_path: Path) -> None:
    def use() -> None:
        s = store(tmp_path, read_delay_us=1000)
        fill(s, 8)
        s.read_sections([(page, 0) for page in range(8)])
        s.want(away(s)[:3])  # in flight when the store ends

    use()
    memory = _native.allocated()
    fds, threads = descriptor_count(), threading_count()
    for _ in range(200):
        use()
    assert descriptor_count() == fds
    assert threading_count() == threads
    assert _native.allocated() == memory
