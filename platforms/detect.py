"""What machine this is: processor, caches, memory, and what the system lets this process use.

Read from /proc and /sys on Linux, from psutil and py-cpuinfo elsewhere. Every function takes the root
of the file system to read, so that a machine can be described by a directory of its files.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
# Of the many flags a processor lists, those that kernels of a language model care about.
RELEVANT_FEATURES = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "fphp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
    "sme",
)


@dataclass(frozen=True)
class Cache:
    """All caches of one level and kind together. ``nbytes`` is the sum over ``instances``."""

    level: int
    kind: str  # "data", "instruction" or "unified"
    nbytes: int
    instances: int


@dataclass(frozen=True)
class Cpu:
    """``logical`` processors on ``cores`` physical cores; ``usable`` of them may run this process."""

    model: str
    arch: str
    logical: int
    cores: int
    usable: int
    features: tuple[str, ...]
    caches: tuple[Cache, ...]

    @property
    def last_level_cache(self) -> int:
        """Bytes of the caches of the highest level, 0 when unknown."""
        top = max((c.level for c in self.caches), default=0)
        return sum(c.nbytes for c in self.caches if c.level == top)


@dataclass(frozen=True)
class Memory:
    """Bytes. ``available`` is what can be had without swapping, before any cgroup limit."""

    total: int
    available: int
    swap_free: int


@dataclass(frozen=True)
class Limits:
    """What the cgroups of this process allow; None is no limit. ``version`` is 2, 1 or 0 (none seen).
    ``memory_used`` is without the file cache, which the system gives back on demand."""

    version: int = 0
    cpus: float | None = None
    memory: int | None = None
    memory_used: int | None = None

    @property
    def memory_left(self) -> int | None:
        """Bytes that can still be taken, None without a limit."""
        return None if self.memory is None else max(self.memory - (self.memory_used or 0), 0)


@dataclass(frozen=True)
class Machine:
    system: str
    cpu: Cpu
    memory: Memory
    limits: Limits

    @property
    def threads(self) -> int:
        """Threads worth starting: one per physical core this process may use, within its CPU quota."""
        return _threads(self.cpu.cores, self.cpu.usable, self.limits.cpus)

    @property
    def available_memory(self) -> int:
        """Bytes this process can still take: the system's and the cgroup's, whichever is less."""
        left = self.limits.memory_left
        return self.memory.available if left is None else min(self.memory.available, left)


def _threads(cores: int, usable: int, quota: float | None) -> int:
    threads = min(cores, usable)
    return max(threads if quota is None else min(threads, math.ceil(quota)), 1)


def detect_threads(root: Path = ROOT) -> int:
    """:attr:`Machine.threads` without looking at all else of the machine."""
    usable = usable_processors()
    return _threads(_physical_cores(root) or usable, usable, detect_limits(root).cpus)


def detect(root: Path = ROOT) -> Machine:
    system = f"{platform.system()} {platform.release()}"
    return Machine(system, detect_cpu(root), detect_memory(root), detect_limits(root))


def detect_cpu(root: Path = ROOT) -> Cpu:
    info = _cpuinfo(root)
    logical = os.cpu_count() or 1
    cores = _physical_cores(root) or logical
    usable = usable_processors()
    model = info.get("model name", "")
    flags = (info.get("flags") or info.get("Features") or "").split()
    if not model:  # boards name themselves in the device tree
        model = read_text(root / "proc/device-tree/model").strip("\0\n ")
    if not model or not flags:
        model, flags = _slow_cpuinfo(model, flags)
    features = tuple(f for f in RELEVANT_FEATURES if f in flags)
    return Cpu(model, platform.machine(), logical, min(cores, logical), usable, features, _caches(root))


def usable_processors() -> int:
    """Processors that may run this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def detect_memory(root: Path = ROOT) -> Memory:
    fields: dict[str, int] = {}
    for line in read_text(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        number = value.split()
        if number and number[0].isdigit():
            fields[key] = int(number[0]) * 1024
    if "MemTotal" in fields:
        available = fields.get("MemAvailable", fields.get("MemFree", 0))
        return Memory(fields["MemTotal"], available, fields.get("SwapFree", 0))
    import psutil

    memory = psutil.virtual_memory()
    return Memory(memory.total, memory.available, psutil.swap_memory().free)


def detect_limits(root: Path = ROOT) -> Limits:
    """CPU and memory limits of this process's cgroups, v2 or v1, parents included."""
    groups: dict[str, str] = {}  # controller -> path; "" is the v2 hierarchy
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            groups[controller] = path
    mounts = list(_cgroup_mounts(root))

    cpus: list[float] = []
    memory: list[int] = []
    used: int | None = None
    for kind, names, mount_root, mount_point in mounts:
        if kind == "cgroup2" and "" in groups:
            for directory in _upward(root, mount_root, mount_point, groups[""]):
                quota, _, period = read_text(directory / "cpu.max").strip().partition(" ")
                if quota.isdigit() and period.isdigit() and int(period):
                    cpus.append(int(quota) / int(period))
                limit = read_text(directory / "memory.max").strip()
                if limit.isdigit():
                    memory.append(int(limit))
                    used = _tightest(memory, used, directory, "memory.current", "")
        elif kind == "cgroup" and "cpu" in names and "cpu" in groups:
            for directory in _upward(root, mount_root, mount_point, groups["cpu"]):
                quota = read_text(directory / "cpu.cfs_quota_us").strip()
                period = read_text(directory / "cpu.cfs_period_us").strip()
                if quota.isdigit() and period.isdigit() and int(period):
                    cpus.append(int(quota) / int(period))
        elif kind == "cgroup" and "memory" in names and "memory" in groups:
            for directory in _upward(root, mount_root, mount_point, groups["memory"]):
                limit = read_text(directory / "memory.limit_in_bytes").strip()
                if limit.isdigit() and int(limit) < 1 << 60:  # v1 writes "no limit" as a huge number
                    memory.append(int(limit))
                    used = _tightest(memory, used, directory, "memory.usage_in_bytes", "total_")
    has_v1 = any(kind == "cgroup" and {"cpu", "memory"} & set(names) for kind, names, *_ in mounts)
    version = 1 if has_v1 else 2 if mounts else 0
    return Limits(version, min(cpus, default=None), min(memory, default=None), used)


def _tightest(memory: list[int], used: int | None, directory: Path, current: str, prefix: str) -> int | None:
    """Use of the group whose limit, the last of ``memory``, is the smallest so far, without the file cache
    that memory.stat counts under names with ``prefix``: reading a model fills it, and it gives way."""
    if memory[-1] > min(memory):
        return used
    text = read_text(directory / current).strip()
    if not text.isdigit():
        return None
    cached = 0
    for line in read_text(directory / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in (f"{prefix}inactive_file", f"{prefix}active_file") and value.strip().isdigit():
            cached += int(value)
    return max(int(text) - cached, 0)


def _cgroup_mounts(root: Path) -> Iterator[tuple[str, list[str], str, str]]:
    """(cgroup or cgroup2, controllers, root within the hierarchy, mount point) of each mount."""
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if len(left) >= 5 and len(right) >= 3 and right[0] in ("cgroup", "cgroup2"):
            yield right[0], right[2].split(","), left[3], left[4]


def _upward(root: Path, mount_root: str, mount_point: str, group: str) -> Iterator[Path]:
    """The directory of ``group`` below a mount, then its parents up to the mount point."""
    top = root / mount_point.lstrip("/")
    if mount_root != "/" and (group == mount_root or group.startswith(mount_root + "/")):
        group = group[len(mount_root) :]  # in a container the mount shows only its own part
    directory = top / group.strip("/")
    while not directory.is_dir() and directory != top:
        directory = directory.parent
    while True:
        yield directory
        if directory == top:
            return
        directory = directory.parent


def _cpuinfo(root: Path) -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in read_text(root / "proc/cpuinfo").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _slow_cpuinfo(model: str, flags: list[str]) -> tuple[str, list[str]]:
    """Fill in what the system did not say; py-cpuinfo may run helper programs, so it comes last."""
    try:
        import cpuinfo

        info = cpuinfo.get_cpu_info()
    except Exception:  # it raises plain Exception on processors it does not know
        return model or platform.processor() or platform.machine(), flags
    return model or info.get("brand_raw") or platform.machine(), flags or info.get("flags", [])


def _physical_cores(root: Path) -> int:
    cores = set()
    for topology in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology"):
        core = read_text(topology / "core_id").strip()
        if core:
            cores.add((read_text(topology / "physical_package_id").strip(), core))
    return len(cores)


def _caches(root: Path) -> tuple[Cache, ...]:
    seen: dict[tuple[int, str, str], int] = {}
    for index in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        level, kind = read_text(index / "level").strip(), read_text(index / "type").strip().lower()
        size, shared = read_text(index / "size").strip(), read_text(index / "shared_cpu_list").strip()
        if level.isdigit() and size[:-1].isdigit() and size[-1:] in "KM":
            factor = 1024 if size[-1] == "K" else 1 << 20
            seen[int(level), kind, shared] = int(size[:-1]) * factor
    totals: dict[tuple[int, str], list[int]] = {}
    for (level_number, kind, _), nbytes in seen.items():
        totals.setdefault((level_number, kind), []).append(nbytes)
    return tuple(Cache(level, kind, sum(s), len(s)) for (level, kind), s in sorted(totals.items()))


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
