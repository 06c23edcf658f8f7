"""What a row says of the machine: sensors and settings of boards, described by directories of their files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from edgert.bench import context, sensors
from edgert.bench.jetson import board_fields, is_jetson, records
from edgert.bench.quiet import Watch
from edgert.bench.sensors import Energy
from machine_files import write

CPU = "sys/devices/system/cpu"


def test_temperatures_and_clocks(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "48500\n",
            "sys/class/thermal/thermal_zone1/temp": "nonsense\n",
            **{f"{CPU}/cpu{i}/cpufreq/scaling_cur_freq": f"{1500000 + i}\n" for i in (0, 1, 10)},
        },
    )
    assert sensors.temperatures(root) == {"cpu-thermal": 48.5}
    assert sensors.clocks(root) == [1500.0, 1500.001, 1500.01]
    empty = tmp_path / "empty"
    assert sensors.temperatures(empty) == {} and sensors.clocks(empty) == []


def test_energy_of_rapl_counts_over_its_range(tmp_path: Path) -> None:
    zone = "sys/class/powercap/intel-rapl:0"
    counter = tmp_path / zone / "energy_uj"
    write(
        tmp_path,
        {
            f"{zone}/energy_uj": "9000000\n",
            f"{zone}/max_energy_range_uj": "10000000\n",
            "sys/class/powercap/intel-rapl:0:0/energy_uj": "5\n",  # a part of package 0
        },
    )
    energy = Energy(tmp_path)
    assert energy.source == "RAPL"
    counter.write_text("9500000\n")
    assert energy.take() == pytest.approx(0.5)
    counter.write_text("1000000\n")
    assert energy.take() == pytest.approx(1.5)
    energy.close()


@pytest.mark.parametrize("rails", [("VDD_IN", "VDD_SOC"), ("VDD_CPU_CV", "VIN_SYS_5V0")])
def test_energy_of_a_jetson_is_sampled(tmp_path: Path, rails: tuple[str, str]) -> None:
    monitor = "sys/class/hwmon/hwmon3"
    content = {f"{monitor}/name": "ina3221\n", f"{monitor}/in7_label": "sum of shunt voltages\n"}
    for channel, name in enumerate(rails, 1):
        content[f"{monitor}/in{channel}_label"] = name
        content[f"{monitor}/in{channel}_input"] = "5000"  # mV
        content[f"{monitor}/curr{channel}_input"] = "2000"  # mA
    energy = Energy(write(tmp_path, content))
    began = time.monotonic()
    energy.take()
    time.sleep(0.3)
    joules, seconds = energy.take(), time.monotonic() - began
    energy.close()
    watts = 10 if "VDD_IN" in rails else 20  # the input as a whole, or the rails that make it up
    assert energy.source == "INA3221" and joules is not None
    assert 0.5 * watts * seconds < joules < 1.2 * watts * seconds


def test_a_machine_that_shows_nothing_has_no_energy(tmp_path: Path) -> None:
    energy = Energy(tmp_path)
    assert energy.source is None and energy.take() is None
    energy.close()


def test_a_jetson_is_described(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
            "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet\n",
            f"{CPU}/cpufreq/policy0/scaling_max_freq": "1510400\n",
            f"{CPU}/cpufreq/policy0/cpuinfo_max_freq": "1728000\n",
            f"{CPU}/cpufreq/policy0/scaling_governor": "schedutil\n",
            "proc/meminfo": "MemTotal: 7800000 kB\nMemAvailable: 6000000 kB\n",
        },
    )
    machine = context.machine(root)
    assert (machine["l4t"], machine["power_mode"]) == ("36.4.3", "MAXN_SUPER")
    assert (machine["governor"], machine["max_clock"]) == ("schedutil", 1510400000)
    assert is_jetson(machine) and board_fields(machine["board"], machine["memory"]) == {
        "sku": "orin-nano",
        "generation": "orin",
        "product_line": "orin-nano",
        "variant": "orin-nano-8gb",
    }
    assert not is_jetson({"l4t": None, "board": "Raspberry Pi 5"})


@pytest.mark.parametrize(
    ("board", "gigabytes", "line", "variant"),
    [
        ("NVIDIA Jetson AGX Orin Developer Kit", 61, "orin-agx", "orin-agx-64gb"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 7.4, "orin-nx", "orin-nx-8gb"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 122, "thor-agx", "thor-t5000"),
        ("Raspberry Pi 5", 8, "unknown", "unknown"),
        (None, 8, "unknown", "unknown"),
    ],
)
def test_boards_have_nvidias_names(board: str | None, gigabytes: float, line: str, variant: str) -> None:
    fields = board_fields(board, int(gigabytes * 2**30))
    assert (fields["product_line"], fields["variant"]) == (line, variant)


def test_records_have_nvidias_fields() -> None:
    common: dict[str, Any] = {
        "label": "edgert flash",
        "threads": 6,
        "n_depth": 0,
        "model": "m.gguf",
        "board": "NVIDIA Jetson Orin NX",
        "memory": 16 * 2**30,
        "l4t": "36.4.3",
        "power_mode": "15W",
        "warnings": [],
    }
    prompt = {**common, "test": "pp512", "n_prompt": 512, "n_gen": 0, "time_to_first_token": 0.4}
    generation = {**common, "test": "tg128", "n_prompt": 0, "n_gen": 128, "median_ts": 50.0}
    (record,) = records([prompt, generation, {**generation, "n_depth": 2048}])
    assert record.keys() >= {
        *("skill", "runtime", "model", "sku", "generation", "product_line", "variant", "l4t", "container"),
        *("config", "metrics", "warnings"),
    }
    assert record["config"] == {"n_prompt": 512, "n_gen": 128, "n_gpu_layers": 0}
    assert record["metrics"] == {
        "ttft_ms_p50": 400.0,
        "itl_ms_p50": 20.0,
        "tpot_ms_p50": 20.0,
        "throughput_tok_s": 50.0,
    }
    assert record["warnings"] == ["nvpmodel is 15W; MAXN preferred for comparable results"]


def test_the_hash_of_a_model_is_kept_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGERT_CACHE", str(tmp_path / "cache"))
    model, read = tmp_path / "m.gguf", []
    real = context.file_sha256
    monkeypatch.setattr(context, "file_sha256", lambda path: read.append(path) or real(path))
    model.write_bytes(b"one")
    first = context.model_sha256(model)
    assert context.model_sha256(model) == first and len(read) == 1
    model.write_bytes(b"other")
    assert context.model_sha256(model) != first and len(read) == 2
    (tmp_path / "cache/sha256.json").write_text("broken")
    assert context.model_sha256(model) == real(model)


@pytest.mark.alone
def test_work_of_workers_is_not_the_work_of_others() -> None:
    code = "import sys, time\nprint(flush=True)\nt = time.time()\nwhile time.time() < t + 0.6: pass\n"
    code += "sys.stdin.read()"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        counted, ignored = Watch([worker.pid]), Watch()
        time.sleep(0.7)
        difference = ignored.share() - counted.share()
        worker.communicate()
    # It had a processor for most of 0.7 s, if other tests left it one.
    assert 0.2 / (os.cpu_count() or 1) < difference <= 1.0
