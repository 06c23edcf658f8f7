"""What a board is: the frozen values a platform file describes. Sizes are bytes, rates bytes a second,
clocks Hz; `board_file` reads them, `recognise` finds the one this machine is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .detect import Cache
from .fields import OWN_WORDS, PlatformError, nearest


@dataclass(frozen=True)
class Marks:
    """What identifies a board. ``compatible`` and ``cpus`` are shell patterns over the entries of the
    device tree's `compatible` and over the processor's brand string; ``memory_types`` are SMBIOS names,
    looked at on x86 alone; ``fallback`` marks the board an unknown x86 machine is taken for."""

    compatible: tuple[str, ...] = ()
    cpus: tuple[str, ...] = ()
    memory_types: tuple[str, ...] = ()
    fallback: bool = False


@dataclass(frozen=True)
class Cluster:
    """Equal cores. ``cpu_part`` is the "CPU part" of /proc/cpuinfo, "" where it has none. Operations a
    cycle are of one core at its best: a multiply and an add are two."""

    part: str
    cpu_part: str
    cores: int
    clock: int
    int8_per_cycle: float
    fp32_per_cycle: float


@dataclass(frozen=True)
class MemoryOption:
    """A size the board is sold with, and what of it a process can take on an idle system."""

    total: int
    usable: int


@dataclass(frozen=True)
class BoardMemory:
    """``peak`` is what the bus can carry, ``sustained`` what all cores together read. ``clock`` is the
    highest of the memory controller, None where no power mode lowers it. The first of ``options`` is the
    usual one; ``total`` and ``usable`` are of the one chosen."""

    kind: str
    peak: int
    sustained: int
    clock: int | None
    options: tuple[MemoryOption, ...]
    total: int
    usable: int


@dataclass(frozen=True)
class Reads:
    """Bytes a second read in random requests of ``request`` bytes: one at a time, and with 8 or more in
    flight."""

    request: int
    depth_1: int
    deep: int


@dataclass(frozen=True)
class Storage:
    """``kind`` is "nvme", "emmc", "sd", "ufs" or "sata"; ``rate`` is what the link can carry."""

    kind: str
    link: str
    rate: int
    reads: tuple[Reads, ...]


@dataclass(frozen=True)
class Mode:
    """A power mode: at most ``cores`` cores on, at most at ``clock``, memory at most at
    ``memory_clock``."""

    name: str
    cores: int
    clock: int
    memory_clock: int


@dataclass(frozen=True)
class Platform:
    """A board with nothing clamped; `in_mode` gives it in a power mode. ``clusters`` come fastest first.
    ``sources`` maps every figure's place in the file, as "memory.peak", to where it comes from."""

    name: str
    title: str
    aliases: tuple[str, ...]
    marks: Marks
    features: tuple[str, ...]
    clusters: tuple[Cluster, ...]
    caches: tuple[Cache, ...]
    memory: BoardMemory
    storage: tuple[Storage, ...]
    modes: tuple[Mode, ...]
    default_mode: str | None
    path: str
    sources: Mapping[str, str] = field(repr=False, compare=False)

    @property
    def cores(self) -> int:
        return sum(c.cores for c in self.clusters)

    @property
    def int8_ops(self) -> float:
        """Operations a second of all cores at their best, a multiply and an add counting two."""
        return sum(c.cores * c.clock * c.int8_per_cycle for c in self.clusters)

    @property
    def fp32_ops(self) -> float:
        return sum(c.cores * c.clock * c.fp32_per_cycle for c in self.clusters)

    def is_measured(self, place: str) -> bool:
        """Whether the figure at ``place`` comes from a document, not from a formula or a guess."""
        return not self.sources[place].startswith(OWN_WORDS)

    def mode(self, name: str) -> Mode:
        """The mode of that name; case and NVIDIA's "MODE_" do not matter. Raises PlatformError."""
        wanted = name.upper().removeprefix("MODE_")
        for mode in self.modes:
            if mode.name.upper() == wanted:
                return mode
        names = [mode.name for mode in self.modes]
        has = f"it has {', '.join(names)}" if names else "it has none"
        raise PlatformError(
            f"{self.name} has no power mode {name!r}: {has}{nearest(wanted, names)}", self.path, "modes"
        )

    def in_mode(self, name: str) -> Platform:
        """This board clamped to a power mode: cores (the fastest stay), clocks and bandwidth. Sustained
        bandwidth is taken to fall with the memory's clock. Raises PlatformError."""
        mode = self.mode(name)
        left, clusters = mode.cores, []
        for cluster in self.clusters:
            cores = min(cluster.cores, left)
            left -= cores
            if cores:
                clusters.append(replace(cluster, cores=cores, clock=min(cluster.clock, mode.clock)))
        memory = self.memory
        if memory.clock:  # a file with modes states it
            share = mode.memory_clock / memory.clock
            memory = replace(
                memory,
                peak=round(memory.peak * share),
                sustained=round(memory.sustained * share),
                clock=mode.memory_clock,
            )
        return replace(self, clusters=tuple(clusters), memory=memory)

    def with_memory(self, total: int) -> Platform:
        """This board with the smallest size it is sold with that holds ``total`` bytes (what a system
        reports is less than what is soldered), the largest when none does."""
        options = sorted(self.memory.options, key=lambda o: o.total)
        chosen = next((o for o in options if o.total >= total), options[-1])
        return replace(self, memory=replace(self.memory, total=chosen.total, usable=chosen.usable))
