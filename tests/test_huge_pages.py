"""Huge pages under memory that is there already."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
import pytest
from edgert.platforms.detect import read_text
from edgert.platforms.huge_pages import anonymous, collapse, huge_page

HUGE = 2 << 20
USED = 8 * HUGE
PATTERN = np.resize(np.arange(251, dtype=np.uint8), USED)


def huge_bytes(address: int) -> int:
    """Bytes on huge pages of the mapping that ``address`` lies in."""
    found = -1
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if ends := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = 0 if int(ends[1], 16) <= address < int(ends[2], 16) else -1
        elif found == 0 and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    return 0


def system(root: Path, enabled: str) -> Path:
    """A root directory whose settings of huge pages are these."""
    settings = root / "sys/kernel/mm/transparent_hugepage"
    settings.mkdir(parents=True)
    (settings / "enabled").write_text(enabled)
    (settings / "hpage_pmd_size").write_text(f"{HUGE}\n")
    return root


def test_a_size_where_they_are_allowed(tmp_path: Path) -> None:
    assert huge_page(system(tmp_path / "a", "always [madvise] never\n")) == HUGE
    assert huge_page(system(tmp_path / "b", "[always] madvise never\n")) == HUGE


def test_none_where_the_system_forbids_them_or_has_none(tmp_path: Path) -> None:
    never = system(tmp_path / "a", "always madvise [never]\n")
    assert huge_page(never) == collapse([], never) == 0
    assert huge_page(tmp_path / "nothing") == collapse([], tmp_path / "nothing") == 0


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells of huge pages")
def test_memory_in_use_moves_and_nothing_else_is_taken() -> None:
    kept = filled(np.frombuffer(mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8))
    before = anonymous()
    assert any(first <= kept.ctypes.data < last for first, last in before)
    values = filled(np.frombuffer(mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8))
    values[-values.ctypes.data % HUGE + 12 * HUGE] = 1  # one small page of a huge one: not worth 2 MB
    moved = collapse(before)
    assert moved <= USED  # nothing of what was there before
    assert (values[-values.ctypes.data % HUGE :][:USED] == PATTERN).all()
    assert (kept[-kept.ctypes.data % HUGE :][:USED] == PATTERN).all()
    if "[always]" in read_text(Path("/sys/kernel/mm/transparent_hugepage/enabled")):
        return  # everything was huge from the start
    # An older Linux, a machine without memory that lies together, or one that pretends to be Linux: none.
    huge = huge_bytes(values.ctypes.data)  # of both, where the system made one mapping of them
    assert USED // 2 <= huge <= USED if moved else huge == 0


def filled(values: np.ndarray) -> np.ndarray:
    values[-values.ctypes.data % HUGE :][:USED] = PATTERN
    return values
