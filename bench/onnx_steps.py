"""What passes of an exported graph cost on the CPU: ``python -m edgert.bench.onnx_steps DIR``.

Times are the process's time on the CPU, with one thread, so that they count work and not the waiting of a
shared machine; ``--wall`` gives elapsed time with ``--threads``. Three tables: memory over ``--tokens``
steps, a step after 256 tokens with caches of more and more slots (a copy of the cache would grow with them),
and a prompt of 128 tokens and steps by either head.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
from edgert.bench.onnx_run import Run

SLOTS = (512, 1024, 2048, 4096, 8192)
FILLED, PROMPT, STEPS = 256, 128, 60


class Bench:
    def __init__(self, directory: Path, threads: int, clock: Callable[[], float]) -> None:
        self._path, self._threads, self._clock = directory / "model.onnx", threads, clock
        about = json.loads((directory / "edgert.json").read_text())
        self._vocab, self._flash = about["spec"]["vocab_size"], about["flash_head"] is not None

    def _run(self, slots: int) -> Run:
        return Run(self._path, slots, slots, self._threads)

    def _prompt(self, count: int) -> list[int]:
        tokens: list[int] = np.random.default_rng(0).integers(0, self._vocab, count).tolist()
        return tokens

    def _timed(self, run: Run, tokens: Sequence[int], position: int, flash: bool = False) -> float:
        outputs = ("flash_ids", "flash_logits") if flash else ("logits",)
        began = self._clock()
        run(tokens, position, outputs, [-1], flash=np.array(flash))
        return 1000 * (self._clock() - began)

    def slots(self) -> None:
        """The least and the median time of a step, which a copy of the cache would make grow."""
        print(f"\n| slots, {FILLED} filled | step, ms: least | median |\n|---|---|---|")
        runs = [self._run(slots) for slots in SLOTS]
        for run in runs:
            run(self._prompt(FILLED), 0)
        times: list[list[float]] = [[] for _ in runs]
        for step in range(STEPS):  # in turns, so that all see the same machine
            for run, taken in zip(runs, times, strict=True):
                taken.append(self._timed(run, [step], FILLED + step))
        for slots, taken in zip(SLOTS, times, strict=True):
            print(f"| {slots} | {min(taken):.2f} | {statistics.median(taken):.2f} |")

    def heads(self) -> None:
        run, tokens = self._run(1024), self._prompt(PROMPT)
        prompt = min(self._timed(run, tokens, 0) for _ in range(5))
        print(f"\n| pass | ms: least | median |\n|---|---|---|\n| prompt of {PROMPT} | {prompt:.1f} | |")
        times: dict[bool, list[float]] = {False: [], True: []}
        for step in range(STEPS):
            for flash in (False, True) if self._flash else (False,):
                times[flash].append(self._timed(run, [step], PROMPT + step, flash))
        for flash, taken in times.items():
            if taken:
                name = "FlashHead" if flash else "dense head"
                print(f"| step, {name} | {min(taken):.2f} | {statistics.median(taken):.2f} |")

    def memory(self, count: int) -> None:
        run, process = self._run(count), psutil.Process()
        for cache in run.caches.values():  # touch every page of the caches first
            cache.update_inplace(np.ones_like(cache.numpy()))
        print("| after steps | resident, MB |\n|---|---|")
        for step in range(count):
            self._timed(run, [step % self._vocab], step)
            if step + 1 in (16, count // 4, count // 2, count):
                print(f"| {step + 1} | {process.memory_info().rss / 1e6:.1f} |")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m edgert.bench.onnx_steps")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    bench = Bench(args.directory, args.threads, time.perf_counter if args.wall else time.process_time)
    bench.memory(args.tokens)  # first: what other sessions leave to the allocator would blur it
    bench.slots()
    bench.heads()
    return 0


if __name__ == "__main__":
    sys.exit(main())
