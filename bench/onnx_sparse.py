"""Sparse keys and values of an ONNX export against the same graph with all slots: ``python -m
edgert.bench.onnx_sparse DIR``.

Documents are read up to some last positions of each length and go on in steps of one token, in a session that
sees everything and in one with a working set (edgert/engines/onnx_sparse.py), on one and the same graph. The
last steps take turns, so that both see the same machine: their times count. From one length to the next both
go back to where the steps began and read on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
from edgert.bench.attention_quality import BLOCK, TIMED, TURN, Text
from edgert.bench.context import build, machine
from edgert.bench.eval_texts import Document, make_documents

from edgert.cost import KV_ELEMENT_BYTES
from edgert.engines.onnx import OnnxEngine, OnnxSession
from edgert.engines.onnx_sparse_session import SparseSession
from edgert.model import load
from edgert.whole_file import write_whole

Rows = npt.NDArray[np.float32]
LENGTHS, POSITIONS, SLOTS = "2000,4000,8000", 250, 1024
HEADINGS = (
    "tokens",
    "all slots",
    "slots seen",
    "copied a step",
    "a step, all slots",
    "sparse",
    "times faster",
    "positions",
    "KL",
    "same likeliest token",
    "perplexity",
)


@dataclass
class Length:
    """What was found at one length."""

    tokens: int
    full: list[float] = field(default_factory=list)  # seconds of steps that took turns
    sparse: list[float] = field(default_factory=list)
    steps: int = 0
    copied: int = 0  # bytes, by these steps
    text: Text = field(default_factory=Text)


class Bench:
    def __init__(self, engine: OnnxEngine, positions: int) -> None:
        self._engine, self._positions = engine, positions

    def measure(self, document: Document, lengths: Sequence[Length]) -> None:
        """Lengths of at most the document's, in order."""
        context = len(document.tokens)
        full, sparse = OnnxSession(self._engine, context), SparseSession(self._engine, context)
        for length in lengths:
            start = length.tokens - self._positions - 1
            for session in (full, sparse):
                session.rewind(min(session.length, start))
                session.prefill(document.tokens[session.length : start])
                print(f"{document.source}: {session.length} tokens read", file=sys.stderr)
            self._steps(full, sparse, document.tokens[start : length.tokens], length)
        full.close()
        sparse.close()

    def _steps(self, full: OnnxSession, sparse: SparseSession, tokens: Sequence[int], found: Length) -> None:
        """Steps over ``tokens`` but the last, which is a target alone."""
        sparse.step(tokens[0])  # the first one after a prompt brings the set
        full.step(tokens[0])
        before, end = sparse.copied_bytes, len(tokens) - 1
        timed = max(1, end - TIMED)
        for first in range(1, end, BLOCK):
            last = min(first + BLOCK, end)
            rows: dict[bool, list[Rows]] = {True: [], False: []}
            for at in range(first, last, TURN):
                for is_sparse in (False, True) if at // TURN % 2 else (True, False):
                    session, times = (sparse, found.sparse) if is_sparse else (full, found.full)
                    for token in tokens[at : min(at + TURN, last)]:
                        began = time.perf_counter()
                        rows[is_sparse].append(session.step(token).copy())
                        if at >= timed:
                            times.append(time.perf_counter() - began)
            found.text.add(np.stack(rows[False]), np.stack(rows[True]), tokens[first + 1 : last + 1])
        found.steps += end - 1
        found.copied += sparse.copied_bytes - before


def table(engine: OnnxEngine, lengths: Sequence[Length]) -> str:
    spec = engine.spec
    layers = [layer for layer in spec.layers if layer.kind == "attention" and not layer.window]
    heads = sum(layer.n_kv_heads for layer in layers)
    row = 2 * spec.head_dim * heads * round(KV_ELEMENT_BYTES[engine.directory.kv])
    rows = []
    for length in lengths:
        sparse, full, text = median(length.sparse), median(length.full), length.text
        rows.append(
            [
                f"{length.tokens:,}",
                f"{row * length.tokens / 1e6:.1f} MB",
                f"{row * min(engine.slots, length.tokens) / 1e6:.1f} MB",
                f"{length.copied / length.steps / 1e6:.2f} MB",
                f"{1e3 * full:.2f} ms",
                f"{1e3 * sparse:.2f} ms",
                f"{full / sparse:.2f}",
                f"{text.positions:,}",
                f"{text.kl:.4f} ± {text.kl_error:.4f}",
                f"{text.agreement:.1%}",
                f"{text.perplexity_ratio - 1:+.2%}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in (HEADINGS, ["---:"] * len(HEADINGS), *rows))


def report(engine: OnnxEngine, name: str, lengths: Sequence[Length]) -> str:
    described = engine.describe()
    growth = median(lengths[-1].sparse) / median(lengths[0].sparse)
    return (
        "# Sparse keys and values on ONNX Runtime\n\n"
        f"`python -m edgert.bench.onnx_sparse`: {name}, {described['quant']}, keys and values "
        f"{described['kv']}, {engine.slots:,} slots, ONNX Runtime {described['version']}, "
        f"{described['provider']}, {described['threads']} threads. {machine()['cpu']}, edgert build "
        f"{build()}.\n\n"
        "Against the same graph with slots for all tokens, step by step. Times are medians of the last "
        f"{TIMED} steps of each document, which took turns; KL is of all slots' probabilities from those "
        "here, in nats, with its standard error.\n\n"
        f"{table(engine, lengths)}\n\n"
        f"A sparse step after {lengths[-1].tokens:,} tokens takes {growth:.2f} times as long as after "
        f"{lengths[0].tokens:,}.\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m edgert.bench.onnx_sparse", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--slots", type=int, default=SLOTS)
    parser.add_argument("--lengths", default=LENGTHS, metavar="N,…")
    parser.add_argument("--positions", type=int, default=POSITIONS, help="of each document and length")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    counts = sorted(int(word) for word in args.lengths.split(","))
    lengths = [Length(tokens) for tokens in counts]
    with load(
        args.directory, threads=args.threads, context=counts[-1], attention="sparse", budget=args.slots
    ) as model:
        assert isinstance(model.engine, OnnxEngine)
        bench = Bench(model.engine, args.positions)
        for document in make_documents(model.tokenizer, counts[-1])[: args.documents]:
            bench.measure(document, lengths)
            print(table(model.engine, lengths), file=sys.stderr)
        text = report(model.engine, args.directory.name, lengths)
    if args.output:
        write_whole(args.output, [text.encode()])
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
