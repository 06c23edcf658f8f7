"""The measurements: engines take turns, so that a change of the machine's speed meets them alike."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgert.bench.quiet import Watch
from edgert.bench.runners import LlamaCpp, Native, Runner, back_to

from edgert import _native
from edgert.whole_file import write_whole

DECODE_STEPS = 32  # of one sample
LONG = 4000  # prefills of so many tokens are repeated for the peer's better setting alone
PROBE_SECONDS = 0.3


@dataclass
class Row:
    """Samples of one measurement. Rates are tokens a second; times (``unit`` "s") are seconds.

    ``peers`` has one list for each setting of llama.cpp, in turn with ``ours``. ``step_bytes`` is what
    a step of ours reads, ``bandwidth`` what the machine gave beside it, in bytes a second.
    ``same`` of ``compared`` positions had the same likeliest token as the peer's better setting.
    ``others`` is the share of the processors that other processes took.
    """

    what: str
    tokens: int
    unit: str = "tok/s"
    ours: list[float] = field(default_factory=list)
    peers: dict[str, list[float]] = field(default_factory=dict)
    step_bytes: int = 0
    bandwidth: list[float] = field(default_factory=list)
    same: int = 0
    compared: int = 0
    others: float = 0.0

    @property
    def peer(self) -> str:
        """The peer's better setting, by its median."""
        best = max if self.unit == "tok/s" else min
        return best(self.peers, key=lambda label: statistics.median(self.peers[label]))

    @property
    def ratios(self) -> list[float]:
        """How many times faster than the peer's better setting, turn by turn."""
        pairs = zip(self.ours, self.peers[self.peer], strict=True)
        return [a / b if self.unit == "tok/s" else b / a for a, b in pairs]

    @property
    def shares(self) -> list[float]:
        """Bytes read a second as a share of the machine's bandwidth, turn by turn."""
        pairs = zip(self.ours, self.bandwidth, strict=False)
        return [rate * self.step_bytes / bandwidth for rate, bandwidth in pairs]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def put(text: str, output: Path | None) -> None:
    """Write a table to ``output``, whole or not at all, or (None) to stdout."""
    if output is None:
        print(text, end="")
    else:
        write_whole(output, [text.encode()])


def greedy(runner: Runner, prompt: Sequence[int], n: int) -> list[int]:
    runner.clear()
    tokens = [runner.prefill(prompt)]
    while len(tokens) < n:
        tokens.append(runner.step(tokens[-1]))
    return tokens


def forced(runner: Runner, prompt: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """The likeliest token after ``prompt`` and after each of ``tokens`` but the last."""
    runner.clear()
    return [runner.prefill(prompt), *(runner.step(token) for token in tokens[:-1])]


@dataclass
class Answers:
    """How alike the engines answer: the greedy continuation of ``total`` tokens is the same for the
    first ``common``, and along the peer's continuation ``same`` positions have the same top token."""

    total: int
    common: int
    same: int


def compare_answers(ours: Runner, peer: Runner, prompt: Sequence[int], n: int = 64) -> Answers:
    theirs = greedy(peer, prompt, n)
    own = greedy(ours, prompt, n)
    common = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=True)) if a != b), n)
    along = forced(ours, prompt, theirs)
    return Answers(n, common, sum(a == b for a, b in zip(along, theirs, strict=True)))


class Comparison:
    """One model in edgert and, twice, in llama.cpp: with flash attention and without."""

    def __init__(self, path: Path, threads: int, tokens: Sequence[int], longest: int) -> None:
        """``tokens``: real text, ``longest`` + DECODE_STEPS tokens of it."""
        self.threads, self.tokens = threads, tokens
        context = longest + DECODE_STEPS + 1
        self.ours = Native(path, threads, context)
        self.peers = [LlamaCpp(path, threads, context, flash) for flash in (True, False)]
        self._all: list[Runner] = [self.ours, *self.peers]

    def answers(self) -> Answers:
        """Also brings the weights into memory and the threads into being."""
        found = [compare_answers(self.ours, peer, self.tokens[:128]) for peer in self.peers]
        return min(found, key=lambda a: a.same)

    def prefill(self, length: int, repetitions: int) -> Row:
        row, tops = Row("prefill", length), dict[str, int]()
        prompt, watch = self.tokens[:length], Watch()
        row.peers = {peer.label: [] for peer in self.peers}
        for turn in range(repetitions):
            peers = self.peers
            if turn and length >= LONG:
                peers = [peer for peer in self.peers if peer.label == row.peer]
                row.peers = {row.peer: row.peers[row.peer]}

            def run(runner: Runner) -> float:
                runner.clear()
                start = time.perf_counter()
                tops[runner.label] = runner.prefill(prompt)
                return length / (time.perf_counter() - start)

            self._turn(turn, row, peers, run)
        row.same, row.compared = int(tops[self.ours.label] == tops[row.peer]), 1
        row.others = watch.share()
        return row

    def decode(self, length: int, repetitions: int) -> Row:
        """With ``length`` tokens of the text in the cache, filled here; steps take the text's next ones."""
        row, tops = Row("decode", length), dict[str, list[int]]()
        before_them, following = self.tokens[:length], self.tokens[length : length + DECODE_STEPS]
        for runner in self._all:
            runner.clear()
            runner.prefill(before_them)
            runner.mark()
        before = self.ours.step_bytes()
        watch = Watch()
        row.peers = {peer.label: [] for peer in self.peers}

        def run(runner: Runner) -> float:
            back_to(runner, before_them)
            runner.step(following[0])  # wakes the threads
            back_to(runner, before_them)
            start = time.perf_counter()
            tops[runner.label] = [runner.step(token) for token in following]
            return DECODE_STEPS / (time.perf_counter() - start)

        for turn in range(repetitions):
            self._turn(turn, row, self.peers, run)
            row.bandwidth.append(_native.probe_read_bandwidth(self.threads, PROBE_SECONDS))
        row.step_bytes = (before + self.ours.step_bytes()) // 2
        row.same = sum(a == b for a, b in zip(tops[self.ours.label], tops[row.peer], strict=True))
        row.compared, row.others = DECODE_STEPS, watch.share()
        return row

    def close(self) -> None:
        for runner in self._all:
            runner.close()

    def _turn(self, turn: int, row: Row, peers: Sequence[Runner], run: Callable[[Runner], float]) -> None:
        """Every engine once; every other turn in the opposite order."""
        order: list[Runner] = [self.ours, *peers]
        for runner in order if turn % 2 == 0 else reversed(order):
            rate = run(runner)
            (row.ours if runner is self.ours else row.peers[runner.label]).append(rate)
            say(f"  {row.what} {row.tokens}: {runner.label} {rate:.1f} tok/s")
