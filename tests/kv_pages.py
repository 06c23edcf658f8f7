"""A small page store, what its pages hold, and damage to its file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgert import _native

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


def spill(s: _native.PageStore, pages: int) -> list[int]:
    """Fills an empty store with more pages than it has slots, waits until all are written, and returns those
    that are on the disk only."""
    fill(s, pages)
    written(s, pages)
    return away(s)


def written(s: _native.PageStore, pages: int) -> None:
    until(lambda: s.stats()["bytes_written"] == pages * STRIDE)


def away(s: _native.PageStore) -> list[int]:
    return [page for page in range(s.pages) if not s.resident(page)]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def files_of(directory: Path) -> list[Path]:
    """The nameless files of this process that were made in the directory, to be opened by these paths."""
    entries = [entry for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    return [e for e in entries if str(e.readlink()).startswith(f"{directory}/edgert-kv-")]


def damage(directory: Path, offset: int, change: bytes | None = None) -> None:
    (path,) = files_of(directory)
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        old = file.read(len(change) if change else 1)
        file.seek(offset)
        file.write(change or bytes([old[0] ^ 4]))
        os.fsync(file.fileno())


def descriptor_count() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def threading_count() -> int:
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 0
