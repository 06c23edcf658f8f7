"""The plan: that its terms are what is allocated, that its totals are what a process takes, and that a
run which does not fit is refused before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_process import edgert as command
from conftest import real_model
from edgert.export.gguf_writer import write_gguf
from flash_files import parts
from tiny_models import tiny

import edgert
from edgert import _native, planner
from edgert.cli.options import parse_size
from edgert.cost import KV_CHANNELS
from edgert.engines import KV_TYPES
from edgert.errors import PlanError, UsageError
from edgert.heads import choose_sidecar
from edgert.locate import sidecar_path
from edgert.planner import Case, Plan

TINY = [("llama", "Q4_0"), ("gemma3", "Q8_0"), ("qwen2", "F32"), ("lfm2", "Q4_0"), ("mistral-window", "Q8_0")]
REAL = ["smollm2-135m", "gemma-3-270m"]
MB = 1_000_000


def case_of(
    path: Path, kv: str = "f16", head: str = "auto", chosen: int = 0, attention: str = "full"
) -> Case:
    file = _native.GgufFile(str(path))
    return Case.read(file, choose_sidecar(str(path), head, "native"), 0, 2, kv, head, 0, chosen, attention)


@pytest.fixture(params=TINY, ids=lambda m: m[0])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model with a sidecar of both stages."""
    copy = tmp_path / "model.gguf"
    shutil.copy(tiny(*request.param).path, copy)
    write_gguf(sidecar_path(copy), *parts(copy, "clusters+lowrank"))
    return copy


@pytest.mark.parametrize(
    ("head", "kv", "attention"),
    [
        *((head, kv, "full") for head in ("dense", "flash", "exact") for kv in KV_TYPES),
        *(("dense", kv, "sparse") for kv in KV_TYPES),
        *((head, "f16", "exact") for head in ("dense", "flash", "exact")),
    ],
)
def test_every_allocation_of_a_run_is_a_term_of_the_plan(
    base: Path, head: str, kv: str, attention: str
) -> None:
    if case_of(base).spec.head_dim % KV_CHANNELS[kv]:
        with pytest.raises(UsageError, match="multiple of 32 channels"):
            edgert.load(base, kv=kv)
        return
    before = _native.allocated()
    chosen = 0 if attention == "full" else 24
    with edgert.load(
        base, threads=2, head=head, kv=kv, context=64, attention=attention, budget=chosen
    ) as model:
        case = case_of(base, kv, head, chosen, attention)
        with model.session() as session:
            session.generate(list(range(1, 40)), max_tokens=8)
            length = session._sequence.length
            took = {k: n - before.get(k, 0) for k, n in _native.allocated().items() if n != before.get(k, 0)}
            memory = model.memory()
            kept = session._sequence.nbytes
    terms = {part.name: part.bytes for part in case.memory(length)}
    shares, index, conv = case.sizes.kv(64, length, kv, chosen)
    assert took.pop("the weights") == case.sizes.arena_bytes
    assert took.pop("the KV cache") == index + sum(share[1] for share in shares)
    assert took.pop("the convolution state", 0) == conv == terms.get("convolution state", 0)
    assert kept == conv + index + sum(share[1] for share in shares)
    assert took.pop("the activations") <= memory["activations"] == terms["activations"]
    assert not took, "an allocation that the plan does not name"
    for name, part in (("body", "body"), ("embedding", "embedding"), ("flash_head", "sidecar")):
        assert memory[name] == terms.get(part, 0)


CHILD = """
import json, sys
import edgert
path, head, kv, context = json.loads(sys.argv[1])
with edgert.load(path, threads=2, head=head, kv=kv, context=context) as model:
    reply = model.generate([5] * (context - 16), max_tokens=16)
    print(reply.stats.peak_memory)
"""


def run_child(path: Path, *options: Any, limit: str = "") -> subprocess.CompletedProcess[str]:
    arguments = json.dumps([str(path), *options])
    return subprocess.run(
        [sys.executable, "-c", limit + CHILD, arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("context", [256, 2000])
def test_the_peak_is_what_the_plan_says(name: str, context: int, kv: str) -> None:
    path = real_model(name)
    done = run_child(path, "dense", kv, context)
    assert done.returncode == 0, done.stderr
    measured, planned = int(done.stdout), edgert.plan(path, context=context, threads=2, kv=kv).needed
    assert abs(planned - measured) <= 0.03 * measured + 8 * MB


ADDRESS_LIMIT = """
import resource
import edgert.model, edgert.sampling, edgert.tokenizer, tokenizers, jinja2
from edgert.memory_left import PYTHON_BYTES, THREAD_HEAP, resident_bytes
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
room = {room} - min(resident_bytes(), PYTHON_BYTES) + 3 * ((8 << 20) + THREAD_HEAP)
resource.setrlimit(resource.RLIMIT_STACK, (8 << 20, 8 << 20))
resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address-space limits are counted in /proc")
def test_under_an_address_space_limit_a_run_finishes_or_is_refused() -> None:
    path, context = real_model("smollm2-135m"), 4000
    needed = edgert.plan(path, context=context, threads=2).needed
    enough = run_child(path, "dense", "f16", context, limit=ADDRESS_LIMIT.format(room=int(1.05 * needed)))
    assert enough.returncode == 0, enough.stderr
    short = run_child(path, "dense", "f16", context, limit=ADDRESS_LIMIT.format(room=int(0.8 * needed)))
    assert short.returncode == 1 and "PlanError" in short.stderr
    assert "address-space limit" in short.stderr and "--context" in short.stderr


def _cgroup(name: str, limit: int) -> Path | None:
    """A cgroup of v1 or v2 with a memory limit, None where this process may make none."""
    for parent, file in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = parent / name
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / file).write_text(str(limit))
            return group
        except OSError:
            group.rmdir()
    return None


@pytest.mark.parametrize("share", [1.05, 0.8])
def test_under_a_cgroup_limit_a_run_finishes_or_is_refused(share: float, tmp_path: Path) -> None:
    """The model is copied inside the group, so that the file cache fills it: that is no reason to refuse."""
    path, context = real_model("smollm2-135m"), 4000
    needed = edgert.plan(path, context=context, threads=2).needed
    group = _cgroup(f"edgert-test-{os.getpid()}", int(share * needed))
    if group is None:
        pytest.skip("no right to make a cgroup here; the address-space test covers the refusal")
    copy = tmp_path / "copy.gguf"
    enter = (
        f"import os, shutil\nopen({str(group / 'cgroup.procs')!r}, 'w').write('0')\n"
        f"shutil.copyfile({str(path)!r}, {str(copy)!r})\nos.sync()\n"
    )
    try:
        done = run_child(copy, "dense", "f16", context, limit=enter)
        if share > 1:
            assert done.returncode == 0, done.stderr
        else:
            assert done.returncode == 1 and "PlanError" in done.stderr and "cgroup" in done.stderr
    finally:
        copy.unlink(missing_ok=True)
        group.rmdir()


def limited(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr(planner, "memory_left", lambda threads: (available, "the limit of this test"))


def test_a_context_that_does_not_fit_is_refused_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    path = real_model("smollm2-135m")
    needed = edgert.plan(path, context=8000, threads=2).needed
    limited(monkeypatch, needed - 60 * MB)
    before = _native.allocated()
    with pytest.raises(PlanError, match=r"the limit of this test leaves .*--context") as caught:
        edgert.load(path, threads=2, context=8000)
    assert _native.allocated() == before
    assert caught.value.needed == needed and caught.value.available == needed - 60 * MB
    assert any("--context" in remedy for remedy in caught.value.remedies)


def test_a_load_that_names_no_context_takes_the_longest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    path = real_model("smollm2-135m")
    available = edgert.plan(path, context=3000, threads=2).needed
    limited(monkeypatch, available)
    with edgert.load(path, threads=2) as model:
        assert 3000 <= model.context < 3600 and model.trained_context == 8192
    limited(monkeypatch, 100 * MB)
    with pytest.raises(PlanError, match="a context of 256 tokens"):
        edgert.load(path, threads=2)


def test_the_longest_context_is_the_last_that_fits() -> None:
    path = real_model("smollm2-135m")
    made = edgert.plan(path, context=2000, memory=300 * MB, threads=2)
    assert edgert.plan(path, context=made.max_context, memory=300 * MB, threads=2).fits
    assert not edgert.plan(path, context=made.max_context + 1, memory=300 * MB, threads=2).fits
    assert edgert.plan(path, memory=50 * MB, threads=2).max_context == 0


def test_remedies_come_by_what_they_save_and_say_what_is_enough() -> None:
    made = edgert.plan(real_model("smollm2-135m"), context=8000, memory=300 * MB, threads=2)
    assert not made.fits
    saved = [remedy.saves for remedy in made.remedies[:-1]]
    assert saved == sorted(saved, reverse=True)
    for remedy in made.remedies:
        assert remedy.enough == (made.needed - remedy.saves <= made.available)
    assert made.remedies[-1].saves == made.needed - made.available


def test_a_plan_touches_no_weight(tmp_path: Path) -> None:
    path = real_model("smollm2-135m")
    hollow = tmp_path / "hollow.gguf"  # the header, then a hole where the weights were
    first = min(t.offset for t in _native.GgufFile(str(path)).tensors)
    with path.open("rb") as source, hollow.open("wb") as copy:
        copy.write(source.read(first))
        copy.truncate(path.stat().st_size)
    assert edgert.plan(hollow, threads=2).memory == edgert.plan(path, threads=2).memory
    assert hollow.stat().st_blocks * 512 < first + MB


@pytest.mark.alone
def test_a_plan_is_made_in_well_under_a_second() -> None:
    import time

    path = real_model("gemma-3-270m")
    times = []
    for _ in range(5):
        began = time.perf_counter()
        assert command("plan", path, "--json").returncode == 0
        times.append(time.perf_counter() - began)
    assert min(times) < 0.3


def plan_of(*arguments: object) -> Any:
    done = command("plan", *arguments, "--json")
    return done.returncode, json.loads(done.stdout)


def test_the_command_says_whether_it_fits_and_exits_with_it() -> None:
    path = real_model("smollm2-135m")
    code, fits = plan_of(path, "--context", 2000, "--memory", "1GiB", "--threads", 2)
    assert code == 0 and fits["fits"] and fits["available"] == 1 << 30 and not fits["remedies"]
    assert fits["needed"] == sum(part["bytes"] for part in fits["memory"])
    assert fits["decode_seconds"] == pytest.approx(sum(step["seconds"] for step in fits["decode"]))
    code, short = plan_of(path, "--context", 8000, "--memory", "250MB", "--threads", 2)
    assert code == 1 and not short["fits"] and short["remedies"] and 0 < short["max_context"] < 8000
    text = command("plan", path, "--context", 8000, "--memory", "250MB")
    assert text.returncode == 1 and "what would help" in text.stdout and not text.stderr
    below = command("plan", path, "--memory", "50MB")
    assert below.returncode == 1 and "no context fits" in below.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--platform", "rasberry-pi-5"), "did you mean 'raspberry-pi-5'"),
        (("--context", 9000), "context must be 2 to 8192"),
        (("--context", 1), "context must be 2 to 8192"),
        (("--memory", "lots"), "'lots' is no size"),
        (("--memory", "0GB"), "is no size"),
        (("--kv", "q3"), "unknown kv type"),
        (("--head", "flesh"), "unknown head"),
        (("--head", "flash"), "has no sidecar"),
        (("--threads", -1), "threads must be"),
    ],
)
def test_what_makes_no_sense_is_refused(options: tuple[object, ...], says: str) -> None:
    done = command("plan", real_model("smollm2-135m"), *options)
    assert done.returncode == 2 and says in done.stderr and not done.stdout


def test_a_platform_file_of_ones_own(tmp_path: Path) -> None:
    source = (Path(planner.__file__).parents[1] / "platforms" / "raspberry-pi-5.toml").read_text()
    own = tmp_path / "board.toml"
    own.write_text(source)
    path = real_model("smollm2-135m")
    shipped = edgert.plan(path, platform="raspberry-pi-5")
    assert edgert.plan(path, platform=str(own)).decode == shipped.decode
    own.write_text(source.replace("sustained", "sustaned"))
    with pytest.raises(UsageError, match=r"memory\.sustain"):
        edgert.plan(path, platform=str(own))


def faster(slow: Plan, fast: Plan) -> bool:
    return fast.decode_seconds < slow.decode_seconds and fast.prefill_seconds < slow.prefill_seconds


def test_time_follows_the_machine_and_the_context() -> None:
    path = real_model("smollm2-135m")
    pi, orin = (edgert.plan(path, platform=name, context=2000) for name in ("raspberry-pi-5", "orin-nano"))
    assert orin.decode_seconds < pi.decode_seconds  # memory; its cores are slower
    assert pi.prefill_seconds < orin.prefill_seconds
    assert edgert.plan(path, platform="raspberry-pi-5", context=8000).decode_seconds > pi.decode_seconds
    slow = edgert.plan(path, platform="orin-nano", context=2000, threads=1)
    assert faster(slow, orin)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("800MB", 800 * MB), ("1.5G", 1_500_000_000), ("512 kib", 512 << 10), ("77", 77)],
)
def test_sizes_are_read_in_si_and_iec(text: str, size: int) -> None:
    assert parse_size(text) == size
