"""Plans of ONNX exports with sparse attention: what a session's slots and store take, which pages go to the
disk, and that a load goes by the same plan before it reads a weight."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cli_process import edgert as command
from conftest import real_model
from onnx_directories import exported
from tier_runs import on_disk
from tiny_models import prompt, tiny

import edgert
from edgert import model_onnx
from edgert.engines.onnx import OnnxEngine
from edgert.engines.onnx_sparse import LEAST_SLOTS, PAGE
from edgert.engines.onnx_sparse_session import SparseSession
from edgert.errors import PlanError, UsageError
from edgert.onnx_directory import OnnxDirectory
from edgert.onnx_plan import OnnxCase
from edgert.placement import place
from edgert.rates import rates_for

LONGEST = 8192  # of a session, whatever a tiny model was made for


def long(name: str, quant: str = "f32") -> OnnxDirectory:
    found = OnnxDirectory.open(exported(name, quant))
    return replace(found, spec=replace(found.spec, context_length=LONGEST))


def case_of(directory: OnnxDirectory, chosen: int = LEAST_SLOTS) -> OnnxCase:
    return OnnxCase.read(directory, 1, "dense", chosen=chosen)


def part(case: OnnxCase, context: int, name: str) -> int:
    return sum(part.bytes for part in case.memory(context) if name in part.name)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "lfm2"])
def test_slots_and_store_are_those_of_a_session(name: str) -> None:
    directory, n = long(name), 1200
    case = case_of(directory)
    session = OnnxEngine(directory, threads=1, slots=LEAST_SLOTS).session(n)
    assert isinstance(session, SparseSession)
    most = []
    made = session._set._make

    def spied(slots: int) -> None:
        made(slots)
        most.append(sum(buffer.read().nbytes for buffer in session._set.buffers.values()))

    session._set._make = spied  # type: ignore[method-assign]
    session.prefill(prompt(tiny(name), n))
    full = [p.bytes for p in case.memory(n) if "full layers" in p.name]
    assert max(most) == sum(full) and most[-1] < most[0]
    store = session._set._store.nbytes
    # Beside its pages and its index there are what threads and votes work with.
    assert part(case, n, "KV store") <= store <= part(case, n, "KV store") + part(case, n, "votes") + 100_000


def test_pages_that_do_not_fit_go_to_the_disk() -> None:
    case, n = case_of(long("qwen3")), 6000
    needed, least = case.needed(n), replace(case, slots=case.fewest_pages(n)).needed(n)
    assert least < needed
    limit = (least + needed) // 2
    placed = place(case, n, limit)
    assert case.fewest_pages(n) < placed.slots < n // PAGE
    assert limit * 15 / 16 < placed.needed(n) <= limit * 31 / 32
    plan = case.plan(n, rates_for("jetson-orin-nano-8gb", 6), limit, "x", to_disk=True)
    assert (plan.attention, plan.chosen, plan.slots, plan.kv) == ("sparse", LEAST_SLOTS, placed.slots, "f32")
    assert plan.fits and not plan.remedies
    memory, disk = plan.regimes[:2]
    assert (memory.start, memory.end, memory.slots) == (1, PAGE * placed.slots, 0)
    assert (disk.start, disk.end, disk.slots) == (memory.end + 1, n, placed.slots)
    assert memory.disk_bytes == 0 < disk.disk_bytes and memory.seconds < disk.seconds == plan.decode_seconds
    assert plan.regimes[-1].end == plan.max_context >= n
    assert not case.plan(n, rates_for("jetson-orin-nano-8gb", 6), limit, "x").fits


def test_a_step_stops_growing_with_what_it_sees() -> None:
    rates = rates_for("jetson-orin-nano-8gb", 6)
    full, sparse = (case_of(long("qwen3"), chosen) for chosen in (0, 1024))

    def seconds(case: OnnxCase, length: int, name: str) -> float:
        return sum(step.seconds for step in case.decode(rates, length) if step.name == name)

    assert seconds(full, 1000, "attention") == seconds(sparse, 1000, "attention")
    assert seconds(sparse, 8000, "attention") == pytest.approx(seconds(full, 1024, "attention"))
    assert seconds(full, 8000, "votes") == 0 < seconds(sparse, 4000, "votes") < seconds(sparse, 8000, "votes")
    assert seconds(sparse, 1000, "pages") == 0 < seconds(sparse, 4000, "pages")
    few, many = (seconds(replace(sparse, slots=slots), 8000, "disk") for slots in (70, 200))
    assert seconds(sparse, 8000, "disk") == 0 < many < few


def test_what_does_not_fit_is_refused_before_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(*_: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(model_onnx, "OnnxEngine", loads)
    path = exported("llama", "f32")
    with pytest.raises(PlanError, match="--memory") as raised:
        edgert.load(path, attention="sparse", budget=LEAST_SLOTS, memory=10**6)
    assert raised.value.available == 10**6 < raised.value.needed
    assert any("--attention full" in text for text in raised.value.remedies)
    assert any("--quant int4" in text for text in raised.value.remedies)


def test_a_load_goes_by_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    directory, n = long("qwen3"), 6000
    case = case_of(directory)
    limit = (replace(case, slots=case.fewest_pages(n)).needed(n) + case.needed(n)) // 2
    monkeypatch.setattr(OnnxDirectory, "open", lambda path: directory)
    with on_disk() as place_:
        options = {"attention": "sparse", "budget": LEAST_SLOTS, "memory": limit, "context": n}
        with edgert.load(directory.path, threads=1, head="dense", page_directory=place_, **options) as model:
            slots = model.engine.describe()["pages_in_memory"]
    assert slots == place(case, n, limit).slots == edgert.plan(directory.path, threads=1, **options).slots


def test_the_command() -> None:
    path = str(exported("gemma3", "int4"))
    done = command(
        "plan", path, "--attention", "sparse", "--budget", LEAST_SLOTS, "--memory", "1GB", "--json"
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["attention"], plan["chosen"], plan["slots"]) == ("sparse", LEAST_SLOTS, 0)
    assert [regime["end"] for regime in plan["regimes"]] == [256]
    assert "KV store" in [part["name"] for part in plan["memory"]]
    refused = command("plan", path, "--attention", "sparse", "--memory", "60MB")
    assert refused.returncode == 1
    assert "sparse attention to 1024 tokens" in refused.stdout and "--attention full" in refused.stdout
    for options, word in (
        (("--attention", "exact"), "exact"),
        (("--attention", "sparse", "--budget", 500), "multiple"),
        (("--budget", 1024), "budget"),
        (("--heads", "x.json", "--attention", "sparse"), "heads"),
    ):
        wrong = command("plan", path, *options)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert word in wrong.stderr


def test_a_model_with_windows_alone_has_nothing_to_choose() -> None:
    with pytest.raises(UsageError, match="have a window"):
        case_of(long("mistral-window"))


_CHILD = """
import json, sys
import edgert
path, limit, directory, count = sys.argv[1], int(sys.argv[2]) or None, sys.argv[3], int(sys.argv[4])
options = {"attention": "sparse", "memory": limit, "page_directory": directory, "context": count + 100}
with edgert.load(path, **options) as model:
    with model.session() as session:
        reply = session.generate(list(range(1000, 1000 + count)), max_tokens=48)
        tier = session._sequence.tier or {}
print(json.dumps([reply.stats.peak_memory, reply.tokens, tier.get("pages", 0)]))
"""


@pytest.mark.slow
def test_the_peak_is_what_the_plan_says(tmp_path: Path) -> None:
    """In memory, and below a limit with pages on the disk, where the same tokens come out."""
    target, n = tmp_path / "out", 3000
    done = command("export", real_model("smollm2-135m"), "--format", "onnx", "-o", target)
    assert done.returncode == 0, done.stderr
    case = OnnxCase.read(OnnxDirectory.open(target), chosen=1024)
    limit = (replace(case, slots=case.fewest_pages(n)).needed(n + 100) + case.needed(n + 100)) // 2
    replies = []
    with on_disk() as directory:
        for given in (0, limit):
            run = [sys.executable, "-c", _CHILD, str(target), str(given), str(directory), str(n)]
            found = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
            peak, tokens, pages = found
            planned = (place(case, n + 100, given) if given else case).needed(n + 48)
            assert abs(planned - peak) <= 0.03 * peak + 8_000_000
            assert peak <= (given or peak) and (pages > 0) == (given > 0)
            replies.append(tokens)
    assert replies[0] == replies[1]
