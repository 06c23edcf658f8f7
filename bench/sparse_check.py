"""Sparse attention beside full attention: ``python -m edgert.bench.sparse_check``.

A document is read up to a place, then token by token: each token is a step of full attention and one with
each budget, every one on a cache of its own, in turns that go backwards every other time. So times are of the
same moments, and the logits of the same tokens are compared. Prose and code come with every Python and are no
part of the text that anything here was made with: the language reference's own explanations, and modules of
the standard library.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import numpy.typing as npt
from edgert.bench.measure import say
from edgert.platforms.detect import detect_cpu

from edgert import _native
from edgert.engines import native_spec
from edgert.engines.base import Logits
from edgert.locate import model_path
from edgert.tokenizer import Tokenizer
from edgert.whole_file import write_whole

SOURCES = ("prose", "code")
PARAGRAPH = 200  # characters; what is shorter are mostly headings and lists
CHARACTERS = 120_000  # of a source


@dataclass(frozen=True)
class Row:
    """One setting over the steps of one model, cache type and context; ``budget`` 0 is full attention.
    ``divergence`` from full attention in nats, ``loss`` the mean negative log probability of the text."""

    model: str
    kv: str
    context: int
    budget: int
    seconds: float
    divergence: float
    agreement: float
    loss: float
    positions: int


def text(source: str) -> str:
    """Text of a source, the same in every run on one Python."""
    if source == "prose":
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
        paragraphs = [p for name in sorted(topics) for p in topics[name].split("\n\n") if len(p) >= PARAGRAPH]
        parts = [" ".join(p.split()) for p in dict.fromkeys(paragraphs) if "::=" not in p]
    else:
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
        parts = [m.read_text(encoding="utf-8") for m in modules if 4_000 < m.stat().st_size < 40_000][:12]
    return "\n\n".join(parts)[:CHARACTERS]


def run(path: str, kv: str, context: int, budgets: list[int], positions: int) -> list[Row]:
    """The rows of one model and context: ``positions`` steps that end there, shared by the sources."""
    file = _native.GgufFile(path)
    core = _native.Model(file, native_spec(file, file.metadata).as_dict(), 0)
    tokenizer = Tokenizer.from_gguf(file.metadata)
    settings = [0, *budgets]
    seconds: dict[int, list[float]] = {s: [] for s in settings}
    divergence: dict[int, list[float]] = {s: [] for s in settings}
    agreed: dict[int, list[bool]] = {s: [] for s in settings}
    loss: dict[int, list[float]] = {s: [] for s in settings}
    for source in SOURCES:
        ids = np.array(tokenizer.encode(text(source))[: context + 1], dtype=np.int32)
        start = context - positions // len(SOURCES)
        caches = {s: _native.Cache(core, context, kv, s) for s in settings}
        for cache in caches.values():
            core.forward(cache, ids[:start], full=True)
        for at in range(start, context):
            found: dict[int, Logits] = {}
            for setting in settings if at % 2 else settings[::-1]:
                began = time.perf_counter()
                found[setting] = core.forward(caches[setting], ids[at : at + 1])
                seconds[setting].append(time.perf_counter() - began)
            full = _log_softmax(found[0])
            for setting, logits in found.items():
                other = _log_softmax(logits)
                divergence[setting].append(float((np.exp(full) * (full - other)).sum()))
                agreed[setting].append(bool(full.argmax() == other.argmax()))
                loss[setting].append(float(-other[ids[at + 1]]))
    return [
        Row(
            Path(path).name,
            kv,
            context,
            setting,
            statistics.median(seconds[setting]),
            statistics.fmean(divergence[setting]),
            statistics.fmean(agreed[setting]),
            statistics.fmean(loss[setting]),
            len(agreed[setting]),
        )
        for setting in settings
    ]


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    x: npt.NDArray[np.float64] = logits.astype(np.float64) - float(logits.max())
    return x - float(np.log(np.exp(x).sum()))


def table(groups: list[list[Row]], machine: str) -> str:
    """Markdown; ratios are to the full attention of the same group."""
    lines = [
        f"# Sparse beside full attention: {machine}",
        "",
        "`python -m edgert.bench.sparse_check`. Medians of single steps that take turns, prose and code "
        "together; quality is of the same steps, against full attention with the same type of keys and "
        "values.",
        "",
        "| model | KV | context | budget | a step | times faster | KL | same likeliest token | perplexity "
        "| positions |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for rows in groups:
        for r in rows:
            quality = (
                f"{r.divergence:.4f} | {r.agreement:.1%} | {np.exp(r.loss - rows[0].loss) - 1:+.2%}"
                if r.budget
                else "| |"
            )
            lines.append(
                f"| {r.model} | {r.kv} | {r.context:,} | {f'{r.budget:,}' if r.budget else 'full'} "
                f"| {r.seconds * 1e3:.2f} ms | {rows[0].seconds / r.seconds:.2f} | {quality} "
                f"| {r.positions:,} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m edgert.bench.sparse_check", description=__doc__)
    parser.add_argument("-o", "--output", metavar="FILE.md", help="default: stdout")
    parser.add_argument("--models", default="smollm2-135m,gemma-3-270m")
    parser.add_argument("--contexts", default="2000,8000")
    parser.add_argument("--kv", default="f16,q8")
    parser.add_argument("--budgets", default="512,1024,1536")
    parser.add_argument("--positions", type=int, default=2000, help="steps of a row, prose and code together")
    args = parser.parse_args()
    groups = []
    for model in args.models.split(","):
        for kv in args.kv.split(","):
            for context in map(int, args.contexts.split(",")):
                positions = min(args.positions, context)
                budgets = [int(b) for b in args.budgets.split(",")]
                groups.append(run(str(model_path(model)), kv, context, budgets, positions))
                for r in groups[-1]:
                    setting = f"{r.model} {r.kv} {r.context} {r.budget}"
                    say(f"{setting}: {r.seconds * 1e3:.2f} ms, {r.divergence:.4f}")
    cpu = detect_cpu()
    report = table(groups, f"{cpu.model}, {cpu.cores} cores")
    if args.output is None:
        print(report, end="")
    else:
        write_whole(Path(args.output), [report.encode()])


if __name__ == "__main__":
    main()
