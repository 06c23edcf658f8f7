"""Huge pages for memory that a library has allocated and filled.

A step reads all of a model's weights once, one after the other; with pages of 4 KB the processor looks up
an address for each of them. Where a system gives huge pages only to who asks (``madvise``, the default of
most distributions), a library that does not ask has none.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from pathlib import Path

from .detect import ROOT, read_text

LEAST = 8 << 20  # smaller pieces of memory stay as they are
_SETTINGS = "sys/kernel/mm/transparent_hugepage"
_MADV_COLLAPSE = 25  # Linux 6.1


Addresses = list[tuple[int, int]]  # from, up to


def collapse(known: Addresses, root: Path = ROOT) -> int:
    """Move this process's memory to huge pages, but for what :func:`anonymous` found before, ``known``, and
    only where all small pages of one are there already, so that nothing grows. Returns the bytes that were
    moved: 0 where the system has no huge pages, forbids them or cannot do it (before Linux 6.1, or where no
    free memory lies together)."""
    size = huge_page(root)
    if not size:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    there = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
    moved = 0
    for start, end in anonymous(root):
        if end - start < LEAST:
            continue
        for at in range(-(-start // size) * size, end - size + 1, size):
            if any(first < at + size and at < last for first, last in known):
                continue
            if libc.mincore(at, size, there) or not all(page & 1 for page in there):
                continue
            if libc.madvise(at, size, _MADV_COLLAPSE) == 0:
                moved += size
            elif ctypes.get_errno() in (errno.EINVAL, errno.ENOMEM, errno.ENOSYS):
                return moved
    return moved


def huge_page(root: Path = ROOT) -> int:
    """Bytes of a huge page that processes may ask for; 0: there are none."""
    if "[never]" in read_text(root / _SETTINGS / "enabled"):
        return 0
    size = read_text(root / _SETTINGS / "hpage_pmd_size").strip()
    return int(size) if size.isdigit() else 0


def anonymous(root: Path = ROOT) -> Addresses:
    """Writable memory of this process that is no file's."""
    found: Addresses = []
    for line in read_text(root / "proc/self/maps").splitlines():
        addresses, permissions, _, _, inode, *name = line.split(maxsplit=5)
        if permissions == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
            first, _, last = addresses.partition("-")
            found.append((int(first, 16), int(last, 16)))
    return found
