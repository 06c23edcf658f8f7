"""Describing machines from directories that look like theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgert.platforms import recognise
from edgert.platforms.detect import (
    Cpu,
    Limits,
    Machine,
    Memory,
    detect,
    detect_cpu,
    detect_limits,
    detect_memory,
    detect_threads,
    usable_processors,
)
from edgert.platforms.recognise import Recognised, detect_platform
from edgert.platforms.state import (
    Clocks,
    Power,
    detect_mode,
)
from machine_files import (
    NVPMODEL_NANO,
    V2_MOUNT,
    X86,
    arm_cpuinfo,
    cpufreq,
    device_tree,
    meminfo,
    orin_nano,
    supply,
    write,
)


def test_cgroup_v2_takes_the_tightest_of_the_parents(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user/app\n",
            "proc/self/mountinfo": "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + V2_MOUNT,
            "sys/fs/cgroup/user/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/user/memory.max": "1000000000\n",
            "sys/fs/cgroup/user/memory.current": "400000000\n",
            "sys/fs/cgroup/user/memory.stat": "file 9\ninactive_file 250000000\nactive_file 50000000\n",
            "sys/fs/cgroup/user/app/cpu.max": "max 100000\n",
            "sys/fs/cgroup/user/app/memory.max": "2000000000\n",
            "sys/fs/cgroup/user/app/memory.current": "100000000\n",
        },
    )
    # Files that were read count as used until somebody wants the room.
    assert detect_limits(root) == Limits(2, 1.5, 1_000_000_000, 100_000_000)
    assert detect_limits(root).memory_left == 900_000_000


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
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "136870912\n",
            "sys/fs/cgroup/memory/memory.stat": (
                "inactive_file 1\ntotal_inactive_file 99999990\ntotal_active_file 10\n"
            ),
            "sys/fs/cgroup/memory/sub/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert detect_limits(root) == Limits(1, 0.5, 536870912, 36870912)


@pytest.mark.parametrize(("cores", "quota", "most"), [(1, "max", 1), (2, "max", 2), (2, "50000", 1)])
def test_threads_are_the_cores_that_may_be_used(tmp_path: Path, cores: int, quota: str, most: int) -> None:
    """Two processors of one core are one thread's worth."""
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/cpu.max": f"{quota} 100000\n",
    }
    for i in range(2):
        files[f"sys/devices/system/cpu/cpu{i}/topology/core_id"] = f"{i % cores}\n"
        files[f"sys/devices/system/cpu/cpu{i}/topology/physical_package_id"] = "0\n"
    root = write(tmp_path, files | meminfo(1_000_000))
    assert detect_threads(root) == min(most, usable_processors()) == detect(root).threads


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


# Boards, described by the files that they have.


def found(root: Path, files: dict[str, str]) -> Recognised:
    return detect_platform(write(root, files))


def name_of(recognised: Recognised) -> str | None:
    return recognised.platform.name if recognised.platform else None


def test_orin_nano_super_at_maxn(tmp_path: Path) -> None:
    board = found(tmp_path, orin_nano(2, 1_728_000, 3_199_000_000))
    assert (name_of(board), board.mode, board.l4t) == ("jetson-orin-nano-8gb", "MAXN_SUPER", "36.4.7")
    assert board.clocks == Clocks(6, 1_728_000_000, 1_728_000_000, "schedutil", 3_199_000_000)
    assert board.platform and board.mode and board.platform.in_mode(board.mode) == board.platform
    assert "p3767-0005-super" in board.reason and board.power == Power()


def test_orin_nano_super_at_15w(tmp_path: Path) -> None:
    board = found(tmp_path, orin_nano(0, 1_497_600, 2_133_000_000))
    assert (board.mode, board.clocks.cpu_allowed, board.clocks.memory) == (
        "15W",
        1_497_600_000,
        2_133_000_000,
    )
    assert board.platform and board.platform.in_mode("15W").clusters[0].clock == board.clocks.cpu_allowed
    assert board.platform.memory.total == 8 << 30


def test_jetson_that_never_left_its_first_mode(tmp_path: Path) -> None:
    assert found(tmp_path, orin_nano(None, 1_344_000, 3_199_000_000)).mode == "25W"


@pytest.mark.parametrize("status", ["pmode:0009", "", "pmode:"])
def test_power_mode_that_cannot_be_told(tmp_path: Path, status: str) -> None:
    conf = NVPMODEL_NANO.replace("DEFAULT=1", "DEFAULT=7")
    root = write(tmp_path, {"etc/nvpmodel.conf": conf, "var/lib/nvpmodel/status": status})
    assert detect_mode(root) is None


def test_agx_orin_64(tmp_path: Path) -> None:
    board = found(
        tmp_path,
        {
            **device_tree("nvidia,p3737-0000+p3701-0005", "nvidia,p3701-0005", "nvidia,tegra234"),
            **meminfo(64_350_000),
            **cpufreq(0, 1_728_000, 2_201_600),
            **cpufreq(4, 1_728_000, 2_201_600),
            "etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref\n",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=2 NAME=MODE_30W >\n",
            "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet\n",
            "sys/devices/system/cpu/online": "0-7\n",
            "sys/kernel/nvpmodel_emc_cap/emc_iso_cap": "0\n",  # no cap
        },
    )
    assert (name_of(board), board.mode, board.l4t) == ("jetson-agx-orin-64gb", "MODE_30W", "35.4.1")
    assert board.clocks.online == 8 and board.clocks.memory is None
    assert board.platform and board.platform.in_mode("MODE_30W").cores == 8
    assert board.platform.memory.total == 64 << 30


def test_raspberry_pi_5(tmp_path: Path) -> None:
    board = found(
        tmp_path,
        {
            **device_tree("raspberrypi,5-model-b", "brcm,bcm2712"),
            **meminfo(4_142_000),
            **cpufreq(0, 2_400_000, 2_400_000, "ondemand"),
        },
    )
    assert name_of(board) == "raspberry-pi-5" and board.platform and board.platform.memory.total == 4 << 30
    assert (board.mode, board.l4t, board.clocks.governor) == (None, None, "ondemand")


def test_rk3588(tmp_path: Path) -> None:
    board = found(
        tmp_path,
        {
            **device_tree("radxa,rock-5b", "rockchip,rk3588"),
            **meminfo(16_200_000),
            **cpufreq(0, 1_800_000, 1_800_000, "powersave"),
            **cpufreq(4, 2_256_000, 2_400_000, "performance"),
            **cpufreq(6, 2_256_000, 2_400_000, "performance"),
            "sys/class/devfreq/dmc/max_freq": "2112000000\n",
        },
    )
    assert name_of(board) == "rk3588" and board.platform and board.platform.memory.total == 16 << 30
    assert board.clocks == Clocks(None, 2_256_000_000, 2_400_000_000, "performance", 2_112_000_000)


def test_board_that_no_file_describes(tmp_path: Path) -> None:
    board = found(tmp_path, device_tree("hardkernel,odroid-m1", "rockchip,rk3568") | arm_cpuinfo("0xd05"))
    assert board.platform is None and "hardkernel,odroid-m1" in board.reason


@pytest.mark.parametrize(
    ("parts", "kib", "khz", "name"),
    [
        (4 * ["0xd0b"], 8_050_000, 2_400_000, "raspberry-pi-5"),
        (4 * ["0xd05"] + 4 * ["0xd0b"], 8_050_000, 2_400_000, "rk3588"),
        (12 * ["0xd42"], 64_350_000, 2_201_600, "jetson-agx-orin-64gb"),
        (6 * ["0xd42"], 7_801_000, 1_728_000, "jetson-orin-nano-8gb"),
        (6 * ["0xd42"], 7_801_000, 1_510_400, "jetson-orin-nano-8gb"),
        (6 * ["0xd42"], 7_801_000, 1_984_000, "jetson-orin-nx-8gb"),
        (14 * ["0xd83"], 128_825_804, 2_601_000, "jetson-thor-t5000"),
        (4 * ["0xd0b"], 64_000_000, 2_400_000, None),
        (4 * ["0xd08"], 8_050_000, 1_800_000, None),
        (12 * ["0xd42"], 30_600_000, 2_201_600, "jetson-agx-orin-64gb"),  # the kit with 32 GB
        (8 * ["0xd42"], 30_600_000, 2_201_600, None),  # the 32 GB module, or the kit with 32 GB
    ],
)
def test_container_that_hides_the_device_tree(
    tmp_path: Path, parts: list[str], kib: int, khz: int, name: str | None
) -> None:
    board = found(tmp_path, arm_cpuinfo(*parts) | meminfo(kib) | cpufreq(0, khz, khz))
    assert name_of(board) == name and board.reason.startswith("no device tree")


def test_x86_laptop_on_battery(tmp_path: Path) -> None:
    board = found(
        tmp_path,
        {
            **X86,
            **meminfo(16_000_000),
            **supply("AC", type="Mains", online="0"),
            **supply("BAT0", type="Battery", status="Discharging", capacity="40", scope="System"),
            **supply("BAT1", type="Battery", status="Unknown", capacity="80"),
            **supply("hidpp_battery_0", type="Battery", status="Discharging", scope="Device"),
        },
    )
    assert name_of(board) == "x86-laptop-ddr4" and "not readable" in board.reason
    assert board.platform and board.platform.memory.total == 16 << 30
    assert board.power == Power(True, 0.6) and board.guessed


@pytest.mark.parametrize(
    ("kind", "name"),
    [(0x1A, "ddr4"), (0x1E, "ddr4"), (0x22, "ddr5"), (0x23, "lpddr5x"), (0x18, "ddr4")],
)
def test_x86_memory_by_smbios(tmp_path: Path, kind: int, name: str) -> None:
    root = write(tmp_path, X86 | meminfo(32_000_000))
    raw = root / "sys/firmware/dmi/entries/17-0/raw"
    raw.parent.mkdir(parents=True)
    raw.write_bytes(bytes(0x12) + bytes([kind, 0]))
    board = detect_platform(root)
    assert (name_of(board), board.guessed) == (f"x86-laptop-{name}", kind == 0x18)


def test_machine_that_is_neither_arm_nor_x86(tmp_path: Path) -> None:
    board = found(tmp_path, {"proc/cpuinfo": "processor\t: 0\nisa\t: rv64imafdc\n"})
    assert board.platform is None and "no platform file" in board.reason


@pytest.mark.parametrize(("brand", "name"), [("Apple M1", "apple-m1"), ("Apple M4 Pro", None), ("", None)])
def test_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brand: str, name: str | None) -> None:
    monkeypatch.setattr(recognise, "_brand", lambda root: brand)
    board = found(tmp_path, meminfo(16_777_216))
    assert name_of(board) == name and (brand or "no platform file") in board.reason


def test_brand_of_a_mac_is_asked_of_sysctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> object:
        assert command == ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return type("Done", (), {"stdout": "Apple M2\n"})

    monkeypatch.setattr(recognise.sys, "platform", "darwin")
    monkeypatch.setattr(recognise.subprocess, "run", run)
    assert recognise._brand(recognise.ROOT) == "Apple M2"
    assert recognise._brand(tmp_path) == ""


@pytest.mark.parametrize("version", [1, 2])
def test_container_on_a_raspberry_pi(tmp_path: Path, version: int) -> None:
    """What limits the container is its own; the board is the host's."""
    if version == 2:
        groups = {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/memory.max": "2147483648\n",
            "sys/fs/cgroup/memory.current": "147483648\n",
        }
    else:
        groups = {
            "proc/self/cgroup": "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n",
            "proc/self/mountinfo": (
                "31 23 0:28 /docker/a /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"
                "32 23 0:29 /docker/a /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
            ),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "2147483648\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "147483648\n",
        }
    root = write(tmp_path, groups | arm_cpuinfo(*4 * ["0xd0b"]) | meminfo(8_050_000))
    machine = detect(root)
    assert machine.limits == Limits(version, 2.0, 2147483648, 147483648)
    assert machine.available_memory == 2_000_000_000
    board = detect_platform(root)
    assert board.platform and (board.platform.name, board.platform.memory.total) == (
        "raspberry-pi-5",
        8 << 30,
    )
