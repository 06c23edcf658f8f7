"""Instruction-set levels and the probes of the core."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgert import _native
from edgert.errors import EngineError

pytestmark = pytest.mark.alone


def flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


@pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc/cpuinfo")
def test_levels_are_those_of_the_system() -> None:
    """Linux lists a flag only if it also saves the registers that go with it."""
    has = flags()
    expected = []
    if {"avx2", "fma", "f16c"} <= has:
        if {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"} <= has:
            expected.append("avx512vnni")
        expected.append("avx2")
    if platform.machine() == "aarch64" and {"asimd", "asimddp", "asimdhp"} <= has:
        expected.append("neon")
    assert _native.isa_levels() == [*expected, "scalar"]


def test_selection_follows_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGERT_ISA", raising=False)
    assert _native.isa_selected() == _native.isa_levels()[0]
    monkeypatch.setenv("EDGERT_ISA", "")
    assert _native.isa_selected() == _native.isa_levels()[0]
    for level in _native.isa_levels():
        monkeypatch.setenv("EDGERT_ISA", level)
        assert _native.isa_selected() == level
    monkeypatch.setenv("EDGERT_ISA", "AVX2")
    with pytest.raises(EngineError, match=f"offers: {', '.join(_native.isa_levels())}"):
        _native.isa_selected()


def test_bandwidth_is_plausible() -> None:
    threads = min(2, len(os.sched_getaffinity(0)))
    rate = _native.probe_read_bandwidth(threads, 0.1)
    assert 1e8 < rate < 5e12, "between a busy old board and more than any memory gives"


@pytest.mark.parametrize(
    ("threads", "seconds", "says"),
    [
        (0, 0.1, "1 to 1024 threads"),
        (-1, 0.1, "not -1"),
        (2000, 0.1, "not 2000"),
        (1, 0.0, "above 0"),
        (1, 61, "60"),
    ],
)
def test_absurd_probes_are_refused(threads: int, seconds: float, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        _native.probe_read_bandwidth(threads, seconds)


def test_nan_seconds() -> None:
    with pytest.raises(EngineError):
        _native.probe_read_bandwidth(1, float("nan"))


def test_probe_gives_its_memory_back() -> None:
    code = (
        "import re; from edgert import _native\n"
        "rss = lambda: int(re.search(r'VmRSS:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = rss(); _native.probe_read_bandwidth(1, 0.01); print(rss() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16_000, "kB"


def best(call: Callable[..., float], *args: object) -> float:
    """Of three short runs: another process may take one of them its processor."""
    return max(call(*args, 0.03) for _ in range(3))


@pytest.mark.parametrize("level", _native.isa_levels())
@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "Q8_0", "MXFP4", "F16", "F32"])
def test_matmul_is_plausible(monkeypatch: pytest.MonkeyPatch, level: str, name: str) -> None:
    monkeypatch.setenv("EDGERT_ISA", level)
    one, many = (best(_native.probe_matmul, name, tokens, 1) for tokens in (1, 32))
    assert 1e6 < many < one < 1e13
    if level != "scalar":
        assert 32 * many > one, "tokens share the work of unpacking a weight"


@pytest.mark.parametrize("kv", ["f16", "q8"])
def test_attention_is_plausible(kv: str) -> None:
    rates = {(d, g): best(_native.probe_attend, kv, d, g, 1) for d, g in ((64, 1), (64, 4), (256, 4))}
    assert all(1e4 < rate < 1e12 for rate in rates.values())
    assert rates[64, 4] > 1.5 * rates[256, 4], "four times the work"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_two_threads_do_more() -> None:
    """Or nearly as much, when another process has one of the processors."""
    for call, args in ((_native.probe_matmul, ("Q4_0", 1)), (_native.probe_attend, ("q8", 64, 3))):
        assert best(call, *args, 2) > 0.8 * best(call, *args, 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("Q9_9", 1, 1, 0.1), 'no type "Q9_9"; it takes F32, .*MXFP4'),
        (("", 1, 1, 0.1), "no type"),
        (("Q4_0", 0, 1, 0.1), "1 to 256, not 0"),
        (("Q4_0", 257, 1, 0.1), "not 257"),
        (("Q4_0", 1, 0, 0.1), "1 to 1024 threads, not 0"),
        (("Q4_0", 1, 1, float("nan")), "above 0"),
    ],
)
def test_absurd_matmul_probes_are_refused(arguments: tuple[str, int, int, float], says: str) -> None:
    with pytest.raises(EngineError, match=says):
        _native.probe_matmul(*arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("f16", 0, 1, 1, 0.1), "multiple of 16 up to 256, not 0"),
        (("f16", 24, 1, 1, 0.1), "not 24"),
        (("q8", 48, 1, 1, 0.1), "multiple of 32, not 48"),
        (("q3", 64, 1, 1, 0.1), "unknown type of keys and values: q3"),
        (("f16", 512, 1, 1, 0.1), "not 512"),
        (("f16", 64, 0, 1, 0.1), "group .* 1 to 64, not 0"),
        (("f16", 64, 65, 1, 0.1), "not 65"),
        (("f16", 64, 1, 2000, 0.1), "not 2000"),
        (("f16", 64, 1, 1, -1.0), "above 0"),
    ],
)
def test_absurd_attention_probes_are_refused(arguments: tuple[str, int, int, int, float], says: str) -> None:
    with pytest.raises(EngineError, match=says):
        _native.probe_attend(*arguments)


@pytest.fixture(scope="module")
def disk_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("disk") / "file"
    path.write_bytes(os.urandom(4 << 20))
    return str(path)


def test_disk_is_plausible(disk_file: str) -> None:
    for request, depth in ((4096, 1), (1 << 20, 8)):
        rate, direct = _native.probe_disk(disk_file, request, depth, 0.1)
        assert 1e4 < rate < 1e12 and isinstance(direct, bool)


@pytest.mark.parametrize(
    ("request_bytes", "depth", "seconds", "says"),
    [
        (0, 1, 0.1, "multiple of 4096 bytes"),
        (5000, 1, 0.1, "not 5000"),
        (32 << 20, 1, 0.1, "up to 16 MiB"),
        (8 << 20, 1, 0.1, "less than one request of 8388608 bytes"),
        (4096, 0, 0.1, "1 to 64 requests"),
        (4096, 65, 0.1, "not 65"),
        (4096, 1, 0.0, "above 0"),
    ],
)
def test_absurd_disk_probes_are_refused(
    disk_file: str, request_bytes: int, depth: int, seconds: float, says: str
) -> None:
    with pytest.raises(EngineError, match=says):
        _native.probe_disk(disk_file, request_bytes, depth, seconds)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="none: No such file or directory"):
        _native.probe_disk(str(tmp_path / "none"), 4096, 1, 0.1)
    with pytest.raises(EngineError, match="cannot read"):
        _native.probe_disk(str(tmp_path), 4096, 1, 0.1)


def test_probes_leave_no_file_and_no_thread(disk_file: str) -> None:
    def open_now() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))  # noqa: PTH208

    before = open_now()
    _native.probe_disk(disk_file, 4096, 8, 0.01)
    _native.probe_matmul("Q4_0", 1, 4, 0.01)
    for _ in range(3):
        with pytest.raises(EngineError):
            _native.probe_disk(disk_file, 8 << 20, 8, 0.01)
    assert open_now() == before
