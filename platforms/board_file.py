"""Platform files: the boards edgert knows, one TOML file each beside this module, and a user's own."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

from .board import BoardMemory, Cluster, Marks, MemoryOption, Mode, Platform, Reads, Storage
from .detect import RELEVANT_FEATURES, Cache
from .fields import (
    CLOCK,
    RATE,
    SIZE,
    PlatformError,
    Table,
    count,
    flag,
    nearest,
    per_cycle,
    text,
    texts,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_HERE = Path(__file__).parent
_STORAGE = ("nvme", "emmc", "sd", "ufs", "sata")
_CACHES = ("data", "instruction", "unified")


def platforms() -> list[str]:
    """Names of the boards that edgert describes."""
    return sorted(path.stem for path in _HERE.glob("*.toml"))


def load_platform(name: str) -> Platform:
    """The board of that name or alias; "-8gb" and the like at its end choose among the memory sizes it is
    sold with. Raises PlatformError, naming the nearest, when there is none."""
    wanted = re.sub(r"[\s_]+", "-", name.strip().lower())
    known = _names()
    if wanted in known:
        return _shipped(known[wanted])
    base, _, size = wanted.rpartition("-")
    sizes: list[str] = []
    if base in known and re.fullmatch(r"[0-9]+gi?b", size):
        platform, total = _shipped(known[base]), int(re.sub(r"\D", "", size)) << 30
        sizes = [f"{base}-{option.total >> 30}gb" for option in platform.memory.options]
        if any(option.total == total for option in platform.memory.options):
            return platform.with_memory(total)
    hint = nearest(wanted, sizes or known) or f"; known are {', '.join(platforms())}"
    raise PlatformError(f"unknown platform {name!r}{hint}")


def read_platform(path: str | Path) -> Platform:
    """The board a file describes. Raises PlatformError with the file and the field that is wrong."""
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlatformError(f"cannot be read: {error}", str(path)) from error
    return _platform(data, str(path))


@cache
def _shipped(stem: str) -> Platform:
    return read_platform(_HERE / f"{stem}.toml")


@cache
def _names() -> dict[str, str]:
    """Every name and alias -> file stem."""
    stems = platforms()
    aliases = {alias: stem for stem in stems for alias in _shipped(stem).aliases}
    return aliases | {stem: stem for stem in stems}


def _platform(data: dict[str, object], path: str) -> Platform:
    top = Table(path, data, _documents(data, path))
    top.asked.add("sources")
    features = top.figure("features", texts)
    for feature in features:
        if feature not in RELEVANT_FEATURES:
            raise top.error("features", f"unknown {feature!r}{nearest(feature, RELEVANT_FEATURES)}")
    clusters = tuple(_cluster(row) for row in top.tables("clusters", 1))
    memory = _memory(top.table("memory"))
    modes = tuple(_mode(row, clusters, memory) for row in top.tables("modes"))
    default = top.value("default_mode", text) if top.has("default_mode") else None
    if default is not None and default not in [mode.name for mode in modes]:
        raise top.error("default_mode", f"{default!r} is none of the modes")
    platform = Platform(
        name=top.value("name", text),
        title=top.value("title", text),
        aliases=top.value("aliases", texts) if top.has("aliases") else (),
        marks=_marks(top.table("detect")) if top.has("detect") else Marks(),
        features=features,
        clusters=clusters,
        caches=tuple(_cache(row) for row in top.tables("caches")),
        memory=memory,
        storage=tuple(_storage(row) for row in top.tables("storage")),
        modes=modes,
        default_mode=default,
        path=path,
        sources=top.figures,
    )
    top.done()
    return platform


def _documents(data: dict[str, object], path: str) -> dict[str, str]:
    documents = data.get("sources", {})
    if not isinstance(documents, dict) or not all(isinstance(d, str) and d for d in documents.values()):
        raise PlatformError("expected a table of documents or URLs", path, "sources")
    return documents


def _marks(row: Table) -> Marks:
    def patterns(key: str) -> tuple[str, ...]:
        return row.value(key, texts) if row.has(key) else ()

    fallback = row.has("fallback") and row.value("fallback", flag)
    marks = Marks(patterns("compatible"), patterns("cpus"), patterns("memory_types"), fallback)
    row.done()
    return marks


def _cluster(row: Table) -> Cluster:
    cluster = Cluster(
        part=row.figure("part", text),
        cpu_part=row.figure("cpu_part", text).lower() if row.has("cpu_part") else "",
        cores=row.figure("cores", count),
        clock=row.figure("clock", CLOCK),
        int8_per_cycle=row.figure("int8_per_cycle", per_cycle),
        fp32_per_cycle=row.figure("fp32_per_cycle", per_cycle),
    )
    row.done()
    return cluster


def _cache(row: Table) -> Cache:
    level, instances = row.figure("level", count), row.figure("instances", count)
    kind = _one_of(row, "kind", _CACHES)
    nbytes = row.figure("size", SIZE) * instances
    row.done()
    return Cache(level, kind, nbytes, instances)


def _memory(row: Table) -> BoardMemory:
    peak, sustained = row.figure("peak", RATE), row.figure("sustained", RATE)
    if sustained > peak:
        raise row.error("sustained", f"{sustained / 1e9:g} GB/s is above the peak of {peak / 1e9:g} GB/s")
    clock = row.figure("clock", CLOCK) if row.has("clock") else None
    options = tuple(_option(option) for option in row.tables("options", 1))
    kind = row.figure("kind", text)
    row.done()
    return BoardMemory(kind, peak, sustained, clock, options, options[0].total, options[0].usable)


def _option(row: Table) -> MemoryOption:
    option = MemoryOption(row.figure("total", SIZE), row.figure("usable", SIZE))
    if option.usable > option.total:
        raise row.error("usable", f"{option.usable} bytes are more than the total of {option.total}")
    row.done()
    return option


def _storage(row: Table) -> Storage:
    kind, link, rate = _one_of(row, "kind", _STORAGE), row.figure("link", text), row.figure("rate", RATE)
    reads: list[Reads] = []
    for inner in row.tables("reads", 1):
        read = Reads(inner.figure("request", SIZE), inner.figure("depth_1", RATE), inner.figure("deep", RATE))
        if read.deep > rate:
            raise inner.error("deep", f"above the link's {rate / 1e6:g} MB/s")
        if read.depth_1 > read.deep:
            raise inner.error("depth_1", f"above the {read.deep / 1e6:g} MB/s of many requests in flight")
        if reads and read.request <= reads[-1].request:
            raise inner.error("request", "sizes must grow from row to row")
        inner.done()
        reads.append(read)
    row.done()
    return Storage(kind, link, rate, tuple(reads))


def _mode(row: Table, clusters: tuple[Cluster, ...], memory: BoardMemory) -> Mode:
    mode = Mode(
        row.value("name", text),
        row.figure("cores", count),
        row.figure("clock", CLOCK),
        row.figure("memory_clock", CLOCK),
    )
    cores, fastest = sum(c.cores for c in clusters), max(c.clock for c in clusters)
    if mode.cores > cores:
        raise row.error("cores", f"{mode.cores} cores are more than the {cores} of the clusters")
    if mode.clock > fastest:
        raise row.error("clock", f"above the {fastest / 1e6:g} MHz of the fastest cluster")
    if memory.clock is None:
        raise row.error("memory_clock", "needs memory.clock, which says what it is a share of")
    if mode.memory_clock > memory.clock:
        raise row.error("memory_clock", f"above memory.clock, {memory.clock / 1e6:g} MHz")
    row.done()
    return mode


def _one_of(row: Table, key: str, allowed: tuple[str, ...]) -> str:
    value = row.figure(key, text)
    if value not in allowed:
        raise row.error(key, f"expected one of {', '.join(allowed)}, found {value!r}")
    return value
