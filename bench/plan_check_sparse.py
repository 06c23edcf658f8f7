"""What `edgert plan` predicts of sparse attention beside what runs take, in memory and with pages on a disk:
``python -m edgert.bench.plan_check_sparse``.

As :mod:`edgert.bench.plan_check`, but for a grid of context, budget and place, with the dense head. A row is
a process that loads a model, reads a text and takes steps along it, TURNS times STEPS, with memory's speed
probed in between. A row on the disk has a limit of memory half way between the least that a plan accepts and
what all takes. Rows are kept in a file as they come, and those that it has are not measured again, so that a
run can be made in pieces.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from edgert.bench.eval_texts import make_documents
from edgert.bench.measure import put, say
from edgert.bench.plan_check import PROBE_SECONDS, Row, in_process, settle, verdict

from edgert import _native
from edgert.locate import cache_dir, model_path
from edgert.placement import Placeable, place
from edgert.planner import Case
from edgert.rates import Rates, rates_for
from edgert.tokenizer import Tokenizer

TURNS, STEPS = 7, 32  # turns, the first of which warms up
DECODE_MEDIAN = 0.15

_CHILD = """
import json, sys, time
import edgert
from edgert import _native
from edgert.generate import peak_memory
job = json.load(sys.stdin)
text, told, steps = job["text"], job["prompt"], job["steps"]
with edgert.load(
    job["path"], engine=job["engine"], kv=job["kv"], head="dense", context=len(text), threads=job["threads"],
    attention="sparse", heads="none", budget=job["budget"],
    memory=job["memory"], page_directory=job["directory"],
) as model, model.session() as session:
    session.prefill(text[:told], lambda: False)
    def tier():
        return session._sequence.tier or dict.fromkeys(("bytes_read", "read_seconds", "waited_seconds"), 0)
    def probe():
        return _native.probe_read_bandwidth(job["threads"], job["probe"])
    rounds, peak, before, start = [], 0, None, tier()
    while told < len(text):
        began = time.perf_counter()
        for token in text[told : told + steps]:
            session.step(token)
        seconds = (time.perf_counter() - began) / steps
        told += steps
        if before is None:
            peak, start = peak_memory(), tier()
        after = probe()
        if before is not None:
            rounds.append([seconds, before, after])
        before = after
    end = tier()
json.dump([peak, rounds, {name: end[name] - start[name] for name in
                          ("bytes_read", "read_seconds", "waited_seconds")}], sys.stdout)
"""


@dataclass(frozen=True)
class SparseRow(Row):
    """``slots``: pages in memory, 0 for all. Disk bytes are a step's; ``hidden`` is the share of the time of
    reading in which no step waited, ``waited`` the seconds of a step that waited."""

    budget: int
    slots: int
    limit: int
    planned_disk: int
    measured_disk: int
    hidden: float | None
    waited: float = 0.0

    @property
    def key(self) -> tuple[str, str, int, int, bool]:
        return self.model, self.kv, self.context, self.budget, self.slots > 0


@dataclass(frozen=True)
class Taken:
    """What a process took: bytes at its peak, and of each turn a step's seconds and memory's speed before and
    after. ``disk``: bytes read by all turns that count, seconds of it and seconds that steps waited."""

    peak: int
    rounds: list[tuple[float, float, float]]
    disk: dict[str, float]


def limit_for(case: Placeable, context: int) -> int | None:
    """Half way between the fewest bytes that a plan accepts with pages on the disk and what all in memory
    takes; None where that is no range."""
    high = case.needed(context) - 1
    if not place(case, context, high).slots:
        return None
    low, top = high // 2, high
    while low < top:
        middle = (low + top) // 2
        low, top = (low, middle) if place(case, context, middle).slots else (middle + 1, top)
    return (low + high) // 2


def take(
    path: str, engine: str, kv: str, text: list[int], budget: int, limit: int | None, threads: int
) -> Taken:
    """A process that reads ``text`` up to where TURNS * STEPS steps are left, and takes these."""
    job = {
        "path": path,
        "engine": engine,
        "text": text,
        "prompt": len(text) - TURNS * STEPS,
        "steps": STEPS,
        "kv": kv,
        "threads": threads,
        "budget": budget,
        "memory": limit,
        "directory": str(cache_dir() / "pages"),
        "probe": PROBE_SECONDS,
    }
    return Taken(*in_process(_CHILD, job, f"{path} {kv} {len(text)} {budget}"))


def row_of(
    case: Placeable,
    taken: Taken,
    name: str,
    kv: str,
    context: int,
    limit: int | None,
    rates: Rates,
    tier: int,
) -> SparseRow:
    """The process beside the plan: ``case`` without a limit of memory. ``tier``: tokens for which it takes
    memory at its peak with pages on the disk."""
    length, middle = context + TURNS * STEPS, context + (TURNS + 1) * STEPS // 2
    placed = place(case, length, limit) if limit else case

    def predicted(bandwidth: float) -> float:
        return sum(step.seconds for step in placed.decode(replace(rates, bandwidth=bandwidth), middle))

    seconds, bandwidth = settle(taken.rounds, predicted)
    steps, disk = (TURNS - 1) * STEPS, taken.disk
    return SparseRow(
        model=name,
        kv=kv,
        head="dense",
        context=context,
        planned_bytes=placed.needed(tier if placed.slots else context + STEPS),
        measured_bytes=taken.peak,
        planned_seconds=predicted(bandwidth),
        measured_seconds=seconds,
        bandwidth=bandwidth,
        budget=case.chosen,
        slots=placed.slots,
        limit=limit or 0,
        planned_disk=sum(step.bytes for step in placed.decode(rates, middle) if step.limit == "disk"),
        measured_disk=round(disk["bytes_read"] / steps),
        hidden=1 - disk["waited_seconds"] / disk["read_seconds"] if disk["read_seconds"] else None,
        waited=disk["waited_seconds"] / steps,
    )


def run(path: str, kv: str, context: int, budget: int, on_disk: bool, rates: Rates) -> SparseRow | None:
    """One row: the process, and the plan for its length. None where nothing would lie on the disk."""
    length = context + TURNS * STEPS
    file = _native.GgufFile(path)
    case = Case.read(file, None, rates.lanes, rates.threads, kv, "dense", 0, budget, "sparse", "none")
    limit = limit_for(case, length) if on_disk else None
    if on_disk and limit is None:
        return None
    taken = take(path, "native", kv, _text(path, length), budget, limit, rates.threads)
    return row_of(case, taken, Path(path).name, kv, context, limit, rates, length)


@cache
def _text(path: str, n: int) -> list[int]:
    return text_of(_native.GgufFile(path).metadata, n)


def text_of(metadata: Mapping[str, Any], n: int) -> list[int]:
    """``n`` tokens, by the tokenizer that ``metadata`` of a .gguf file has."""
    tokenizer = Tokenizer.from_gguf(metadata)
    return max((document.tokens for document in make_documents(tokenizer, n)), key=len)


def table(rows: list[SparseRow], machine: str) -> str:
    """Markdown, with the errors and whether the targets hold."""
    lines = [
        f"# What `edgert plan` says of sparse attention beside what runs take: {machine}",
        "",
        "`python -m edgert.bench.plan_check_sparse ROWS.jsonl`. Peak resident memory of a process that "
        f"loads, reads a text and takes {STEPS} steps along it; then a step's time in {TURNS - 1} turns of "
        f"{STEPS}, predicted from memory's speed around each: the median of those between which it held. "
        "Dense head.",
        "",
        *verdict(rows, "step", DECODE_MEDIAN),
        "",
        *lines_of(rows, "KV"),
    ]
    return "\n".join(lines) + "\n"


def lines_of(rows: list[SparseRow], kv: str) -> list[str]:
    """The rows as lines of a table; ``kv``: what that attribute of them is."""
    columns = (
        *("model", kv, "context", "budget", "pages in memory", "peak planned", "measured", "off"),
        *("step planned", "measured", "off", "from the disk planned", "measured", "hidden", "waits", "GB/s"),
    )
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return head + [f"| {' | '.join(_cells(row))} |" for row in rows]


def _cells(r: SparseRow) -> list[str]:
    disk = (f"{r.planned_disk / 1e6:.2f} MB", f"{r.measured_disk / 1e6:.2f} MB") if r.slots else ("", "")
    return [
        *(r.model, r.kv, f"{r.context:,}", f"{r.budget:,}"),
        f"{r.slots} of {-(-r.context // 16)}" if r.slots else "all",
        *(f"{r.planned_bytes / 1e6:.1f} MB", f"{r.measured_bytes / 1e6:.1f} MB"),
        f"{r.memory_error:+.1%}{'' if r.memory_held else ' (!)'}",
        *(f"{r.planned_seconds * 1e3:.2f} ms", f"{r.measured_seconds * 1e3:.2f} ms", f"{r.time_error:+.1%}"),
        *(*disk, "" if r.hidden is None else f"{max(r.hidden, 0):.0%}"),
        *(f"{r.waited * 1e3:.2f} ms" if r.slots else "", f"{r.bandwidth / 1e9:.1f}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m edgert.bench.plan_check_sparse", description=__doc__)
    parser.add_argument("rows", type=Path, metavar="ROWS.jsonl", help="where rows are kept")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.md", help="default: stdout")
    parser.add_argument("--models", default="smollm2-135m,gemma-3-270m")
    parser.add_argument("--contexts", default="2000,4000,7900")
    parser.add_argument("--budgets", default="512,1024")
    parser.add_argument("--kv", default="f16")
    args = parser.parse_args()
    rates = rates_for(None, 0)
    if not rates.measured:
        raise SystemExit("run `edgert doctor` first: the plan needs its measurements")
    kept = args.rows.read_text().splitlines() if args.rows.exists() else []
    rows = [SparseRow(**json.loads(line)) for line in kept]
    known = {row.key for row in rows}
    for model in args.models.split(","):
        path = str(model_path(model))
        for context in map(int, args.contexts.split(",")):
            for kv in args.kv.split(","):
                for budget in map(int, args.budgets.split(",")):
                    for on_disk in (False, True):
                        if (Path(path).name, kv, context, budget, on_disk) in known:
                            continue
                        row = run(path, kv, context, budget, on_disk, rates)
                        if row is None:
                            continue
                        rows.append(row)
                        with args.rows.open("a") as file:
                            file.write(json.dumps(asdict(row)) + "\n")
                        say(f"{row.key}: memory {row.memory_error:+.1%}, time {row.time_error:+.1%}")
    text = table(rows, rates.name)
    put(text, args.output)


if __name__ == "__main__":
    main()
