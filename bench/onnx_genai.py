"""Exports beside what onnxruntime-genai's own builder makes of the same weights: ``python -m
edgert.bench.onnx_genai DIR DIR ...``.

Every directory is run in onnxruntime-genai, and edgert's in edgert's engine too, greedy, by the dense head
and by the FlashHead where there is one. The same graph is faster or slower by a tenth from one process to the
next, as its memory happens to lie; so every figure is of several processes that take turns. Times are elapsed
ones with ``--threads``; ``--cpu`` gives those of the processors, for a machine that is not quiet (with one
thread: others spin).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgert.onnx_directory import ABOUT, OnnxDirectory

if TYPE_CHECKING:
    from edgert.engines.onnx import OnnxEngine

PROMPT, STEPS, ROUNDS, CONTEXT = 128, 40, 3, 512
ENGINE, FLASH, GENAI = "edgert", "edgert, FlashHead", "onnxruntime-genai"
# What a run offers: a function that reads a prompt and one that makes a step, each with its token.
Run = tuple[Callable[[list[int]], None], Callable[[], None]]


def in_genai(directory: Path, threads: int) -> Callable[[], Run]:
    import onnxruntime_genai as genai

    config = genai.Config(str(directory))
    options = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = genai.Model(config)

    def start() -> Run:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=CONTEXT, min_length=CONTEXT, do_sample=False)
        generator = genai.Generator(model, parameters)

        def prompt(tokens: list[int]) -> None:
            generator.append_tokens(np.array(tokens, np.int32))
            generator.generate_next_token()

        return prompt, generator.generate_next_token

    return start


def in_engine(directory: Path, threads: int, flash: bool) -> Callable[[], Run]:
    import edgert

    head = "flash" if flash else "dense"
    model = edgert.load(directory, head=head, threads=threads, context=CONTEXT)

    def start() -> Run:
        session, last = cast("OnnxEngine", model.engine).session(CONTEXT), 0

        def prompt(tokens: list[int]) -> None:
            nonlocal last
            last = int(session.prefill(tokens).argmax())

        def step() -> None:
            nonlocal last
            if flash:
                ids, logits = session.flash(session.hidden(last), [])
                last = int(ids[logits.argmax()])
            else:
                last = int(session.step(last).argmax())

        return prompt, step

    return start


def measure(directory: Path, runtime: str, threads: int, cpu: bool) -> dict[str, float]:
    """Milliseconds of the shortest prompt and step of a process's :data:`ROUNDS`."""
    clock = time.process_time if cpu else time.perf_counter
    if runtime == GENAI:
        start = in_genai(directory, threads)
    else:
        start = in_engine(directory, threads, runtime == FLASH)
    tokens = np.random.default_rng(0).integers(100, 5000, PROMPT).tolist()
    prompts, steps = [], []
    for _ in range(ROUNDS):
        prompt, step = start()
        began = clock()
        prompt(tokens)
        prompts.append(1000 * (clock() - began))
        for _ in range(STEPS):
            began = clock()
            step()
            steps.append(1000 * (clock() - began))
    return {"prompt": min(prompts), "step": min(steps), "median": statistics.median(steps)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m edgert.bench.onnx_genai")
    parser.add_argument("directory", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--processes", type=int, default=5, help="of each row")
    parser.add_argument("--runtime", choices=(ENGINE, FLASH, GENAI), help=argparse.SUPPRESS)  # of one process
    args = parser.parse_args()
    if args.runtime:
        print(json.dumps(measure(args.directory[0], args.runtime, args.threads, args.cpu)))
        return 0
    rows: dict[tuple[Path, str], list[dict[str, float]]] = {}
    for directory in args.directory:
        rows[directory, GENAI] = []
        if (directory / ABOUT).exists():
            rows[directory, ENGINE] = []
            if OnnxDirectory.open(directory).flash_head:
                rows[directory, FLASH] = []
    for turn in range(args.processes):
        for directory, runtime in sorted(rows, reverse=bool(turn % 2)):
            rows[directory, runtime].append(_process(directory, runtime, args))
            print(f"  {directory.name} in {runtime}: {rows[directory, runtime][-1]}", file=sys.stderr)
    print(f"| directory | in | prompt of {PROMPT}, ms | step, ms | median step |\n|---|---|---|---|---|")
    for (directory, runtime), found in rows.items():
        cells = (_spread([one[key] for one in found]) for key in ("prompt", "step", "median"))
        print(f"| {directory.name} | {runtime} | {' | '.join(cells)} |")
    return 0


def _process(directory: Path, runtime: str, args: Any) -> dict[str, float]:
    command = [sys.executable, "-m", "edgert.bench.onnx_genai", str(directory), "--runtime", runtime]
    command += ["--threads", str(args.threads), *["--cpu"] * args.cpu]
    found = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    measured: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return measured


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    sys.exit(main())
