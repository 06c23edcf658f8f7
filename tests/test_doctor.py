"""`edgert doctor`: its findings, from machines that files describe, and the command as a process."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_process import edgert
from edgert.platforms.detect import Limits, detect, detect_limits, detect_memory
from edgert.platforms.recognise import detect_platform
from edgert.platforms.state import Power, Swap, detect_modes, detect_swap
from machine_files import (
    NVPMODEL_NANO,
    V2_MOUNT,
    X86,
    arm_cpuinfo,
    cpufreq,
    device_tree,
    measured,
    meminfo,
    orin_nano,
    supply,
    write,
)

from edgert.cli import doctor
from edgert.cli.findings import Examined, OnnxRuntime, findings
from edgert.machine import DiskRead

GIB = 1 << 30


def examined(root: Path, files: dict[str, str], **changes: Any) -> Examined:
    write(root, files)
    found = measured()
    values: dict[str, Any] = {
        "machine": replace(detect(), limits=Limits()),
        "here": detect_platform(root),
        "modes": detect_modes(root),
        "swap": detect_swap(root),
        "disk": None,
        "levels": [found.isa],
        "engines": {"native": "1", "llamacpp": "2"},
        "onnxruntime": None,
        "measured": found,
        "not_stored": None,
    }
    return Examined(**{**values, **changes})


def says(e: Examined, pattern: str) -> bool:
    return any(re.search(pattern, sentence) for sentence in findings(e))


PI = {
    **device_tree("raspberrypi,5-model-b", "brcm,bcm2712"),
    **meminfo(4_142_000),
    **cpufreq(0, 2_400_000, 2_400_000, "performance"),
}


def test_board_as_it_should_be(tmp_path: Path) -> None:
    e = examined(tmp_path, PI)
    affinity = [s for s in findings(e) if "CPU affinity" not in s and "AVX-512" not in s]
    assert len(affinity) == 3, affinity
    assert "Memory gives 20.0 GB/s" in affinity[0] and "200 tok/s" in affinity[0]
    assert "Memory limits generation" in affinity[1] and "56.2 GB/s" in affinity[1]
    assert "should stay below" in affinity[2]


def test_arithmetic_that_limits(tmp_path: Path) -> None:
    e = examined(tmp_path, PI, measured=measured(matmul={"Q4_0": {1: 1e10}}))
    assert says(e, r"Arithmetic limits generation: .* 2 threads take 11\.2 GB/s .* memory gives 20\.0")
    assert not says(examined(tmp_path, PI, measured=measured(matmul={})), "limits generation")


def test_threads_that_add_little(tmp_path: Path) -> None:
    e = examined(tmp_path, PI, measured=measured(read={1: 8e9, 2: 19.5e9, 4: 20e9}))
    assert says(e, "^2 threads already read as fast as 4")


@pytest.mark.parametrize(
    ("mode", "number", "command"),
    [("15W", 0, "sudo nvpmodel -m 2"), ("25W", 1, "sudo nvpmodel -m 2"), ("MAXN_SUPER", 2, None)],
)
def test_power_mode_below_the_best(tmp_path: Path, mode: str, number: int, command: str | None) -> None:
    e = examined(tmp_path, orin_nano(number, 1_344_000, 3_199_000_000))
    assert says(e, f"Power mode {mode} allows") == bool(command)
    if command:
        assert says(e, rf"MAXN_SUPER allows 6 cores at 1728 MHz .*: {command}$")
        assert not says(e, "is held at"), "the mode says it already"


def test_power_mode_that_no_file_describes(tmp_path: Path) -> None:
    files = orin_nano(2, 1_344_000, 3_199_000_000)
    conf = NVPMODEL_NANO.replace("MAXN_SUPER", "OWN")
    e = examined(tmp_path, {**files, "etc/nvpmodel.conf": conf})
    assert e.here.mode == "OWN" and not says(e, "nvpmodel")
    assert says(e, r"held at 1344 of 1728 MHz")


def test_governor(tmp_path: Path) -> None:
    slow = PI | cpufreq(0, 2_400_000, 2_400_000, "ondemand")
    e = examined(tmp_path, slow)
    assert says(e, r"governor ondemand.*echo performance \| sudo tee")
    on_battery = replace(e.here, power=Power(True, 0.4))
    assert not says(replace(e, here=on_battery), "governor"), "clocks are the least of it"


def test_battery(tmp_path: Path) -> None:
    battery = supply("BAT0", type="Battery", status="Discharging", capacity="40")
    assert says(examined(tmp_path, X86 | battery), r"runs on battery \(40% left\).*connect")
    assert not says(examined(tmp_path / "mains", X86), "battery")


def test_container(tmp_path: Path) -> None:
    files = {
        **PI,
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/memory.max": "2000000000\n",
        "sys/fs/cgroup/memory.current": "500000000\n",
    }
    e = examined(tmp_path, files)
    limits, memory = detect_limits(tmp_path), detect_memory(tmp_path)
    e = replace(e, machine=replace(e.machine, limits=limits, memory=memory))
    assert says(e, r"grants 1\.5 CPUs; edgert starts \d threads") and says(e, r"--cpus")
    assert says(e, r"caps memory at 2\.0 GB, of which 1\.5 GB are left") and says(e, r"--memory")
    assert says(e, r"stay below 1\.4 GB")


def test_affinity(tmp_path: Path) -> None:
    e = examined(tmp_path, PI)
    e = replace(e, machine=replace(e.machine, cpu=replace(e.machine.cpu, logical=8, usable=3)))
    assert says(e, "may use 3 of 8 processors")


@pytest.mark.parametrize(
    ("isa", "levels", "arch", "pattern"),
    [
        ("scalar", ["scalar"], "x86_64", "No vector kernels.*hundred times slower.*AVX2, FMA and F16C"),
        ("scalar", ["scalar"], "aarch64", "need asimd, asimddp and asimdhp"),
        ("avx2", ["avx2", "scalar"], "x86_64", "Without AVX-512 VNNI .* twice as long"),
        ("avx2", ["avx512vnni", "avx2", "scalar"], "x86_64", "holds edgert at avx2; .* use avx512vnni"),
    ],
)
def test_instruction_sets(tmp_path: Path, isa: str, levels: list[str], arch: str, pattern: str) -> None:
    e = examined(tmp_path, PI, measured=measured(isa=isa), levels=levels)
    e = replace(e, machine=replace(e.machine, cpu=replace(e.machine.cpu, arch=arch)))
    assert says(e, pattern)


def test_memory_far_below_the_board(tmp_path: Path) -> None:
    slow = measured(read={1: 5e9})
    assert says(examined(tmp_path / "pi", PI, measured=slow), "far below the .*Raspberry Pi 5.*throttled")
    assert not says(examined(tmp_path / "pi", PI), "far below")
    guessed = examined(tmp_path / "x86", X86 | meminfo(16_000_000), measured=slow)
    assert guessed.here.guessed and not says(guessed, "far below")
    # 15W lowers the memory's clock, and with it what to expect.
    nano = examined(tmp_path / "nano", orin_nano(2, 1, 1), measured=measured(read={1: 25e9}))
    assert says(nano, "far below the 56.0 GB/s estimated")
    nano = examined(tmp_path / "nano", orin_nano(0, 1, 1), measured=measured(read={1: 25e9}))
    assert not says(nano, "far below")


def test_swap(tmp_path: Path) -> None:
    e = examined(tmp_path, PI | {"proc/swaps": "Filename\n/dev/zram0 partition 900000 500000 5\n"})
    assert says(e, r"512\.0 MB are swapped out compressed in memory \(zram\)")
    assert says(replace(e, swap=Swap(GIB, False)), r"1\.1 GB are swapped out on disk")
    assert not says(replace(e, swap=Swap(1 << 20, True)), "swapped")


def test_disk(tmp_path: Path) -> None:
    slow = measured(disk=(DiskRead(16 << 10, 8, 5e7), DiskRead(1 << 20, 8, 6e7)))
    e = examined(tmp_path, orin_nano(2, 1, 1), disk="sd", measured=slow)
    assert says(e, r"on the SD card \(60 MB/s\); an NVMe disk .* about 55 times faster: set EDGERT_CACHE")
    assert not says(e, "The disk gives")
    assert says(replace(e, disk="nvme"), r"The disk gives 60 MB/s where PCIe 3\.0 x4 .* about 3300")
    assert not says(replace(e, disk=None), "SD card|The disk")
    assert not says(examined(tmp_path, orin_nano(2, 1, 1), disk="nvme"), "The disk")
    note = "The disk was not measured: so."
    assert note in findings(examined(tmp_path, PI, measured=measured(disk=(), disk_note=note)))


def test_onnxruntime_on_a_jetson(tmp_path: Path) -> None:
    cpu = OnnxRuntime({"onnxruntime": "1.32.0"}, ("cpu",))
    e = examined(tmp_path / "nano", orin_nano(2, 1_728_000, 3_199_000_000), onnxruntime=cpu)
    assert says(e, "onnxruntime has no GPU provider.*L4T 36.4.7")
    for installed in (OnnxRuntime({"onnxruntime-gpu": "1.24.1"}, ("cpu", "cuda", "tensorrt")), None):
        assert not says(replace(e, onnxruntime=installed), "onnxruntime")
    assert not says(examined(tmp_path / "pi", PI, onnxruntime=cpu), "onnxruntime")


def test_two_packages_of_onnxruntime_and_an_old_one(tmp_path: Path) -> None:
    both = OnnxRuntime({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.32.0"}, ("cpu", "cuda"))
    e = examined(tmp_path, PI, onnxruntime=both)
    assert says(e, "are both installed.*pip uninstall onnxruntime onnxruntime-gpu, then install one")
    assert not says(e, "too old")
    old = OnnxRuntime({"onnxruntime": "1.23.2"}, ("cpu",))
    assert says(replace(e, onnxruntime=old), r"onnxruntime 1\.23\.2 is too old.*1\.24 or newer")
    facts = doctor.describe(e)
    assert json.loads(json.dumps(facts))["onnxruntime"]["providers"] == ["cpu", "cuda"]
    doctor._print(facts)


def test_onnxruntime_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"onnxruntime/__init__.py": "raise RuntimeError\n", "onnxruntime/capi/x.so": ""}
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
    assert doctor._onnxruntime() is None
    monkeypatch.delitem(sys.modules, "onnxruntime")
    for package, version in (("onnxruntime", "1.30.0"), ("onnxruntime_gpu", "1.31.0")):
        files[f"{package}-{version}.dist-info/METADATA"] = f"Name: {package}\nVersion: {version}\n"
    write(tmp_path, files)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = doctor._onnxruntime()
    assert found == OnnxRuntime({"onnxruntime": "1.30.0", "onnxruntime-gpu": "1.31.0"}, ("cpu",))
    for name in ("shared", "cuda", "tensorrt"):
        (tmp_path / f"onnxruntime/capi/libonnxruntime_providers_{name}.so").touch()
    found = doctor._onnxruntime()
    assert found and found.providers == ("cpu", "cuda", "tensorrt")


def test_other_engine_and_busy_machine(tmp_path: Path) -> None:
    e = examined(tmp_path, PI, engines={"native": "1", "llamacpp": None}, not_stored="others were busy")
    assert says(e, r"edgert\[llamacpp\]") and says(e, "was not stored: others were busy")


def test_unknown_machine(tmp_path: Path) -> None:
    e = examined(tmp_path, meminfo(8_000_000) | arm_cpuinfo("0xd05"), measured=measured(read={1: 1e9}))
    assert e.here.platform is None and not says(e, "far below")
    facts = doctor.describe(e)
    assert facts["board"]["name"] is None and json.loads(json.dumps(facts))
    doctor._print(facts)


@pytest.mark.alone
def test_command(tmp_path: Path) -> None:
    began = time.monotonic()
    done = edgert("doctor", "--json", EDGERT_CACHE=str(tmp_path))
    took = time.monotonic() - began
    assert done.returncode == 0 and done.stderr == ""
    facts = json.loads(done.stdout)
    assert took < 15, facts["measured"]["share"]
    assert facts["isa"]["selected"] == facts["isa"]["available"][0]
    assert facts["isa"]["available"][-1] == "scalar"
    assert facts["cpu"]["usable"] == len(os.sched_getaffinity(0)) and facts["threads"] >= 1
    assert all(1e8 < rate < 5e12 for rate in facts["measured"]["read"].values())
    assert facts["memory"]["total"] > facts["memory"]["available"] > 0
    assert facts["engines"]["native"] and facts["cache"]["directory"] == str(tmp_path)
    assert "tok/s" in facts["findings"][0]
    stored = facts["measured"]["stored"]
    assert stored == (facts["measured"]["share"] >= 0.9)
    assert [p.name for p in tmp_path.iterdir()] == ["machine.json"] * stored


@pytest.mark.alone
def test_command_with_the_portable_kernels(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a directory")
    done = edgert("doctor", EDGERT_CACHE=str(tmp_path / "cache"), EDGERT_ISA="scalar")
    assert done.returncode == 0, done.stderr
    assert re.search(r"isa +scalar \(also possible", done.stdout) or "isa         scalar\n" in done.stdout
    assert "No vector kernels in use" in done.stdout
    assert "The disk was not measured" in done.stdout and "was not stored" in done.stdout
