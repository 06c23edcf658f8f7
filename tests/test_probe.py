"""Instruction-set levels and the bandwidth probe of the core."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from edgert import _native
from edgert.errors import EngineError


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
