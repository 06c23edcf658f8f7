"""Measuring this machine: what `edgert doctor` runs and `edgert.machine` keeps."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import IO, TYPE_CHECKING

from . import _native
from .engines import KV_TYPES
from .errors import EngineError
from .locate import cache_dir
from .machine import DiskRead, Measured, attend_key, engine_refuses, isa, machine_key

if TYPE_CHECKING:
    from .platforms.detect import Machine

# The doctor promises 15 seconds in all. Each probe runs twice and the better one counts; after TWICE seconds
# there is no second run, which many thread counts or a slow machine would not leave time for.
TWICE = 7.5
READ_SECONDS = 0.25
KERNEL_SECONDS = 0.05
DISK_SECONDS = 0.2

TYPES = ("Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q6_K", "Q8_0", "F16")
TOKENS = (1, 8, 64)
HEAD_DIMS = (64, 128, 256)
GROUPS = (1, 2, 4, 8)
REQUESTS = (16 << 10, 64 << 10, 256 << 10, 1 << 20)
DEPTHS = (1, 8)

LEAST_MEMORY = 320 << 20  # reading takes 256 MiB; a cgroup kills who takes more than it allows
DISK_FILE = 256 << 20
DISK_PIECE = 4 << 20
WRITE_SECONDS = 2.0  # an SD card gets a smaller file
LEAST_FREE = 1 << 30


def probe(machine: Machine, progress: Callable[[str], None]) -> Measured:
    """Measure ``machine``, which is this one. Raises EngineError when it grants no memory or threads."""
    if machine.limits.memory is not None and machine.available_memory < LEAST_MEMORY:
        raise EngineError(
            f"the doctor needs {LEAST_MEMORY >> 20} MiB of memory to measure with, and the cgroup of this "
            f"process leaves {machine.available_memory >> 20} MiB; allow it more"
        )
    level, threads = isa(), machine.threads
    meter = _Meter(machine.limits.cpus)
    read: dict[int, float] = {}
    for n in thread_counts(machine):
        progress(f"memory, {n} thread{'s' if n > 1 else ''}")
        read[n] = meter.best(n, _native.probe_read_bandwidth, n, READ_SECONDS)
        meter.settle()
    matmul: dict[str, dict[int, float]] = {}
    attend: dict[str, float] = {}
    fp32 = 0.0
    if not engine_refuses():

        def weights(name: str, tokens: int) -> float:
            total = meter.best(threads, _native.probe_matmul, name, tokens, threads, KERNEL_SECONDS)
            return total / threads

        for name in TYPES:
            progress(f"arithmetic, {name}")
            matmul[name] = {tokens: weights(name, tokens) for tokens in TOKENS}
        fp32 = weights("F32", TOKENS[-1]) * TOKENS[-1]
        progress("attention")
        for kv, dim, group in product(KV_TYPES, HEAD_DIMS, GROUPS):
            total = meter.best(threads, _native.probe_attend, kv, dim, group, threads, KERNEL_SECONDS)
            attend[attend_key(kv, dim, group)] = total / threads
        meter.settle()
    disk, note = probe_disk(cache_dir(), progress)
    return Measured(
        read, matmul, attend, fp32, disk, note, level, threads, meter.share, int(time.time()), machine_key()
    )


def thread_counts(machine: Machine) -> list[int]:
    """1, powers of two, a thread a core, and all processors that this process may use at once."""
    most = min(machine.cpu.usable, math.ceil(machine.limits.cpus or machine.cpu.usable), 1024)
    return sorted({1, machine.threads, most, *(2**i for i in range(1, most.bit_length()) if 2**i < most)})


class _Meter:
    """Runs probes, and finds the share of the processors' time that they were given (of what ``quota``
    allows, in CPUs): below 1, other processes were busy."""

    def __init__(self, quota: float | None) -> None:
        self.share = 1.0
        self._quota = quota
        self._until = time.monotonic() + TWICE
        self._given = self._wanted = 0.0

    def best(self, threads: int, call: Callable[..., float], *args: object) -> float:
        """The better of two runs; the share is of the one that was given more."""
        rate, runs = 0.0, []
        for _ in range(2):
            wall, cpu = time.perf_counter(), time.process_time()
            rate = max(rate, call(*args))
            wanted = min(threads, self._quota or threads) * (time.perf_counter() - wall)
            runs.append((min((time.process_time() - cpu) / wanted, 1.0), wanted))
            if time.monotonic() > self._until:
                break
        share, wanted = max(runs)
        self._given += share * wanted
        self._wanted += wanted
        return rate

    def settle(self) -> None:
        """Count the runs since the last call as one measurement: single ones are too short to judge."""
        self.share = min(self.share, self._given / self._wanted)
        self._given = self._wanted = 0.0


def probe_disk(directory: Path, progress: Callable[[str], None]) -> tuple[tuple[DiskRead, ...], str]:
    """Random reads from the disk that ``directory`` is on, and a sentence when there is something to say
    about them. The file has no name, so that nothing stays behind however this ends."""
    progress("disk")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(directory).free < LEAST_FREE:
            return (), f"The disk was not measured: less than 1 GiB is free in {directory}."
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            _fill(file)
            path, rows, direct = f"/dev/fd/{file.fileno()}", [], True
            for request, depth in product(REQUESTS, DEPTHS):
                rate, direct = _native.probe_disk(path, request, depth, DISK_SECONDS)
                rows.append(DiskRead(request, depth, rate))
    except OSError as error:
        return (), f"The disk was not measured: {directory} cannot be written ({error.strerror or error})."
    except EngineError as error:
        return (), f"The disk was not measured: {error}."
    if direct:
        return tuple(rows), ""
    return tuple(rows), (
        f"The file system of {directory} has no direct reads: the disk was measured through the page cache, "
        "emptied before each read, which is less exact."
    )


def _fill(file: IO[bytes]) -> None:
    """Random bytes (a disk may compress) that have reached the disk."""
    piece = os.urandom(DISK_PIECE)
    until = time.monotonic() + WRITE_SECONDS
    for _ in range(DISK_FILE // DISK_PIECE):
        file.write(piece)
        os.fsync(file.fileno())
        if time.monotonic() > until:
            return
