"""What the doctor measured, kept for others, and the board a name or this machine stands for."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edgert.platforms import recognise, state
from edgert.platforms.detect import Limits, detect
from machine_files import measured, meminfo, orin_nano, write

from edgert import _native, machine, probe
from edgert.errors import EngineError, UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EDGERT_ISA", raising=False)
    return tmp_path / "cache"


def test_what_is_stored_comes_back(cache: Path) -> None:
    assert machine.load_measured() is None
    here = measured()
    assert machine.store(here) is None and machine.load_measured() == here
    bare = measured(matmul={}, attend={}, fp32=0.0, disk=(), disk_note="The disk was not measured: so.")
    assert machine.store(bare) is None and machine.load_measured() == bare
    assert [path.name for path in cache.iterdir()] == ["machine.json"]


@pytest.mark.parametrize("change", [{"machine": "another"}, {"isa": "another"}, {"read": {}}, {"threads": 0}])
def test_what_is_not_of_this_machine_does_not_count(change: dict[str, Any]) -> None:
    machine.store(measured(**change))
    assert machine.measured_file().exists() and machine.load_measured() is None


def test_another_level_and_a_bad_one(monkeypatch: pytest.MonkeyPatch) -> None:
    machine.store(measured())
    monkeypatch.setenv("EDGERT_ISA", "mmx")
    assert machine.load_measured() is None
    if _native.isa_levels()[0] != "scalar":
        monkeypatch.setenv("EDGERT_ISA", "scalar")
        assert machine.load_measured() is None


def test_another_power_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.store(measured())
    monkeypatch.setattr(state, "detect_mode", lambda: "15W")
    assert machine.load_measured() is None and machine.machine_key().endswith(", 15W")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", machine.VERSION + 1),
        ("version", None),
        ("read", None),
        ("read", [1]),
        ("read", {"one": 1e9}),
        ("read", {"1": -1}),
        ("read", {"1": float("nan")}),
        ("read", {"1": "fast"}),
        ("matmul", {"Q4_0": 1}),
        ("matmul", {"Q4_0": {"1": float("inf")}}),
        ("attend", 3),
        ("disk", [{"request": 1}]),
        ("disk", [1]),
        ("disk", 1),
        ("fp32", None),
        ("measured", float("inf")),
        ("threads", "two"),
    ],
)
def test_damaged_content(key: str, value: object) -> None:
    machine.store(measured())
    content = json.loads(machine.measured_file().read_text())
    machine.measured_file().write_text(json.dumps({**content, key: value}))
    assert machine.load_measured() is None
    del content[key]
    machine.measured_file().write_text(json.dumps(content))
    assert machine.load_measured() is None


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b"[" * 100_000, b'{"version": 1}']
)
def test_damaged_files(cache: Path, text: bytes) -> None:
    cache.mkdir()
    machine.measured_file().write_bytes(text)
    assert machine.load_measured() is None


def test_file_that_is_a_directory(cache: Path) -> None:
    machine.measured_file().mkdir(parents=True)
    assert machine.load_measured() is None
    why = machine.store(measured())
    assert why and "cannot be written" in why
    assert [path.name for path in cache.iterdir()] == ["machine.json"], "no half-written file stays"


def test_cache_that_cannot_be_written(cache: Path) -> None:
    cache.write_text("a file where the directory should be")
    why = machine.store(measured())
    assert why and str(cache) in why and "cannot be written" in why


def test_busy_machine_is_not_remembered() -> None:
    assert machine.store(measured(share=0.7)) == "other processes took 30% of the processors' time"
    assert not machine.measured_file().exists()


def test_importing_is_cheap() -> None:
    code = "import sys, edgert.machine; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"numpy", "edgert._native", "edgert.platforms", "psutil"} & set(done.stdout.split()) == set()


def test_boards_by_name(tmp_path: Path) -> None:
    nano = machine.board("Orin Nano")
    assert nano and (nano.name, nano.clusters[0].clock) == ("jetson-orin-nano-8gb", 1_344_000_000), "25W"
    pi = machine.board("pi5-4gb")
    assert pi and pi.memory.total == 4 << 30 and pi.default_mode is None
    own = tmp_path / "own.toml"
    own.write_text(Path(nano.path).read_text().replace('"jetson-orin-nano-8gb"', '"own"'))
    mine = machine.board(str(own))
    assert mine and (mine.name, mine.clusters) == ("own", nano.clusters)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("orin-nanu", "unknown platform 'orin-nanu'; did you mean 'orin-nano'"),
        ("", "known are .*raspberry-pi-5"),
        ("none.toml", "none.toml: cannot be read"),
        ("pi5-3gb", "did you mean"),
    ],
)
def test_boards_nobody_knows(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        machine.board(name)


def test_board_file_with_something_wrong(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("name = 3\n")
    with pytest.raises(UsageError, match=r"bad\.toml: "):
        machine.board(str(tmp_path / "bad.toml"))


@pytest.mark.parametrize(
    ("files", "clock"),
    [
        (orin_nano(0, 1_497_600, 2_133_000_000), 1_497_600_000),
        (orin_nano(None, 1_344_000, 3_199_000_000), 1_344_000_000),
        # A mode of the system that the file does not describe: the board with nothing clamped.
        (orin_nano(0, 1, 1) | {"etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=OWN >\n"}, 1_728_000_000),
        (meminfo(1000), None),
    ],
)
def test_this_machine_as_a_board(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], clock: int | None
) -> None:
    root = write(tmp_path, files)
    here = recognise.detect_platform(root)
    monkeypatch.setattr(recognise, "detect_platform", lambda: here)
    board = machine.board()
    assert (board and board.clusters[0].clock) == clock


# Measuring.


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("READ_SECONDS", "KERNEL_SECONDS", "DISK_SECONDS"):
        monkeypatch.setattr(probe, name, 0.005)
    monkeypatch.setattr(probe, "TWICE", 0.0)
    monkeypatch.setattr(probe, "DISK_FILE", 8 << 20)


def test_probe(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    here, told = detect(), list[str]()
    found = probe.probe(here, told.append)
    assert set(found.read) == set(probe.thread_counts(here))
    assert set(found.matmul) == set(probe.TYPES) and set(found.matmul["Q4_0"]) == {1, 8, 64}
    assert machine.attend_key("q8", 64, 4) == "q8 64x4" and len(found.attend) == 24
    assert {"f16 64x4", "q8 64x4"} <= set(found.attend)
    assert (found.isa, found.threads, found.machine) == (machine.isa(), here.threads, machine.machine_key())
    assert 0 < found.share <= 1 and found.fp32 > 0
    assert len(found.disk) == 8 or found.disk_note
    assert told[0] == "memory, 1 thread" and told[-1] == "disk"
    assert list(cache.iterdir()) == [], "the file of the disk probe is gone"


def test_machine_without_vector_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(_native, "isa_levels", lambda: ["scalar"])
    found = probe.probe(detect(), lambda _: None)
    assert (found.isa, found.matmul, found.attend, found.fp32) == ("scalar", {}, {}, 0)


def with_limits(cpus: float | None, memory: int | None = None) -> Any:
    here = detect()
    return replace(here, cpu=replace(here.cpu, cores=4, usable=8), limits=Limits(2, cpus, memory, 0))


@pytest.mark.parametrize(
    ("cpus", "counts"), [(None, [1, 2, 4, 8]), (2.5, [1, 2, 3]), (0.5, [1]), (64, [1, 2, 4, 8])]
)
def test_threads_to_measure(cpus: float | None, counts: list[int]) -> None:
    assert probe.thread_counts(with_limits(cpus)) == counts


def test_container_without_memory_to_measure_with() -> None:
    with pytest.raises(EngineError, match=r"needs 320 MiB .* leaves 100 MiB"):
        probe.probe(with_limits(None, 100 << 20), lambda _: None)


def test_share_of_a_machine_with_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that get one second of two; with a quota of one CPU that is all they may have."""
    for quota, share in ((None, 0.5), (1.0, 1.0)):
        clock = iter([0.0, 1.0, 1.0, 2.0])
        cpu = iter([0.0, 0.4, 0.4, 1.4])
        monkeypatch.setattr(probe.time, "perf_counter", lambda clock=clock: next(clock))
        monkeypatch.setattr(probe.time, "process_time", lambda cpu=cpu: next(cpu))
        meter, rates = probe._Meter(quota), iter([3.0, 2.0])
        assert meter.best(2, lambda rates=rates: next(rates)) == 3.0
        meter.settle()
        assert meter.share == pytest.approx(share)


def test_disk_with_little_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1 << 29)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    rows, note = probe.probe_disk(cache, lambda _: None)
    assert rows == () and note == f"The disk was not measured: less than 1 GiB is free in {cache}."


def test_disk_that_fills_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> Any:
        return open("/dev/full", "r+b", buffering=0)  # noqa: PTH123

    monkeypatch.setattr(probe.tempfile, "TemporaryFile", full)
    rows, note = probe.probe_disk(cache, lambda _: None)
    assert rows == () and "cannot be written (No space left on device)" in note


def test_disk_that_is_read_only(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(probe.tempfile, "TemporaryFile", refuse)
    assert probe.probe_disk(cache, lambda _: None) == (
        (),
        f"The disk was not measured: {cache} cannot be written (Read-only file system).",
    )


def test_disk_without_direct_reads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(_native, "probe_disk", lambda *_: (1e8, False))
    rows, note = probe.probe_disk(cache, lambda _: None)
    assert len(rows) == 8 and "no direct reads" in note


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a tmpfs")
def test_disk_that_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    rows, note = probe.probe_disk(Path("/dev/shm"), lambda _: None)
    assert rows == () and "lies in memory" in note
