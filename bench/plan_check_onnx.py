"""What `edgert plan` predicts of ONNX exports beside what runs take:
``python -m edgert.bench.plan_check_onnx RUNS.jsonl DIR ...``.

As :mod:`edgert.bench.plan_check`, with ONNX Runtime on the CPU: every run is a process of its own that loads
an export, reads a text and generates, and does so again ``--rounds`` times for the time, with memory's speed
probed in between (0: for the memory alone). Times count where memory gave at least QUIET of what the doctor
measured: elsewhere others were busy. Runs are kept in a file as they come, and those that it has are not made
again. The text is that of :mod:`edgert.bench.eval_texts`: how many different tokens there are in it says how
many rows of the embeddings are read.

With sparse attention a run is one of :mod:`edgert.bench.plan_check_sparse`: steps along a text, with all of
the store in memory, and under a limit of memory with which a quarter of its pages stay there, or the fewest
that may.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from edgert.bench.measure import put, say
from edgert.bench.plan_check import (
    DECODE_MEDIAN,
    GENERATED,
    PROBE_SECONDS,
    Row,
    in_process,
    settle,
    verdict,
)
from edgert.bench.plan_check_sparse import DECODE_MEDIAN as STEP_MEDIAN
from edgert.bench.plan_check_sparse import (
    STEPS,
    TURNS,
    SparseRow,
    Taken,
    lines_of,
    take,
    text_of,
)
from edgert.bench.plan_check_sparse import row_of as sparse_row

from edgert.onnx_directory import OnnxDirectory
from edgert.onnx_plan import OnnxCase
from edgert.onnx_time import decode_steps, prefill_steps
from edgert.placement import PAGE, UNSURE, place
from edgert.rates import Rates, rates_for

ROUNDS = 4
QUIET = 0.85

_CHILD = """
import json, sys
import edgert
from edgert import _native
path, head, context, generated, ids, threads, seconds, count = json.load(sys.stdin)
with edgert.load(path, engine="onnx", head=head, context=context, threads=threads) as model:
    with model.session() as session:
        stats = session.generate(ids, max_tokens=generated).stats
    peak, rounds, prompts = stats.peak_memory, [], [stats.prompt_seconds]
    before = _native.probe_read_bandwidth(threads, seconds)
    for _ in range(count):
        with model.session() as session:
            stats = session.generate(ids, max_tokens=generated).stats
        after = _native.probe_read_bandwidth(threads, seconds)
        rounds.append([1 / stats.generation_tps, before, after])
        prompts.append(stats.prompt_seconds)
        before = after
    import onnxruntime
json.dump([peak, rounds, min(prompts), stats.generated_tokens, onnxruntime.__version__], sys.stdout)
"""


@dataclass(frozen=True)
class OnnxRow(Row):
    """Also a prompt of ``context`` - GENERATED tokens, in seconds; ``kv`` is what was exported and ``quiet``
    whether times were taken and nobody else was busy."""

    planned_prompt: float
    measured_prompt: float
    quiet: bool
    version: str


@dataclass(frozen=True)
class Run:
    """What a process took; ``sha256`` is the export's."""

    sha256: str
    head: str
    context: int
    peak: int
    rounds: list[tuple[float, float, float]]
    prompt_seconds: float
    generated: int
    version: str

    @property
    def key(self) -> tuple[str, str, int]:
        return self.sha256, self.head, self.context


def run(directory: OnnxDirectory, head: str, context: int, threads: int, rounds: int) -> Run:
    ids = text_of(directory.metadata, context)[: context - GENERATED]
    job = [str(directory.path), head, context, GENERATED, ids, threads, PROBE_SECONDS, rounds]
    return Run(
        directory.sha256, head, context, *in_process(_CHILD, job, f"{directory.path} {head} {context}")
    )


@dataclass(frozen=True)
class SparseRun:
    """The same with sparse attention: ``limit`` of memory in bytes, 0: none."""

    sha256: str
    budget: int
    context: int
    limit: int
    taken: Taken

    @property
    def key(self) -> tuple[str, int, int, bool]:
        return self.sha256, self.budget, self.context, self.limit > 0


def sparse_case(directory: OnnxDirectory, budget: int, threads: int) -> OnnxCase:
    return OnnxCase.read(directory, threads, "dense", chosen=budget)


def sparse_run(
    directory: OnnxDirectory, budget: int, context: int, on_disk: bool, threads: int
) -> SparseRun | None:
    """None where nothing would lie on the disk."""
    length = context + TURNS * STEPS
    limit = _limit(sparse_case(directory, budget, threads), length) if on_disk else 0
    if limit is None:
        return None
    text = text_of(directory.metadata, length)
    taken = take(str(directory.path), "onnx", "f16", text, budget, limit or None, threads)
    return SparseRun(directory.sha256, budget, context, limit, taken)


def _limit(case: OnnxCase, length: int) -> int | None:
    """Bytes with which a quarter of the pages, or the fewest that may, stay in memory; None where all do."""
    pages = max(case.fewest_pages(length), length // PAGE // 4)
    limit = math.ceil(replace(case, slots=pages).needed(length) / (1 - UNSURE))
    return limit if place(case, length, limit).slots else None


def row_of(run: Run, directory: OnnxDirectory, rates: Rates) -> OnnxRow:
    """The run beside the plan for its length."""
    case = OnnxCase.read(directory, rates.threads, run.head)
    prompt = run.context - GENERATED

    def predicted(bandwidth: float) -> float:
        steps = decode_steps(case, replace(rates, bandwidth=bandwidth), prompt + run.generated // 2)
        return sum(step.seconds for step in steps)

    seconds, bandwidth = settle(run.rounds, predicted) if run.rounds else (math.nan, rates.bandwidth)
    return OnnxRow(
        model=directory.name,
        kv=f"{directory.quant}, kv {directory.kv}{', FlashHead' if directory.flash_head else ''}",
        head=run.head,
        context=run.context,
        planned_bytes=case.needed(prompt + run.generated),
        measured_bytes=run.peak,
        planned_seconds=predicted(bandwidth),
        measured_seconds=seconds,
        bandwidth=bandwidth,
        planned_prompt=sum(step.seconds for step in prefill_steps(case, rates, prompt)),
        measured_prompt=run.prompt_seconds,
        quiet=bool(run.rounds) and bandwidth >= QUIET * rates.bandwidth,
        version=run.version,
    )


def table(rows: list[OnnxRow], sparse: list[SparseRow], machine: str) -> str:
    """Markdown, with the errors and whether the targets hold."""
    quiet = [row for row in rows if row.quiet]
    times = (
        f" Then the time of a token in {ROUNDS} more generations, predicted from memory's speed around each, "
        "and the shortest time of a prompt; times are left out where none was taken and where memory gave "
        f"less than {QUIET:.0%} of what the doctor measured: others were busy."
    )
    lines = [
        f"# What `edgert plan` says of ONNX exports beside what runs take: {machine}",
        "",
        f"`python -m edgert.bench.plan_check_onnx`, ONNX Runtime {rows[0].version} on the CPU. Peak resident "
        f"memory of a process that loads, reads a text and generates {GENERATED} tokens."
        f"{times if quiet else ''}",
        "",
        verdict(rows, "token", DECODE_MEDIAN)[0],
    ]
    columns = ["model", "types", "head", "context", "peak planned", "measured", "off"]
    if quiet:
        prompts = [abs(r.planned_prompt / r.measured_prompt - 1) for r in quiet]
        lines += [
            verdict(quiet, "token", DECODE_MEDIAN)[1],
            f"- time of a prompt: off by {statistics.median(prompts):.1%} at the median, {max(prompts):.1%} "
            "at worst",
        ]
        columns += ["token planned", "measured", "off", "prompt planned", "measured", "off", "GB/s"]
    lines += ["", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(_cells(row)[: len(columns)])} |" for row in rows]
    if sparse:
        lines += [
            *("", "## Sparse attention", ""),
            f"Steps along a text, {STEPS} after the prompt and then {TURNS - 1} turns of {STEPS}, whose "
            "median counts. Dense head.",
            "",
            *verdict(sparse, "step", STEP_MEDIAN),
            "",
            *lines_of(sparse, "weights"),
        ]
    return "\n".join(lines) + "\n"


def _cells(r: OnnxRow) -> list[str]:
    times = [
        *(f"{r.planned_seconds * 1e3:.2f} ms", f"{r.measured_seconds * 1e3:.2f} ms", f"{r.time_error:+.1%}"),
        *(f"{r.planned_prompt:.2f} s", f"{r.measured_prompt:.2f} s"),
        f"{r.planned_prompt / r.measured_prompt - 1:+.1%}",
        f"{r.bandwidth / 1e9:.1f}",
    ]
    return [
        *(r.model, r.kv, r.head, f"{r.context:,}"),
        *(f"{r.planned_bytes / 1e6:.1f} MB", f"{r.measured_bytes / 1e6:.1f} MB"),
        f"{r.memory_error:+.1%}{'' if r.memory_held else ' (!)'}",
        *(times if r.quiet else [""] * len(times)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m edgert.bench.plan_check_onnx", description=__doc__)
    parser.add_argument("runs", type=Path, metavar="RUNS.jsonl", help="where runs are kept")
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.md", help="default: stdout")
    parser.add_argument("--contexts", default="128,512,2000,4000")
    parser.add_argument("--heads", default="dense,flash,exact", help="those that an export has are taken")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="generations for the time")
    parser.add_argument("--sparse", default="2000,4000,7900", metavar="N,…", help="its contexts")
    parser.add_argument("--budgets", default="1024", metavar="N,…")
    args = parser.parse_args()
    rates = rates_for(None, 0)
    if args.rounds and not rates.measured:
        raise SystemExit("run `edgert doctor` first: the plan needs its measurements")
    kept = [json.loads(line) for line in args.runs.read_text().splitlines()] if args.runs.exists() else []
    runs = {known.key: known for known in (Run(**values) for values in kept if "taken" not in values)}
    sparse = [
        SparseRun(**{**values, "taken": Taken(**values["taken"])}) for values in kept if "taken" in values
    ]
    sparse_runs = {known.key: known for known in sparse}

    def keep(made: Run | SparseRun) -> None:
        with args.runs.open("a") as file:
            file.write(json.dumps(asdict(made)) + "\n")

    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",") if word]

    rows: list[OnnxRow] = []
    sparse_rows: list[SparseRow] = []
    for path in args.directories:
        directory = OnnxDirectory.open(path)
        for context, head in product(numbers(args.contexts), args.heads.split(",")):
            if head != "dense" and directory.flash_head is None:
                continue
            key = directory.sha256, head, context
            if key not in runs:
                runs[key] = run(directory, head, context, rates.threads, args.rounds)
                keep(runs[key])
            row = row_of(runs[key], directory, rates)
            rows.append(row)
            text = f"{row.model}, {row.kv}, {head}, {context}: memory {row.memory_error:+.1%}"
            if runs[key].rounds:
                prompt = row.planned_prompt / row.measured_prompt - 1
                text += f", time {row.time_error:+.1%}, prompt {prompt:+.1%}"
            say(text)
        grid = product(numbers(args.sparse), numbers(args.budgets), (False, True))
        for context, budget, on_disk in grid:
            found = sparse_runs.get((directory.sha256, budget, context, on_disk))
            if found is None:
                found = sparse_run(directory, budget, context, on_disk, rates.threads)
                if found is None:
                    continue
                keep(found)
            case = sparse_case(directory, budget, rates.threads)
            sparse_rows.append(
                sparse_row(
                    case,
                    found.taken,
                    directory.name,
                    directory.quant,
                    context,
                    found.limit or None,
                    rates,
                    context + STEPS,
                )
            )
            made = sparse_rows[-1]
            say(
                f"{made.model} sparse {budget} {context} {made.slots}: memory {made.memory_error:+.1%}, "
                f"time {made.time_error:+.1%}"
            )
    put(table(rows, sparse_rows, rates.name), args.output)


if __name__ == "__main__":
    main()
