"""What `edgert plan` predicts beside what runs take: ``python -m edgert.bench.plan_check``.

Every row is a process of its own that loads a model as a user would, reads a prompt and generates, six times
more for the time. Memory's speed changes by the minute on shared machines, so it is probed between the
generations, and the time of each is predicted from the probes around it; those between which it changed do
not count, of the others the median does. All other rates are those that `edgert doctor` stored. Needs the
sidecars of the heads it is asked for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.bench.measure import put, say
from edgert.bench.text import prose

from edgert import _native
from edgert.heads import choose_sidecar
from edgert.locate import model_path
from edgert.plan_time import decode_steps
from edgert.planner import Case
from edgert.rates import rates_for

if TYPE_CHECKING:
    from edgert.rates import Rates

GENERATED = 48  # tokens; a prediction is for the middle of them
PROBE_SECONDS = 0.15
MEMORY_SHARE, MEMORY_BYTES = 0.03, 8_000_000  # what a prediction of the peak may be off by
DECODE_MEDIAN, DECODE_WORST = 0.12, 0.25

_CHILD = """
import json, sys
import edgert
from edgert import _native
path, kv, head, context, generated, ids, threads, seconds = json.load(sys.stdin)
with edgert.load(path, engine="native", kv=kv, head=head, context=context, threads=threads) as model:
    with model.session() as session:
        stats = session.generate(ids, max_tokens=generated).stats
        peak, rounds = stats.peak_memory, []
        before = _native.probe_read_bandwidth(threads, seconds)
        for _ in range(6):
            speed = session.generate(ids, max_tokens=generated).stats.generation_tps
            after = _native.probe_read_bandwidth(threads, seconds)
            rounds.append([1 / speed, before, after])
            before = after
json.dump([peak, rounds, stats.generated_tokens], sys.stdout)
"""
STEADY = 0.1  # by how much the probes around a generation may differ


@dataclass(frozen=True)
class Row:
    """Sizes in bytes, times in seconds a token, ``bandwidth`` in bytes a second."""

    model: str
    kv: str
    head: str
    context: int
    planned_bytes: int
    measured_bytes: int
    planned_seconds: float
    measured_seconds: float
    bandwidth: float

    @property
    def memory_error(self) -> float:
        return self.planned_bytes / self.measured_bytes - 1

    @property
    def memory_held(self) -> bool:
        allowed = MEMORY_SHARE * self.measured_bytes + MEMORY_BYTES
        return abs(self.planned_bytes - self.measured_bytes) <= allowed

    @property
    def time_error(self) -> float:
        return self.planned_seconds / self.measured_seconds - 1


def run(path: str, kv: str, head: str, context: int, rates: Rates) -> Row:
    """One row: the process, and the plan for its length."""
    file = _native.GgufFile(path)
    case = Case.read(file, choose_sidecar(path, head, "native"), rates.lanes, rates.threads, kv, head, 0)
    prompt = context - GENERATED
    job = [path, kv, head, context, GENERATED, _tokens(path, prompt), rates.threads, PROBE_SECONDS]
    peak, rounds, generated = in_process(_CHILD, job, f"{path} {kv} {head} {context}")
    planned = case.needed(prompt + generated)

    def predicted(bandwidth: float) -> float:
        steps = decode_steps(case, replace(rates, bandwidth=bandwidth), prompt + generated // 2)
        return sum(step.seconds for step in steps)

    seconds, bandwidth = settle(rounds, predicted)
    name = Path(path).name
    return Row(name, kv, head, context, planned, peak, predicted(bandwidth), seconds, bandwidth)


def in_process(program: str, job: Any, what: str) -> Any:
    """What a process of its own prints as JSON; it has ``job`` as JSON on stdin. SystemExit when it fails."""
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{what}: {done.stderr.strip()[-400:]}")
    return json.loads(done.stdout)


def settle(
    rounds: Sequence[tuple[float, float, float]], predicted: Callable[[float], float]
) -> tuple[float, float]:
    """Seconds a token and the bandwidth to predict them from, of ``rounds`` (seconds, bandwidth before and
    after): the one of median error among those between which memory's speed held."""
    steady = [r for r in rounds if abs(r[1] - r[2]) <= STEADY * r[1]]
    if not steady:
        say("memory's speed changed within every round: the nearest one is taken")
        steady = [min(rounds, key=lambda r: abs(r[1] - r[2]) / r[1])]
    pairs = sorted((predicted((r[1] + r[2]) / 2) / r[0], r) for r in steady)
    _, (seconds, before, after) = pairs[len(pairs) // 2]
    return seconds, (before + after) / 2


def verdict(rows: Sequence[Row], what: str, median: float, worst: float | None = None) -> list[str]:
    """Two lines of markdown: whether the targets hold, of memory and of the time of ``what``."""
    times = sorted(abs(row.time_error) for row in rows)
    held = sum(row.memory_held for row in rows)
    last = "" if worst is None else f" (target {worst:.0%})"
    return [
        f"- memory within {MEMORY_SHARE:.0%} + {MEMORY_BYTES / 1e6:.0f} MB: {held} of {len(rows)} rows",
        f"- time of a {what}: off by {statistics.median(times):.1%} at the median (target {median:.0%}), "
        f"{times[-1]:.1%} at worst{last}",
    ]


_TOKENS: dict[str, list[int]] = {}


def _tokens(path: str, n: int) -> list[int]:
    """``n`` tokens of prose."""
    if path not in _TOKENS:
        from edgert.tokenizer import Tokenizer

        _TOKENS[path] = Tokenizer.from_gguf(_native.GgufFile(path).metadata).encode(prose(9000))
    return _TOKENS[path][:n]


def table(rows: list[Row], machine: str) -> str:
    """Markdown, with the errors and whether the targets hold."""
    lines = [
        f"# What `edgert plan` says beside what runs take: {machine}",
        "",
        f"`python -m edgert.bench.plan_check`. Peak resident memory of a process that loads, reads a prompt "
        f"and generates {GENERATED} tokens; then the time of a token in six more generations, predicted from "
        "memory's speed around each: the median of those between which that speed held.",
        "",
        *verdict(rows, "token", DECODE_MEDIAN, DECODE_WORST),
        "",
        "| model | KV | head | context | peak planned | measured | off | token planned | measured | off "
        "| GB/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.model} | {r.kv} | {r.head} | {r.context:,} | {r.planned_bytes / 1e6:.1f} MB "
            f"| {r.measured_bytes / 1e6:.1f} MB | {r.memory_error:+.1%}{'' if r.memory_held else ' (!)'} "
            f"| {r.planned_seconds * 1e3:.2f} ms | {r.measured_seconds * 1e3:.2f} ms | {r.time_error:+.1%} "
            f"| {r.bandwidth / 1e9:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m edgert.bench.plan_check", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.md", help="default: stdout")
    parser.add_argument("--models", default="smollm2-135m,gemma-3-270m")
    parser.add_argument("--contexts", default="128,512,2000,4000,8000")
    parser.add_argument("--kv", default="f16,q8")
    parser.add_argument("--heads", default="dense,flash,exact")
    args = parser.parse_args()
    rates = rates_for(None, 0)
    if not rates.measured:
        raise SystemExit("run `edgert doctor` first: the plan needs its measurements")
    rows: list[Row] = []
    for model in args.models.split(","):
        path = str(model_path(model))
        for context in map(int, args.contexts.split(",")):
            for kv in args.kv.split(","):
                for head in args.heads.split(","):
                    row = run(path, kv, head, context, rates)
                    rows.append(row)
                    say(
                        f"{row.model} {kv} {head} {context}: memory {row.memory_error:+.1%}, "
                        f"time {row.time_error:+.1%}"
                    )
    text = table(rows, rates.name)
    put(text, args.output)


if __name__ == "__main__":
    main()
