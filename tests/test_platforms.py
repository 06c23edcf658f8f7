"""Describing machines from directories that look like theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgert.platforms.detect import (
    Cpu,
    Limits,
    Machine,
    Memory,
    detect,
    detect_cpu,
    detect_limits,
    detect_memory,
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2_MOUNT = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def test_cgroup_v2_takes_the_tightest_of_the_parents(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user/app\n",
            "proc/self/mountinfo": "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + V2_MOUNT,
            "sys/fs/cgroup/user/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/user/memory.max": "1000000000\n",
            "sys/fs/cgroup/user/memory.current": "400000000\n",
            "sys/fs/cgroup/user/app/cpu.max": "max 100000\n",
            "sys/fs/cgroup/user/app/memory.max": "2000000000\n",
            "sys/fs/cgroup/user/app/memory.current": "100000000\n",
        },
    )
    assert detect_limits(root) == Limits(2, 1.5, 1_000_000_000, 400_000_000)


def test_cgroup_v2_without_limits(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/cpu.max": "max 100000\n",
            "sys/fs/cgroup/memory.max": "max\n",
        },
    )
    assert detect_limits(root) == Limits(2, None, None, None)


def test_cgroup_v1_in_a_container(tmp_path: Path) -> None:
    """The mount shows only the container's own part of the hierarchy, at its top."""
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/docker/abc/sub\n4:cpu,cpuacct:/docker/abc\n0::/\n",
            "proc/self/mountinfo": (
                "31 23 0:28 /docker/abc /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"
                "32 23 0:29 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
            ),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "536870912\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "36870912\n",
            "sys/fs/cgroup/memory/sub/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert detect_limits(root) == Limits(1, 0.5, 536870912, 36870912)


def test_cgroup_v1_without_limits(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:cpu:/\n",
            "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert detect_limits(root) == Limits(1, None, None, None)


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    assert detect_limits(tmp_path) == Limits()


def cpu_files(count: int, threads_per_core: int) -> dict[str, str]:
    files = {}
    for i in range(count):
        core = i // threads_per_core
        base = f"sys/devices/system/cpu/cpu{i}"
        siblings = f"{core * threads_per_core}-{core * threads_per_core + threads_per_core - 1}"
        files[f"{base}/topology/core_id"] = f"{core}\n"
        files[f"{base}/topology/physical_package_id"] = "0\n"
        for index, (level, kind, size, shared) in enumerate(
            [
                ("1", "Data", "32K", siblings),
                ("2", "Unified", "1024K", siblings),
                ("3", "Unified", "16M", f"0-{count - 1}"),
            ]
        ):
            cache = f"{base}/cache/index{index}"
            files |= {f"{cache}/level": level, f"{cache}/type": kind, f"{cache}/size": size}
            files[f"{cache}/shared_cpu_list"] = shared
    return files


def test_x86(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = (
        "processor\t: 0\nmodel name\t: Fast CPU 9000\nflags\t\t: fpu avx avx2 fma f16c\n\nprocessor\t: 1\n"
    )
    root = write(tmp_path, {"proc/cpuinfo": cpuinfo, **cpu_files(8, 2)})
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    cpu = detect_cpu(root)
    assert (cpu.model, cpu.logical, cpu.cores) == ("Fast CPU 9000", 8, 4)
    assert cpu.features == ("avx", "avx2", "fma", "f16c")
    assert [(c.level, c.kind, c.nbytes, c.instances) for c in cpu.caches] == [
        (1, "data", 4 << 15, 4),
        (2, "unified", 4 << 20, 4),
        (3, "unified", 16 << 20, 1),
    ]
    assert cpu.last_level_cache == 16 << 20


def test_arm_board_is_named_by_its_device_tree(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd fphp asimdhp asimddp\nCPU part\t: 0xd0b\n",
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        },
    )
    cpu = detect_cpu(root)
    assert cpu.model == "Raspberry Pi 5 Model B Rev 1.0"
    assert cpu.features == ("asimd", "asimdhp", "fphp", "asimddp")


def test_memory(tmp_path: Path) -> None:
    text = "MemTotal:       8000 kB\nMemFree: 100 kB\nMemAvailable:    5000 kB\nSwapFree:  7 kB\n"
    assert detect_memory(write(tmp_path, {"proc/meminfo": text})) == Memory(8192000, 5120000, 7168)


def test_memory_without_proc(tmp_path: Path) -> None:
    memory = detect_memory(tmp_path)
    assert memory.total >= memory.available > 0


def machine(cores: int, usable: int, limits: Limits) -> Machine:
    cpu = Cpu("x", "x86_64", 2 * cores, cores, usable, (), ())
    return Machine("Linux", cpu, Memory(100, 60, 0), limits)


@pytest.mark.parametrize(
    ("cores", "usable", "limits", "threads", "memory"),
    [
        (4, 8, Limits(), 4, 60),
        (4, 3, Limits(), 3, 60),
        (4, 8, Limits(2, 1.5, 50, 20), 2, 30),
        (4, 8, Limits(2, 0.2, 50, 70), 1, 0),
        (4, 8, Limits(2, None, 1000, 1), 4, 60),
    ],
)
def test_what_this_process_may_use(
    cores: int, usable: int, limits: Limits, threads: int, memory: int
) -> None:
    found = machine(cores, usable, limits)
    assert (found.threads, found.available_memory) == (threads, memory)


def test_this_machine() -> None:
    found = detect()
    assert found.cpu.model and 1 <= found.cpu.cores <= found.cpu.logical
    assert found.memory.total > 0
