"""Huge pages under memory that is there already."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
import pytest
from edgert.platforms.huge_pages import collapse, huge_page

HUGE = 2 << 20


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
    assert huge_page(never) == collapse(never) == 0
    assert huge_page(tmp_path / "nothing") == collapse(tmp_path / "nothing") == 0


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells of huge pages")
def test_memory_in_use_moves_and_nothing_else_is_taken() -> None:
    values = np.frombuffer(mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    first, used = -values.ctypes.data % HUGE, 8 * HUGE
    filled = np.resize(np.arange(251, dtype=np.uint8), used)
    values[first : first + used] = filled
    values[first + 12 * HUGE] = 1  # one small page of a huge one: not worth 2 MB
    moved = collapse()
    huge = huge_bytes(values.ctypes.data)
    assert (values[first : first + used] == filled).all()
    # An older Linux, a machine without memory that lies together, or one that pretends to be Linux: none.
    assert used // 2 <= huge <= used if moved else huge == 0
