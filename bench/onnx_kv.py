"""Two exports of one model that differ in the type of keys and values: ``python -m edgert.bench.onnx_kv F32
F16``.

Both run in turns, so that both see the same machine. Steps and passes of 256 tokens are timed after so many
positions, which are not read first: what lies in the slots changes no time. Then the logits after every
position of prose and code are compared, and so are the tokens that each of them goes on with from the last.

In int8 and int4 states are rounded to int8, so that a difference in the last bit of one is soon as large as
the rounding. How large that is shows one and the same export named twice and read in passes of different
lengths (``--passes 64,48``), which may sum in another order.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from edgert.bench.attention_quality import Text
from edgert.bench.eval_texts import make_documents
from edgert.bench.onnx_run import Run

from edgert import _native
from edgert.onnx_directory import OnnxDirectory
from edgert.tokenizer import Tokenizer

LENGTHS, PASS, STEPS, PASSES = "128,2000,8000", 256, 24, 3
PASSES_READ, READ, GREEDY = "64,64", 1024, 64


def times(runs: list[Run], length: int, clock: Callable[[], float]) -> list[list[str]]:
    """Of a step and of a pass with ``length`` positions before them: milliseconds by run."""
    rows = []
    for what, tokens, count in (("step", [1], STEPS), (f"{PASS} tokens", [1] * PASS, PASSES)):
        taken: list[list[float]] = [[] for _ in runs]
        for _ in range(count):
            for run, mine in zip(runs, taken, strict=True):
                began = clock()
                run(tokens, length, ("logits",), [-1])
                mine.append(1000 * (clock() - began))
        found = [f"{min(mine):.2f} ({statistics.median(mine):.2f})" for mine in taken]
        rows.append([f"{what} after {length:,}", *found, f"{min(taken[1]) / min(taken[0]):.2f}"])
    return rows


def compare(runs: list[Run], tokens: list[int], passes: list[int]) -> tuple[Text, int]:
    """What the second one makes of a document, the two reading it in ``passes`` of so many tokens, and how
    many of the :data:`GREEDY` tokens that it goes on with are those of the first, up to the first other
    one."""
    text, last = Text(), len(tokens) - 1
    block = math.lcm(*passes)
    for first in range(0, last, block):
        end = min(first + block, last)
        full, other = (
            np.concatenate([run(tokens[at : min(at + n, end)], at)[0][0] for at in range(first, end, n)])
            for run, n in zip(runs, passes, strict=True)
        )
        text.add(full, other, tokens[first + 1 : end + 1])
    new: list[list[int]] = []
    for run in runs:
        ids = [tokens[-1]]
        for step in range(GREEDY):
            ids.append(int(run(ids[-1:], last + step)[0][0, -1].argmax()))
        new.append(ids)
    same = np.array(new[0]) == np.array(new[1])
    return text, int(same.cumprod().sum()) - 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m edgert.bench.onnx_kv")
    parser.add_argument("directories", type=Path, nargs=2, metavar="DIR")
    parser.add_argument("--lengths", default=LENGTHS, metavar="N,…")
    parser.add_argument("--passes", default=PASSES_READ, metavar="N,N", help="tokens of a pass in each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="the process's time in place of elapsed time")
    parser.add_argument("--only", choices=("times", "logits"))
    args = parser.parse_args()
    lengths, passes = ([int(word) for word in words.split(",")] for words in (args.lengths, args.passes))
    opened = [OnnxDirectory.open(path) for path in args.directories]
    slots = max([*lengths, READ]) + PASS + GREEDY
    runs = [Run(directory.graph, slots, slots, args.threads) for directory in opened]
    print(f"{opened[0].name}, {opened[0].quant}, {args.threads} threads")
    if args.only != "logits":
        names = " | ".join(f"{run.kv}: least (median), ms" for run in runs)
        print(f"\n| | {names} | times as long |\n|---|---|---|---|")
        for length in lengths:
            for row in times(runs, length, time.process_time if args.cpu else time.perf_counter):
                print("| " + " | ".join(row) + " |", flush=True)
    if args.only != "times":
        print(f"\n| text | positions | KL | same likeliest | perplexity | of {GREEDY} greedy tokens |")
        print("|---|---|---|---|---|---|")
        tokenizer = Tokenizer.from_gguf(
            _native.GgufFile(str(args.directories[0] / "tokenizer.gguf")).metadata
        )
        for document in make_documents(tokenizer, READ):
            text, same = compare(runs, document.tokens, passes)
            kl, change = f"{text.kl:.1e} ± {text.kl_error:.0e}", f"{text.perplexity_ratio - 1:+.3%}"
            cells = (document.source, text.positions, kl, f"{text.agreement:.2%}", change, same)
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
