"""The state of machines from directories that look like theirs: power, clocks, swap, disk and power modes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from edgert.platforms.state import (
    Clocks,
    Power,
    Swap,
    detect_clocks,
    detect_disk,
    detect_l4t,
    detect_modes,
    detect_power,
    detect_swap,
)
from machine_files import NVPMODEL_NANO, cpufreq, supply, write


@pytest.mark.parametrize(
    ("files", "power"),
    [
        ({}, Power()),
        (supply("AC", type="Mains", online="1"), Power(False)),
        (supply("usb", type="USB", online="0"), Power()),
        (supply("BAT0", type="Battery", status="Charging", capacity="10"), Power(False, 0.1)),
        (supply("BAT0", type="Battery", status="Not charging"), Power(False)),
        (
            supply("BAT0", type="Battery", status="Unknown", capacity="99")
            | supply("AC", type="Mains", online="0"),
            Power(True, 0.99),
        ),
        (supply("mouse", type="Battery", status="Discharging", scope="Device"), Power()),
    ],
)
def test_power(tmp_path: Path, files: dict[str, str], power: Power) -> None:
    assert detect_power(write(tmp_path, files)) == power


@pytest.mark.parametrize(
    ("files", "clocks"),
    [
        ({}, Clocks()),
        ({"sys/devices/system/cpu/online": "0-3,6\n"}, Clocks(online=5)),
        ({"sys/devices/system/cpu/online": "a-b\n"}, Clocks()),
        ({"sys/kernel/nvpmodel_clk_cap/emc": "9223372036854775807\n"}, Clocks()),
        (cpufreq(0, 0, 1_000_000), Clocks()),
    ],
)
def test_clocks(tmp_path: Path, files: dict[str, str], clocks: Clocks) -> None:
    assert detect_clocks(write(tmp_path, files)) == clocks


@pytest.mark.parametrize(
    ("text", "release"),
    [("# R39 (release), REVISION: 2.0, GCID: 1\n", "39.2.0"), ("nonsense", None), ("", None)],
)
def test_l4t(tmp_path: Path, text: str, release: str | None) -> None:
    assert detect_l4t(write(tmp_path, {"etc/nv_tegra_release": text})) == release


SWAPS = "Filename Type Size Used Priority\n"


@pytest.mark.parametrize(
    ("rows", "swap"),
    [
        (None, Swap()),
        ("", Swap()),
        ("/dev/zram0 partition 100 0 5\n", Swap()),
        ("/dev/zram0 partition 9000 2000 5\n/swapfile file 100 0 -2\n", Swap(2_048_000, True)),
        ("/dev/zram0 partition 9000 2000 5\n/swapfile file 1000 1000 -2\n", Swap(3_072_000, False)),
    ],
)
def test_swap(tmp_path: Path, rows: str | None, swap: Swap) -> None:
    assert detect_swap(write(tmp_path, {} if rows is None else {"proc/swaps": SWAPS + rows})) == swap


@pytest.mark.parametrize(
    ("device", "kind", "disk"),
    [
        ("pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1/nvme0n1p1", "", "nvme"),
        ("platform/mmc_host/mmc1/mmc1:aaaa/block/mmcblk1/mmcblk1p2", "SD", "sd"),
        ("platform/mmc_host/mmc1/mmc1:aaaa/block/mmcblk1/mmcblk1p2", "MMC", "emmc"),
        ("pci0000:00/0000:00:17.0/ata3/host2/target2:0:0/2:0:0:0/block/sda/sda2", "", "sata"),
        ("virtio/virtio1/block/vda", "", None),
        (None, "", None),
    ],
)
def test_disk(tmp_path: Path, device: str | None, kind: str, disk: str | None) -> None:
    root = write(tmp_path, {"sys/block/mmcblk1/device/type": f"{kind}\n"})
    if device:
        number = root.stat().st_dev
        link = root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
        link.parent.mkdir(parents=True)
        link.symlink_to(f"../../devices/{device}")
    assert detect_disk(root, root) == disk
    assert detect_disk(root / "none", root) is None


def test_power_modes_have_numbers(tmp_path: Path) -> None:
    root = write(tmp_path, {"etc/nvpmodel.conf": NVPMODEL_NANO})
    assert detect_modes(root) == {0: "15W", 1: "25W", 2: "MAXN_SUPER"}
    assert detect_modes(tmp_path / "none") == {}
