"""What limits a machine and what to change, in sentences: the findings of `edgert doctor`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from edgert.download import size_text
from edgert.engines.onnx_providers import OLDEST, too_old
from edgert.machine import Measured, in_mode_if_known
from edgert.platforms.board import Mode
from edgert.platforms.detect import Machine
from edgert.platforms.fields import PlatformError
from edgert.platforms.recognise import Recognised
from edgert.platforms.state import Swap

ENOUGH = 0.95  # of the best bandwidth: more threads add little
FAR_BELOW = 0.6  # of what a board should give; its figures are no closer than that
SWAPPED = 64 << 20  # less is what systems put aside anyway
Q4_0_BYTES = 18 / 32  # a weight
ONNX_PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # distributions of one and the same module


@dataclass(frozen=True)
class OnnxRuntime:
    """``packages``: distribution -> version, of those installed; ``providers``: "cpu" and what else has a
    library."""

    packages: Mapping[str, str]
    providers: tuple[str, ...]


@dataclass(frozen=True)
class Examined:
    """All the doctor looked at. ``modes`` are a Jetson's power modes by number, ``levels`` the ISA levels
    that run here, ``disk`` the kind of disk of the cache, ``engines`` their versions (None: not installed),
    ``onnxruntime`` None where it is not installed, ``not_stored`` why the measurement was not."""

    machine: Machine
    here: Recognised
    modes: Mapping[int, str]
    swap: Swap
    disk: str | None
    levels: list[str]
    engines: Mapping[str, str | None]
    onnxruntime: OnnxRuntime | None
    measured: Measured
    not_stored: str | None


def findings(e: Examined) -> list[str]:
    parts = (_memory, _arithmetic, _board, _supply, _limits, _swap, _disk, _engines)
    found = [sentence for part in parts for sentence in part(e)]
    if e.not_stored:
        found.append(f"The measurement was not stored: {e.not_stored}. Measure again when that is over.")
    return found


def _memory(e: Examined) -> Iterator[str]:
    rates = e.measured.read
    best = max(rates.values())
    threads = min(n for n, rate in rates.items() if rate >= ENOUGH * best)
    yield (
        f"Memory gives {best / 1e9:.1f} GB/s, so a model that reads 100 MB a token cannot pass "
        f"{best / 1e8:.0f} tok/s, one of 1 GB {best / 1e9:.0f} tok/s."
    )
    if threads < max(rates):
        yield f"{threads} threads already read as fast as {max(rates)}; more add little to generation."
    if e.here.platform is None or e.here.guessed:
        return
    board = in_mode_if_known(e.here.platform, e.here.mode)
    if best < FAR_BELOW * board.memory.sustained:
        told = "measured" if board.is_measured("memory.sustained") else "estimated"
        yield (
            f"That is far below the {board.memory.sustained / 1e9:.1f} GB/s {told} for {board.title}: it may "
            "be hot and throttled (let it cool), have one memory module where two would double the speed, or "
            "share its memory with a busy neighbour (look with top)."
        )


def _arithmetic(e: Examined) -> Iterator[str]:
    m = e.measured
    if m.isa == "scalar":
        arm = e.machine.cpu.arch in ("aarch64", "arm64")
        needs = "asimd, asimddp and asimdhp" if arm else "AVX2, FMA and F16C"
        yield (
            "No vector kernels in use, which makes edgert about a hundred times slower; the fast ones need "
            f"{needs}."
        )
    elif m.isa != e.levels[0]:
        yield f"EDGERT_ISA holds edgert at {m.isa}; unset it to use {e.levels[0]}."
    if e.levels[0] == "avx2":
        yield "Without AVX-512 VNNI this processor takes about twice as long for a prompt; nothing to change."
    if m.matmul:
        kernels, memory = m.matmul["Q4_0"][1] * m.threads * Q4_0_BYTES, max(m.read.values())
        if kernels > memory:
            yield (
                f"Memory limits generation: the kernels of {m.threads} threads could take "
                f"{kernels / 1e9:.1f} GB/s of 4-bit weights, {kernels / memory:.1f} times what memory gives. "
                "Smaller weights are faster, more threads are not."
            )
        else:
            yield (
                f"Arithmetic limits generation: the kernels of {m.threads} threads take "
                f"{kernels / 1e9:.1f} GB/s of 4-bit weights, memory gives {memory / 1e9:.1f}. More cores or "
                "higher clocks make it faster."
            )


def _board(e: Examined) -> Iterator[str]:
    """Power mode, clocks and governor."""
    clocks, now = e.here.clocks, _mode(e, e.here.mode)
    if now is not None:
        best, number = max(
            ((mode, i) for i, name in e.modes.items() if (mode := _mode(e, name))), key=lambda m: _speed(m[0])
        )
        if _speed(best) > _speed(now):
            yield (
                f"Power mode {e.here.mode} allows {_mode_text(now)}; {best.name} allows {_mode_text(best)}: "
                f"sudo nvpmodel -m {number}"
            )
    elif clocks.cpu_allowed and clocks.cpu_hardware and clocks.cpu_allowed < ENOUGH * clocks.cpu_hardware:
        yield (
            f"The processor is held at {clocks.cpu_allowed / 1e6:.0f} of "
            f"{clocks.cpu_hardware / 1e6:.0f} MHz by scaling_max_freq in "
            "/sys/devices/system/cpu/cpufreq/policy*, which root may raise."
        )
    if clocks.governor not in (None, "performance") and not e.here.power.on_battery:
        yield (
            f"Clocks follow the load (governor {clocks.governor}), which slows the start of every answer: "
            "echo performance | sudo tee /sys/devices/system/cpu/cpufreq/policy*/scaling_governor"
        )


def _mode(e: Examined, name: str | None) -> Mode | None:
    """The mode of that name, None where the board's file does not describe it."""
    if e.here.platform is None or name is None:
        return None
    try:
        return e.here.platform.mode(name)
    except PlatformError:
        return None


def _speed(mode: Mode) -> tuple[int, int]:
    """How modes rank: generation first, which memory limits."""
    return mode.memory_clock, mode.cores * mode.clock


def _mode_text(mode: Mode) -> str:
    return f"{mode.cores} cores at {mode.clock / 1e6:.0f} MHz and memory at {mode.memory_clock / 1e6:.0f} MHz"


def _supply(e: Examined) -> Iterator[str]:
    if e.here.power.on_battery:
        charge = e.here.power.charge
        left = "" if charge is None else f" ({charge:.0%} left)"
        yield f"This machine runs on battery{left}, where clocks are often held down: connect its supply."


def _limits(e: Examined) -> Iterator[str]:
    cpu, limits = e.machine.cpu, e.machine.limits
    if cpu.usable < cpu.logical:
        yield f"This process may use {cpu.usable} of {cpu.logical} processors (CPU affinity)."
    if limits.cpus is not None:
        yield (
            f"A cgroup grants {limits.cpus:g} CPUs; edgert starts {e.machine.threads} threads, and more "
            "would only be throttled. The container's CPU limit (docker run --cpus) raises it."
        )
    if limits.memory is not None and limits.memory_left is not None:
        yield (
            f"A cgroup caps memory at {size_text(limits.memory)}, of which "
            f"{size_text(limits.memory_left)} are left. The container's "
            "memory limit (docker run --memory) raises it."
        )
    room = size_text(0.9 * e.machine.available_memory)
    yield f"A model with its KV cache should stay below {room} of memory."


def _swap(e: Examined) -> Iterator[str]:
    if e.swap.used < SWAPPED:
        return
    where = "compressed in memory (zram), which takes processors' time" if e.swap.zram else "on disk"
    yield (
        f"{size_text(e.swap.used)} are swapped out {where}: memory has been short. Close programs, or a "
        "model's weights may be next and generation waits for every page."
    )


def _disk(e: Examined) -> Iterator[str]:
    if e.measured.disk_note:
        yield e.measured.disk_note
    largest = max(e.measured.disk, key=lambda r: (r.request, r.depth), default=None)
    if e.here.platform is None or e.here.guessed or largest is None or e.disk is None:
        return
    for storage in e.here.platform.storage:
        deep = storage.reads[-1].deep
        if storage.kind == e.disk and largest.rate < FAR_BELOW * deep:
            yield (
                f"The disk gives {largest.rate / 1e6:.0f} MB/s where {storage.link} on this board "
                f"carries about {deep / 1e6:.0f}: it may be slow, busy, or on a narrower link."
            )
        elif storage.kind == "nvme" and e.disk in ("sd", "emmc") and deep > 2 * largest.rate:
            card = "SD card" if e.disk == "sd" else "eMMC"
            yield (
                f"The cache is on the {card} ({largest.rate / 1e6:.0f} MB/s); an NVMe disk loads models "
                f"about {deep / largest.rate:.0f} times faster: set EDGERT_CACHE to a directory on it."
            )


def _engines(e: Examined) -> Iterator[str]:
    if e.onnxruntime:
        yield from _onnxruntime(e.onnxruntime, e.here.l4t)
    if e.engines["llamacpp"] is None:
        yield "Architectures that native does not know need llama.cpp: pip install 'edgert[llamacpp]'."


def _onnxruntime(found: OnnxRuntime, l4t: str | None) -> Iterator[str]:
    if len(found.packages) > 1:
        yield (
            f"{' and '.join(found.packages)} are both installed and overwrite each other's files, so that "
            "the GPU may be missing or nothing load: "
            f"pip uninstall {' '.join(found.packages)}, then install one."
        )
    for name, version in found.packages.items():
        if too_old(version):
            yield (
                f"{name} {version} is too old, it gives wrong logits where a model has sliding windows: "
                f"install {'.'.join(map(str, OLDEST))} or newer, which needs Python 3.11 or newer."
            )
    if l4t and len(found.providers) == 1:
        yield (
            "onnxruntime has no GPU provider here, so what runs on it uses the processor; docs/jetson.md has "
            f"the ways to one for L4T {l4t}. edgert does without either."
        )
