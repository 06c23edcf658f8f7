"""A long sequence under a cap of memory that its keys and values do not fit into, beside the same in memory:
``python -m edgert.bench.capped MODEL --context 32000``.

Two processes read the same text with sparse attention. One lives in a cgroup, from its start, whose limit is
what the plan says the process takes without keys and values of the layers that see everything, a share of
what these take, and the part of a limit that a plan keeps free; it is told that limit as ``memory``. The
index and the buffers of the tier must fit into that share too. Then both take steps along the text in turns.
The first step of a turn is not counted: a disk may read for it while the other process is at work. Needs the
right to make a cgroup, v1 or v2.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgert.bench.context import context as facts_of
from edgert.bench.eval_texts import make_documents
from edgert.bench.long_context import stretched
from edgert.bench.measure import put, say

from edgert import _native
from edgert.attention import DEFAULT_BUDGET
from edgert.cost import page_bytes
from edgert.engines import native_spec
from edgert.locate import cache_dir, model_path
from edgert.placement import PAGE, UNSURE
from edgert.planner import plan
from edgert.tokenizer import Tokenizer

SHARE = 0.25  # of the keys and values, that fit under the cap
TURNS, TURN = 12, 32  # turns of each, and steps of a turn
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")

_CHILD = """
import json, os, sys, time
job = json.loads(sys.stdin.readline())
if job["group"]:
    with open(job["group"] + "/cgroup.procs", "w") as procs:
        procs.write("0")
import edgert
from edgert.generate import peak_memory
text, told = job["text"], job["prompt"]
with edgert.load(
    job["path"], attention="sparse", heads="none", budget=job["budget"], context=len(text), head="dense",
    memory=job["memory"] or None, page_directory=job["directory"],
) as model, model.session() as session:
    began = time.perf_counter()
    session.prefill(text[:told], lambda: False)
    def say(**more):
        tier = session._sequence.tier or {}
        print(json.dumps({"peak": peak_memory(), "tier": tier, **more}), flush=True)
    say(seconds=time.perf_counter() - began)
    for line in sys.stdin:
        seconds = []
        for token in text[told : told + int(line)]:
            began = time.perf_counter()
            session.step(token)
            seconds.append(time.perf_counter() - began)
        told += int(line)
        say(steps=seconds)
"""


class Child:
    """One of the two processes; what it says are dictionaries."""

    def __init__(self, job: dict[str, Any]) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, "-c", _CHILD], **pipes)
        self.tell(json.dumps(job))

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended with {self._process.wait()}; out of its memory if that is -9")
        heard: dict[str, Any] = json.loads(line)
        return heard

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def cgroup(limit: int) -> Iterator[Path]:
    """A new cgroup that holds ``limit`` bytes."""
    for parent, file in ((V1, "memory.limit_in_bytes"), (V2, "memory.max")):
        group = parent / f"edgert-capped-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if not (group / file).exists():
                continue
            (group / file).write_text(str(limit))
            yield group
            return
        finally:
            group.rmdir()
    raise SystemExit("no cgroup can be made here: run it as root, or in a delegated one")


@dataclass
class Result:
    """Sizes in bytes, times in seconds. ``capped`` and ``free`` are the steps of each process."""

    cap: int
    kv: int
    slots: int
    context: int
    peak: int
    group_peak: int | None  # as the cgroup counts it, with its part of the file cache
    free_peak: int
    reading: tuple[float, float]  # of the prompt, capped and free at the same time
    capped: list[float]
    free: list[float]
    disk_bytes: float  # a step
    hidden: float | None
    planned: float
    planned_free: float

    @property
    def speed(self) -> float:
        """Of the capped process, in times of the free one."""
        return statistics.median(self.free) / statistics.median(self.capped)


def measure(model: Path, context: int, budget: int, share: float, directory: Path) -> Result:
    """``model`` may have been made for less: what is measured is speed and memory."""
    with stretched(model, context + TURNS * TURN + TURN) as path:
        return _measure(path, context, budget, share, directory)


def _measure(path: Path, context: int, budget: int, share: float, directory: Path) -> Result:
    file = _native.GgufFile(str(path))
    tokenizer = Tokenizer.from_gguf(file.metadata)
    length = context + TURNS * TURN + TURN
    text = max((d.tokens for d in make_documents(tokenizer, length)), key=len)
    if len(text) < length:
        raise SystemExit(f"the text has {len(text)} tokens: {length} are needed")
    options: dict[str, Any] = {
        "attention": "sparse",
        "heads": "none",
        "budget": budget,
        "context": length,
        "head": "dense",
    }
    free = plan(path, **options)
    spec = native_spec(file, file.metadata)
    heads = sum(layer.n_kv_heads for layer in spec.layers if layer.kind == "attention" and not layer.window)
    whole = context * page_bytes(spec, "f16", heads) // PAGE
    taken = sum(p.bytes for p in free.memory if p.name.endswith(("full layers", "KV cache, index")))
    cap = round((free.needed - taken + share * whole) / (1 - UNSURE))
    placed = plan(path, memory=cap, **options)
    if not placed.fits:
        raise SystemExit(f"the plan refuses {cap} bytes: {placed.needed} are needed at least")
    job = {"path": str(path), "text": text, "prompt": context, "budget": budget, "directory": str(directory)}
    say(f"cap {cap / 1e6:.1f} MB; {placed.slots} of {-(-context // PAGE)} pages in memory")
    with cgroup(cap) as group:
        children = [
            Child({**job, "group": str(group), "memory": cap}),
            Child({**job, "group": "", "memory": 0}),
        ]
        try:
            capped, other = (child.hear() for child in children)
            reading = capped["seconds"], other["seconds"]
            say(f"read in {reading[0]:.0f} s, in memory in {reading[1]:.0f} s, both at once")
            steps: list[list[float]] = [[], []]
            before: dict[str, float] = {}
            for turn in range(TURNS + 1):  # the first one warms up
                for n in (0, 1) if turn % 2 else (1, 0):
                    children[n].tell(str(TURN))
                    heard = children[n].hear()
                    steps[n] += heard["steps"][1:] if turn else []
                    if n == 0:
                        capped, before = heard, before or heard["tier"]
                    else:
                        other = heard
        finally:
            for child in children:
                child.end()
        counts = (group / name for name in ("memory.max_usage_in_bytes", "memory.peak"))
        group_peak = next((int(path.read_text()) for path in counts if path.exists()), None)
    after = capped["tier"]
    read = after["read_seconds"] - before["read_seconds"]
    waited = after["waited_seconds"] - before["waited_seconds"]
    return Result(
        cap=cap,
        kv=whole,
        slots=placed.slots,
        context=context,
        peak=capped["peak"],
        group_peak=group_peak,
        free_peak=other["peak"],
        reading=reading,
        capped=steps[0],
        free=steps[1],
        disk_bytes=(after["bytes_read"] - before["bytes_read"]) / (TURNS * TURN),
        hidden=1 - waited / read if read else None,
        planned=placed.decode_seconds,
        planned_free=free.decode_seconds,
    )


COLUMNS = (
    *("model", "tokens", "keys and values", "cap", "peak", "as the cgroup counts", "pages in memory"),
    *("a step, capped", "in memory", "speed kept", "from the disk a step", "of reading hidden"),
    *("planned, capped", "in memory"),
)


def _cells(path: Path, r: Result) -> list[str]:
    def size(n: float | None) -> str:
        return "" if n is None else f"{n / 1e6:.1f} MB"

    def time(seconds: float) -> str:
        return f"{seconds * 1e3:.2f} ms"

    return [
        *(path.name, f"{r.context:,}", size(r.kv), size(r.cap), size(r.peak), size(r.group_peak)),
        f"{r.slots} of {-(-r.context // PAGE)}",
        *(time(statistics.median(r.capped)), time(statistics.median(r.free)), f"{r.speed:.0%}"),
        *(size(r.disk_bytes), "" if r.hidden is None else f"{r.hidden:.0%}"),
        *(time(r.planned), time(r.planned_free)),
    ]


def report(results: dict[Path, Result], budget: int, share: float, command: str) -> str:
    """Markdown."""
    facts = facts_of(next(iter(results)))
    lines = [
        "# A sequence under a cap of memory",
        "",
        f"`{command}`: sparse attention to {budget} tokens, f16 keys and values, dense head; "
        f"{facts['cpu']}, {facts['usable_processors']} processors, edgert {facts['edgert']} build "
        f"{facts['edgert_build']} ({facts['edgert_isa']}), {facts['date']}.",
        "",
        "The capped process is in a cgroup whose limit is what a plan says it takes without keys and values "
        f"of the layers that see everything, {share:.0%} of these, and the {UNSURE:.1%} a plan keeps free. "
        "The other process has all in memory. Steps go along Python's library, "
        f"{TURNS} turns of {TURN - 1} each, medians; peaks are of the whole process, prompt included.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|---|{'---:|' * (len(COLUMNS) - 1)}",
    ]
    lines += [f"| {' | '.join(_cells(path, r))} |" for path, r in results.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m edgert.bench.capped", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--context", type=int, default=32000, metavar="N", help="tokens of the prompt")
    parser.add_argument("--budget", type=int, default=DEFAULT_BUDGET, metavar="N")
    parser.add_argument(
        "--share", type=float, default=SHARE, metavar="S", help="of keys and values, under the cap"
    )
    parser.add_argument("--page-directory", type=Path, default=cache_dir() / "pages", metavar="DIR")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.md", help="default: stdout")
    args = parser.parse_args()
    results = {}
    for name in args.models:
        path = Path(model_path(name))
        results[path] = measure(path, args.context, args.budget, args.share, args.page_directory)
        print(json.dumps(asdict(results[path])), file=sys.stderr)
    command = f"python -m edgert.bench.capped {' '.join(args.models)} --context {args.context}"
    text = report(results, args.budget, args.share, command)
    put(text, args.output)


if __name__ == "__main__":
    main()
