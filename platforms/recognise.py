"""Which of the described boards this machine is, and the state it is in.

In order: the device tree, the processor's brand (Macs), the processor's core numbers with the memory size
(a container hides the device tree), and for x86 the kind of memory.
"""

from __future__ import annotations

import platform as python_platform
import re
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from .board import Platform
from .board_file import load_platform, platforms
from .detect import ROOT, detect_memory, read_text
from .state import Clocks, Power, detect_clocks, detect_l4t, detect_mode, detect_power

# SMBIOS 3.6, structure type 17, byte 0x12.
_MEMORY_TYPES = {0x1A: "DDR4", 0x1E: "LPDDR4", 0x22: "DDR5", 0x23: "LPDDR5"}
_GUESS = "an x86 machine; which kind of memory it has is not readable"


@dataclass(frozen=True)
class Recognised:
    """``platform`` is the board with this machine's memory size and nothing clamped, None when none
    matches; ``reason`` says in a clause what told it. When ``guessed``, the platform stands for machines of
    this kind, and its figures are no measure of this one. ``mode`` is a Jetson's power mode, which need not
    be one the platform describes; ``l4t`` its release."""

    platform: Platform | None
    reason: str
    mode: str | None
    l4t: str | None
    clocks: Clocks
    power: Power
    guessed: bool


def detect_platform(root: Path = ROOT) -> Recognised:
    platform, reason = _find(root)
    if platform is not None:
        platform = platform.with_memory(detect_memory(root).total)
    return Recognised(
        platform,
        reason,
        detect_mode(root),
        detect_l4t(root),
        detect_clocks(root),
        detect_power(root),
        guessed=reason == _GUESS,
    )


def _find(root: Path) -> tuple[Platform | None, str]:
    boards = [load_platform(name) for name in platforms()]
    entries = [entry for entry in read_text(root / "proc/device-tree/compatible").split("\0") if entry]
    for board in boards:
        for entry in entries:
            if any(fnmatchcase(entry, pattern) for pattern in board.marks.compatible):
                return board, f"the device tree says {entry}"
    brand = _brand(root)
    for board in boards:
        if brand and any(fnmatchcase(brand, pattern) for pattern in board.marks.cpus):
            return board, f"the processor is an {brand}"
    if entries or brand:
        return None, f"no platform file describes {brand or entries[0]}"
    parts = _parts(root)
    if parts:
        return _by_parts(boards, parts, root)
    return _by_memory_type(boards, root)


def _brand(root: Path) -> str:
    """The brand string of a Mac's processor, "" elsewhere."""
    if sys.platform != "darwin" or root != ROOT:
        return ""
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _parts(root: Path) -> list[str]:
    """The "CPU part" number of each core of an Arm machine that is on."""
    text = read_text(root / "proc/cpuinfo").lower()
    return re.findall(r"^cpu part\s*: (0x[0-9a-f]+)", text, re.MULTILINE)


def _by_parts(boards: list[Platform], parts: list[str], root: Path) -> tuple[Platform | None, str]:
    """The board with these cores whose memory holds what the system reports and whose top clock is the
    nearest to the hardware's. What two boards share in all of it tells neither."""
    total = detect_memory(root).total
    fitting = [
        board
        for board in boards
        if {c.cpu_part for c in board.clusters} == set(parts)
        and len(parts) <= board.cores
        and 0.75 * board.with_memory(total).memory.total < total <= board.with_memory(total).memory.total
    ]
    told = f"cores {' and '.join(sorted(set(parts)))} with {total / (1 << 30):.1f} GiB"
    clock = detect_clocks(root).cpu_hardware
    if clock is not None and len(fitting) > 1:
        away = [abs(max(c.clock for c in board.clusters) - clock) for board in fitting]
        fitting = [board for board, distance in zip(fitting, away, strict=True) if distance == min(away)]
        told += f" at {clock / 1e6:.0f} MHz"
    if len(fitting) == 1:
        return fitting[0], f"no device tree, but {told}"
    several = f"could be {', '.join(b.name for b in fitting)}" if fitting else "match no platform file"
    return None, f"no device tree, and {told} {several}"


def _by_memory_type(boards: list[Platform], root: Path) -> tuple[Platform | None, str]:
    """An x86 machine is one of the generic ones; SMBIOS tells which, to root alone on most systems."""
    if not re.search(r"^vendor_id\s*:", read_text(root / "proc/cpuinfo"), re.MULTILINE):
        return None, f"no platform file describes this {python_platform.machine()} machine"
    for entry in sorted((root / "sys/firmware/dmi/entries").glob("17-*/raw")):
        kind = _MEMORY_TYPES.get(_byte(entry, 0x12), "")
        for board in boards:
            if kind in board.marks.memory_types:
                return board, f"an x86 machine with {kind}"
    fallback = next(board for board in boards if board.marks.fallback)
    return fallback, _GUESS


def _byte(path: Path, offset: int) -> int:
    try:
        return path.read_bytes()[offset]
    except (OSError, IndexError):
        return 0
