"""A limit of memory: what does not fit goes to the disk, and the process stays below."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import real_model

import edgert
from edgert.errors import EngineError, PlanError, UsageError
from edgert.planner import plan

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
        edgert.load(path, attention="sparse", memory=190 << 20, context=8192)
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
