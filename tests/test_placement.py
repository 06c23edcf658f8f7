"""A limit of memory: what does not fit goes to the disk, and the process stays below."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cli_process import edgert as command
from conftest import real_model

import edgert
from edgert import _native
from edgert.errors import EngineError, PlanError, UsageError
from edgert.machine import DiskRead
from edgert.placement import place
from edgert.plan_time import decode_steps
from edgert.planner import Case, Plan, plan
from edgert.rates import rates_for

LIMIT = 250 << 20
RUN = """
import json, os, sys
import edgert
path, limit, directory = sys.argv[1], int(sys.argv[2]) or None, sys.argv[3]
with edgert.load(path, attention="sparse", memory=limit, page_directory=directory) as model:
    with model.session() as session:
        reply = session.generate(list(range(100, 6100)), max_tokens=8)
        tier = session._sequence.tier
status = open("/proc/self/status").read()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"tokens": reply.tokens, "tier": tier, "peak": peak}))
"""


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """Where tmp_path may lie in memory."""
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent.parent / "build") as directory:
        yield Path(directory)


def run(limit: int, directory: Path) -> dict[str, object]:
    command = [sys.executable, "-c", RUN, str(real_model("smollm2-135m")), str(limit), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_plan_puts_pages_on_the_disk_only_where_they_do_not_fit() -> None:
    path = real_model("smollm2-135m")
    free = plan(path, attention="sparse", memory=1 << 30)
    assert free.slots == 0 and free.fits
    placed = plan(path, attention="sparse", memory=LIMIT)
    assert 0 < placed.slots < 8192 // 16
    assert LIMIT * 0.94 < placed.needed <= LIMIT * 31 / 32
    assert placed.bytes_of("KV cache, index") == free.bytes_of("KV cache, index")
    more = plan(path, attention="sparse", memory=LIMIT + (20 << 20))
    assert placed.slots < more.slots
    full = plan(path, attention="full", memory=LIMIT)
    assert full.slots == 0 and not full.fits


def test_a_plan_that_does_not_fit_names_the_disk() -> None:
    (found,) = [r for r in plan(real_model("smollm2-135m"), memory=LIMIT).remedies if "on the disk" in r.text]
    assert found.enough and f"--attention sparse --memory {LIMIT}" in found.text


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="a directory that is known to lie in memory")
def test_pages_in_memory_save_none() -> None:
    path = real_model("smollm2-135m")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as here:
        model = edgert.load(path, attention="sparse", memory=LIMIT, page_directory=here)
        with model, pytest.raises(EngineError, match="lies in memory"):
            model.session()


def test_the_file_may_be_limited(on_disk: Path) -> None:
    where = {"page_directory": on_disk, "page_limit": 10**7}
    with (
        edgert.load(real_model("smollm2-135m"), attention="sparse", memory=LIMIT, **where) as model,
        model.session() as session,
        pytest.raises(EngineError, match="may not outgrow 9 MiB"),
    ):
        session.generate(list(range(100, 6100)), max_tokens=8)


def test_a_run_stays_below_its_limit(on_disk: Path) -> None:
    placed = run(LIMIT, on_disk)
    tier = placed["tier"]
    assert isinstance(tier, dict) and tier["bytes_read"] > 0
    assert isinstance(placed["peak"], int) and placed["peak"] <= LIMIT
    assert not any(on_disk.iterdir())


def test_what_cannot_fit_is_refused(tmp_path: Path) -> None:
    path = real_model("smollm2-135m")
    with pytest.raises(PlanError, match="--memory"):
        edgert.load(path, attention="sparse", memory=100 << 20, page_directory=tmp_path)
    with pytest.raises(PlanError, match="needs 39"):
        edgert.load(path, attention="sparse", memory=190 << 20, context=8192, threads=2)
    assert not any(tmp_path.iterdir())


def test_bad_limits() -> None:
    path = real_model("smollm2-135m")
    for memory in (0, -1, True, "512MiB"):
        with pytest.raises(UsageError, match="memory must be"):
            edgert.load(path, memory=memory)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="page_limit"):
        edgert.load(path, attention="sparse", memory=LIMIT, page_limit=0)
    with pytest.raises(UsageError, match="native engine"):
        edgert.load(path, engine="llamacpp", memory=1 << 30)


def limits_of(made: Plan) -> list[tuple[int, int, int]]:
    return [(regime.start, regime.end, regime.slots) for regime in made.regimes]


def test_regimes_are_what_a_load_would_do() -> None:
    path = real_model("smollm2-135m")
    made = plan(path, attention="sparse", memory=LIMIT)
    assert limits_of(made) == [(1, 16 * made.slots, 0), (16 * made.slots + 1, 8192, made.slots)]
    with edgert.load(path, attention="sparse", memory=LIMIT) as model:
        assert model.engine.describe()["pages_in_memory"] == made.slots
    memory, disk = made.regimes
    assert memory.disk_bytes == 0 < disk.disk_bytes and disk.seconds > memory.seconds
    assert disk.seconds == made.decode_seconds


def test_regimes_of_a_run_that_fits_tell_of_longer_ones() -> None:
    path = real_model("smollm2-135m")
    made = plan(path, attention="sparse", memory=350 << 20, context=2000)
    (_, fits, none), (_, most, slots) = limits_of(made)
    assert made.slots == none == 0 and most == 8192 == made.max_context
    again = {
        n: plan(path, attention="sparse", memory=350 << 20, context=n).slots for n in (fits, fits + 1, most)
    }
    assert again[fits] == 0 < slots == again[most] < again[fits + 1]


def test_what_is_longer_than_the_last_regime_is_refused() -> None:
    path, limit = real_model("smollm2-135m"), 226 << 20
    made = plan(path, attention="sparse", memory=limit)
    end = made.regimes[-1].end
    assert not made.fits and made.max_context == end < 8192
    with edgert.load(path, attention="sparse", memory=limit) as model:
        assert model.context == end  # none was named: the longest there is
        assert model.engine.describe().get("pages_in_memory", 0) == made.regimes[-1].slots
    with pytest.raises(PlanError):
        edgert.load(path, attention="sparse", memory=limit, context=end + 1)


def test_the_command_tells_the_regimes() -> None:
    path = real_model("smollm2-135m")
    words = ("plan", path, "--attention", "sparse", "--memory", "250MiB")
    text = command(*words).stdout
    assert "as the sequence grows" in text and "pages of 16 in memory" in text and "from the disk" in text
    told = json.loads(command(*words, "--json").stdout)["regimes"]
    assert [r["slots"] > 0 for r in told] == [False, True] and told[1]["disk_bytes"] > 0
    assert "refused" in command("plan", path, "--attention", "sparse", "--memory", "226MiB").stdout
    assert "as the sequence grows" not in command("plan", path, "--memory", "250MiB").stdout


def test_a_slower_disk_takes_longer_when_steps_do_not_hide_it() -> None:
    disk = (
        DiskRead(1 << 16, 1, 1e8),
        DiskRead(1 << 16, 8, 4e8),
        DiskRead(1 << 20, 1, 1e9),
        DiskRead(1 << 20, 8, 2e9),
    )
    rates = replace(rates_for("raspberry-pi-5", 4), disk=disk)
    assert rates.disk_seconds(1, 1 << 16, 4) == pytest.approx((1 << 16) / 1e8)
    assert rates.disk_seconds(2, 1 << 20, 4) == pytest.approx((2 << 20) / (1e9 * 2 ** (1 / 3)))
    assert rates.disk_seconds(1, 1 << 18, 4) == pytest.approx((1 << 18) / 10**8.5)
    assert rates.disk_seconds(1, 1 << 12, 4) == pytest.approx((1 << 12) / 1e8)
    assert replace(rates, disk=()).disk_seconds(3, 1 << 20, 4) == 0
    path = real_model("smollm2-135m")
    file = _native.GgufFile(str(path))
    case = Case.read(file, None, rates.lanes, 4, "f16", "dense", 0, 1024, "sparse")
    placed = place(case, 8192, LIMIT)

    def seconds(share: float) -> float:
        slow = tuple(replace(r, rate=share * r.rate) for r in disk)
        return sum(step.seconds for step in decode_steps(placed, replace(rates, disk=slow), 8192))

    assert seconds(1) == seconds(0.9) < seconds(0.01) < seconds(0.005)
