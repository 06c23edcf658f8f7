"""How fast a machine is, as the planner asks it: measured here by the doctor, or from a platform file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from .machine import DiskRead, Measured, attend_key, board, load_measured
from .platforms.board import Platform

# Share of a core's best rate that the kernels reach, as they did on an AMD EPYC with AVX-512 VNNI: of int8
# with one token at a time, with many at once, and of fp32 in attention.
DECODE_SHARE = 0.30
PREFILL_SHARE = 0.45
ATTEND_SHARE = 0.35
# Seconds that a meeting of all threads costs, and a token in Python and in the sampler.
BARRIER = 1.5e-6
TOKEN = 150e-6
# Bytes a second that a thread reads of small pieces that lie anywhere, whatever memory could give.
SCATTERED = 10e9
# The kernels read ahead better than the doctor's probe, which adds up one stretch.
READS = 1.25
PAGE_READS, SECTION_READS = 4, 16  # that the KV store has in flight at once, of whole pages and of parts
MANY = 64  # tokens at once in the doctor's measurement of prefill


@dataclass(frozen=True)
class Rates:
    """Rates a second of ``threads`` threads together. ``name`` is the machine's; ``measured`` says whether
    its arithmetic was measured (by the doctor, here) or follows from its platform file. ``bandwidth`` is
    what they read from memory, ``lanes`` the floats of a vector at the ISA level used, ``disk`` what its
    disk gives (the first of a platform file's)."""

    name: str
    measured: bool
    threads: int
    lanes: int
    bandwidth: float
    usable_memory: int
    matmul: Mapping[str, Mapping[int, float]] = field(repr=False)
    attend: Mapping[str, float] = field(repr=False)
    int8: float  # multiply-adds, for weight types that were not measured
    fp32: float
    disk: tuple[DiskRead, ...] = field(repr=False)

    def weights(self, kind: str, tokens: int) -> float:
        """Weights of GGML type ``kind`` a second, each multiplied with all of ``tokens`` tokens."""
        table = self.matmul.get(kind)
        if table:
            nearest = min(table, key=lambda n: abs(n - tokens))
            return table[nearest] * nearest / tokens * self.threads
        if kind in ("F32", "F16", "BF16"):
            return self.fp32 * ATTEND_SHARE / tokens
        return self.int8 * (DECODE_SHARE if tokens == 1 else PREFILL_SHARE) / tokens

    def pairs(self, kv: str, head_dim: int, group: int) -> float:
        """Query heads times positions a second in attention; ``group`` heads share keys and values."""
        sizes = [tuple(map(int, key.split()[1].split("x"))) for key in self.attend if key.startswith(kv)]
        if sizes:  # a pair costs what its head is wide
            dim, rows = min(sizes, key=lambda size: (abs(size[1] - group), abs(size[0] - head_dim)))
            return self.attend[attend_key(kv, dim, rows)] * dim / head_dim * self.threads
        return self.fp32 * ATTEND_SHARE / (2 * head_dim)

    def disk_seconds(self, requests: float, size: int, at_once: int) -> float:
        """Of reading ``requests`` pieces of ``size`` bytes that lie anywhere, ``at_once`` of them in flight
        when there are as many; 0 where nothing is known of the disk."""
        if not self.disk:
            return 0.0
        return requests * size / _rate_of(self.disk, size, min(max(requests, 1.0), at_once))


def _rate_of(disk: tuple[DiskRead, ...], size: int, depth: float) -> float:
    """Bytes a second at a size and depth between those that were measured: on a line in logarithms, and at
    the ends what the nearest gives."""

    def between(points: list[tuple[float, float]], x: float) -> float:
        points.sort()
        if x <= points[0][0]:
            return points[0][1]
        for (a, low), (b, high) in pairwise(points):
            if x <= b:
                return low * math.exp(math.log(high / low) * math.log(x / a) / math.log(b / a))
        return points[-1][1]

    by_depth = [
        (float(d), between([(float(r.request), r.rate) for r in disk if r.depth == d], size))
        for d in {r.depth for r in disk}
    ]
    return between(by_depth, depth)


def rates_for(platform: str | None, threads: int) -> Rates:
    """The rates of a board, or (None) of this machine; ``threads`` 0 takes as many as `edgert.load` would.
    Raises UsageError for a platform nobody knows."""
    if platform is not None:
        found = board(platform)
        assert found is not None  # a name that is none was refused
        return _of_board(found, threads or found.cores, found.name)
    from .platforms.detect import detect

    machine = detect()
    threads = threads or machine.threads
    measured = load_measured()
    if measured is not None:
        return _of_measured(measured, threads, machine.cpu.model, machine.memory.total)
    return _of_board(_likely_board(), threads, f"{machine.cpu.model}, unmeasured (run `edgert doctor` once)")


def _likely_board() -> Platform:
    """What stands for this machine where nothing was measured."""
    found = board() or board("x86-laptop-ddr4")
    assert found is not None
    return found


def _disk_of(b: Platform) -> tuple[DiskRead, ...]:
    reads = b.storage[0].reads if b.storage else ()
    return tuple(DiskRead(r.request, *of) for r in reads for of in ((1, r.depth_1), (8, r.deep)))


def _of_measured(m: Measured, threads: int, name: str, total: int) -> Rates:
    nearest = min(m.read, key=lambda n: (abs(n - threads), n))
    return Rates(
        name=f"this machine ({name})",
        measured=True,
        threads=threads,
        lanes=16 if m.isa.startswith("avx512") else 8,
        bandwidth=m.read[nearest],
        usable_memory=total,
        matmul=m.matmul,
        attend=m.attend,
        int8=4 * m.fp32 * threads,
        fp32=m.fp32 * threads,
        disk=m.disk or _disk_of(_likely_board()),
    )


def _of_board(b: Platform, threads: int, name: str) -> Rates:
    """The fastest cores come first, one thread each; a board's bandwidth needs about half of its cores."""
    left, int8, fp32 = threads, 0.0, 0.0
    for cluster in b.clusters:
        cores = min(left, cluster.cores)
        left -= cores
        int8 += cores * cluster.clock * cluster.int8_per_cycle / 2
        fp32 += cores * cluster.clock * cluster.fp32_per_cycle / 2
    needed = max(1, (b.cores + 1) // 2)
    return Rates(
        name=name,
        measured=False,
        threads=threads,
        lanes=16 if "avx512_vnni" in b.features else 8,
        bandwidth=b.memory.sustained * min(1.0, threads / needed),
        usable_memory=b.memory.usable,
        matmul={},
        attend={},
        int8=int8,
        fp32=fp32,
        disk=_disk_of(b),
    )
