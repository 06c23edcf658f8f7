"""What memory there is for a process like this one."""

from __future__ import annotations

import os
from pathlib import Path

# Resident bytes of a process that has imported edgert with what a generation needs: CPython 3.11, x86-64
# Linux.
PYTHON_BYTES = 34_000_000
THREAD_HEAP = 64 << 20  # addresses that glibc reserves for what a thread allocates


def memory_left(threads: int) -> tuple[int, str]:
    """Bytes there are for a process like this one, with what its Python holds already, and what sets that
    limit."""
    from .platforms.detect import detect_limits, detect_memory

    found = [(detect_memory().available, "the free memory of this machine")]
    limits = detect_limits()
    if limits.memory_left is not None:
        found.append((limits.memory_left, "the memory limit of its cgroup"))
    address = _addresses_left(threads)
    if address is not None:
        found.append((address, "its address-space limit (ulimit -v)"))
    left, limit = min(found)
    return left + min(resident_bytes(), PYTHON_BYTES), limit


def resident_bytes() -> int:
    """Bytes of memory this process holds now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        import psutil

        return int(psutil.Process().memory_info().rss)


def _addresses_left(threads: int) -> int | None:
    """Without the stacks and heaps of the threads, which take addresses and hardly any memory."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit == resource.RLIM_INFINITY:
            return None
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError, ValueError, IndexError):
        return None
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    if not 0 < stack < 1 << 30:
        stack = 8 << 20
    return max(limit - used - (threads + 1) * (stack + THREAD_HEAP), 0)
