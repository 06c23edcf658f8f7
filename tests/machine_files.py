"""Machines as the files that describe them: what detection reads from a directory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from edgert import machine


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2_MOUNT = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def meminfo(kib: int) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal: {kib} kB\nMemAvailable: {kib // 2} kB\nSwapFree: 0 kB\n"}


def arm_cpuinfo(*parts: str) -> dict[str, str]:
    cores = (f"processor\t: {i}\nFeatures\t: asimd\nCPU part\t: {p}\n" for i, p in enumerate(parts))
    return {"proc/cpuinfo": "\n".join(cores)}


def device_tree(*compatible: str) -> dict[str, str]:
    return {"proc/device-tree/compatible": "".join(entry + "\0" for entry in compatible)}


def cpufreq(policy: int, allowed: int, hardware: int, governor: str = "schedutil") -> dict[str, str]:
    """Clocks in kHz."""
    base = f"sys/devices/system/cpu/cpufreq/policy{policy}"
    return {
        f"{base}/scaling_max_freq": f"{allowed}\n",
        f"{base}/cpuinfo_max_freq": f"{hardware}\n",
        f"{base}/scaling_governor": f"{governor}\n",
    }


def supply(name: str, **files: str) -> dict[str, str]:
    return {f"sys/class/power_supply/{name}/{key}": f"{value}\n" for key, value in files.items()}


NVPMODEL_NANO = """
# < POWER_MODEL ID=9 NAME=COMMENT >
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< PM_CONFIG DEFAULT=1 >
"""


def orin_nano(mode: int | None, cpu: int, memory: int) -> dict[str, str]:
    """An Orin Nano developer kit of JetPack 6.2; clocks in kHz and Hz."""
    files = {
        **device_tree("nvidia,p3768-0000+p3767-0005-super", "nvidia,p3767-0005", "nvidia,tegra234"),
        **meminfo(7_801_000),
        **arm_cpuinfo(*6 * ["0xd42"]),
        **cpufreq(0, cpu, 1_728_000),
        **cpufreq(4, cpu, 1_728_000),
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic\n",
        "etc/nvpmodel.conf": NVPMODEL_NANO,
        "sys/devices/system/cpu/online": "0-5\n",
        "sys/kernel/nvpmodel_clk_cap/emc": f"{memory}\n",
    }
    return files if mode is None else files | {"var/lib/nvpmodel/status": f"pmode:{mode:04}"}


X86 = {"proc/cpuinfo": "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: CPU\nflags\t: avx2\n"}


def measured(**changes: Any) -> machine.Measured:
    """What a machine of 20 GB/s might measure, as of this one."""
    values: dict[str, Any] = {
        "read": {1: 15e9, 2: 20e9},
        "matmul": {"Q4_0": {1: 5e10, 8: 1e10, 64: 2e9}, "Q8_0": {1: 4e10, 8: 1e10, 64: 2e9}},
        "attend": {"f16 64x1": 1e8, "q8 128x4": 5e7},
        "fp32": 2e10,
        "disk": (machine.DiskRead(16 << 10, 1, 2e8), machine.DiskRead(1 << 20, 8, 3e9)),
        "disk_note": "",
        "isa": machine.isa(),
        "threads": 2,
        "share": 1.0,
        "measured": int(time.time()),
        "machine": machine.machine_key(),
    }
    return machine.Measured(**{**values, **changes})
