"""What may change while a machine runs: its power mode, its clocks, its swap, whether it runs on battery.
Everything is read from files that need no root; a file that is not there, or not readable, gives None."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .detect import ROOT, read_text

# The cap that nvpmodel sets on a Jetson's memory (L4T 36, then 35), the bandwidth manager of Thor, and the
# memory controller of a Rockchip.
_MEMORY_CLOCKS = (
    "sys/kernel/nvpmodel_clk_cap/emc",
    "sys/kernel/nvpmodel_emc_cap/emc_iso_cap",
    "sys/class/devfreq/bwmgr/max_freq",
    "sys/class/devfreq/dmc/max_freq",
)
_NO_CAP = 10**10  # Hz; nvpmodel writes "no cap" as 0 or as a huge number


@dataclass(frozen=True)
class Clocks:
    """Processors online; the highest clock a core may take now and the highest its hardware has, in Hz;
    the governor, of the fastest cores where they differ; the cap on the memory clock in Hz."""

    online: int | None = None
    cpu_allowed: int | None = None
    cpu_hardware: int | None = None
    governor: str | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Power:
    """``on_battery`` is None where the machine has no supply that says so; ``charge`` is 0 to 1."""

    on_battery: bool | None = None
    charge: float | None = None


@dataclass(frozen=True)
class Swap:
    """Bytes swapped out; ``zram`` when all that is swapped lies compressed in memory."""

    used: int = 0
    zram: bool = False


def detect_clocks(root: Path = ROOT) -> Clocks:
    policies: list[tuple[int, int, str]] = []
    for policy in sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy[0-9]*")):
        allowed, hardware = _number(policy / "scaling_max_freq"), _number(policy / "cpuinfo_max_freq")
        if allowed and hardware:  # kHz
            policies.append((hardware * 1000, allowed * 1000, _line(policy / "scaling_governor")))
    hardware, _, governor = max(policies, key=lambda p: p[:2], default=(None, None, ""))
    caps = (_number(root / name) for name in _MEMORY_CLOCKS)
    return Clocks(
        online=_cpus(_line(root / "sys/devices/system/cpu/online")),
        cpu_allowed=max((allowed for _, allowed, _ in policies), default=None),
        cpu_hardware=hardware,
        governor=governor or None,
        memory=next((cap for cap in caps if cap and cap < _NO_CAP), None),
    )


def detect_mode(root: Path = ROOT) -> str | None:
    """The name of a Jetson's power mode as its /etc/nvpmodel.conf has it; the mode it boots with where
    none was ever chosen."""
    conf = read_text(root / "etc/nvpmodel.conf")
    chosen = re.search(r"pmode:(\d+)", read_text(root / "var/lib/nvpmodel/status"))
    chosen = chosen or re.search(r"^<\s*PM_CONFIG\s+DEFAULT=(\d+)\s*>", conf, re.MULTILINE)
    return detect_modes(root).get(int(chosen[1])) if chosen else None


def detect_modes(root: Path = ROOT) -> dict[int, str]:
    """A Jetson's power modes by the number that `nvpmodel -m` takes."""
    conf = read_text(root / "etc/nvpmodel.conf")
    found = re.findall(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", conf, re.MULTILINE)
    return {int(number): name for number, name in found}


def detect_l4t(root: Path = ROOT) -> str | None:
    """The release of NVIDIA's Linux for Jetson, as "36.4.7"."""
    text = read_text(root / "etc/nv_tegra_release")
    found = re.match(r"# R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", text)
    return f"{found[1]}.{found[2]}" if found else None


def detect_power(root: Path = ROOT) -> Power:
    """On battery when a battery of the machine (a mouse has one too) discharges, or when it has one and
    every other supply is off."""
    online: list[bool] = []
    states: list[str] = []
    charges: list[int] = []
    for supply in sorted((root / "sys/class/power_supply").glob("*")):
        if _line(supply / "type") != "Battery":
            online += [_line(supply / "online") != "0"] if (supply / "online").is_file() else []
        elif _line(supply / "scope") != "Device":
            states.append(_line(supply / "status"))
            charge = _number(supply / "capacity")
            charges += [] if charge is None else [charge]
    if not states:
        return Power(False if any(online) else None)
    on_battery = "Discharging" in states or bool(online and not any(online))
    return Power(on_battery, sum(charges) / len(charges) / 100 if charges else None)


def detect_swap(root: Path = ROOT) -> Swap:
    rows = [line.split() for line in read_text(root / "proc/swaps").splitlines()[1:]]
    used = {row[0]: int(row[3]) * 1024 for row in rows if len(row) >= 4 and row[3].isdigit()}
    names = [name for name, n in used.items() if n]
    return Swap(sum(used.values()), bool(names) and all("/zram" in name for name in names))


def detect_disk(directory: Path, root: Path = ROOT) -> str | None:
    """The kind of disk a directory is on, as platform files call it; None where that cannot be told."""
    try:
        number = directory.stat().st_dev
    except OSError:
        return None
    device = (root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if device.name.startswith("nvme"):
        return "nvme"
    card = re.match(r"mmcblk\d+", device.name)
    if card:
        return {"SD": "sd", "MMC": "emmc"}.get(_line(root / f"sys/block/{card[0]}/device/type"))
    return "sata" if "/ata" in str(device) else None


def _cpus(ranges: str) -> int | None:
    """How many "0-3,6" names."""
    count = 0
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            return None
        count += int(last or first) - int(first) + 1
    return count


def _line(path: Path) -> str:
    return read_text(path).strip("\0\n ")


def _number(path: Path) -> int | None:
    text = _line(path)
    return int(text) if text.isdigit() else None
