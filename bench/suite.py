"""Runs the tests: engines take turns, so that a change of the machine's speed meets them alike."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgert.bench.measure import PROBE_SECONDS, say
from edgert.bench.quiet import Watch
from edgert.bench.remote import Worker
from edgert.bench.rows import Facts, make_row, relate
from edgert.bench.sensors import Energy, clocks, temperatures
from edgert.bench.settings import Job, Setting, Test
from edgert.platforms.detect import detect

from edgert import _native
from edgert.errors import PlanError

CHECKED = 256  # positions of the text at which engines are asked for their likeliest token
# Warm-ups end when two in a row are this near, or after so many, or after so many seconds.
NEAR, MOST_WARMUPS, WARM_SECONDS = 0.05, 5, 5.0


@dataclass(frozen=True)
class Request:
    """``settings``: those of edgert first, ``reference`` (edgert's dense head) need not be among them.
    ``text``: token ids, as many as the longest test has positions, and at least two."""

    model: Path
    settings: tuple[Setting, ...]
    reference: Setting
    tests: tuple[Test, ...]
    threads: tuple[int, ...]
    repetitions: int
    text: list[int]


@dataclass
class Samples:
    """Of one setting in one test, turn by turn: tokens a second, joules a token (None: not shown)."""

    worker: Worker
    about: dict[str, Any]
    warmups: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    joules: list[float | None] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)


def measure(request: Request, context: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows, test by test. Raises PlanError, and whatever the engines raise."""
    _check_memory(request)
    agreements = _agreements(request)
    for threads in request.threads:
        for test in request.tests:
            yield from _run(request, test, threads, agreements, context)


def _check_memory(request: Request) -> None:
    """All settings are in memory at the same time, as turns need it."""
    size, count = request.model.stat().st_size, len(request.settings)
    available = detect().available_memory
    if size * count > available:
        raise PlanError(
            f"{count} settings of a model of {size / 1e9:.1f} GB need at least {size * count / 1e9:.1f} GB "
            f"at once, and {available / 1e9:.1f} GB are free: measure fewer heads or peers at once",
            size * count,
            available,
            ("fewer heads", "fewer peers"),
        )


def _agreements(request: Request) -> dict[Setting, tuple[str, int, int]]:
    """Setting -> what it is compared with, positions with the same likeliest token, positions. edgert's
    dense head is compared with the first peer, everything else with edgert's dense head."""
    text = request.text[:CHECKED]
    threads = max(request.threads)

    def along(setting: Setting) -> list[int]:
        say(f"checking the answers of {setting.label}")
        with Worker(Job(setting, Test(len(text), 0, 0), threads, text)) as worker:
            worker.about()
            tokens: list[int] = worker.ask("along")["tokens"]
            return tokens

    own = along(request.reference)
    others = {
        s: along(s)
        for s in request.settings
        # So short a text says nothing of sparse attention: `edgert eval attention` measures that.
        if s != request.reference and s.head != "exact" and s.attention == "full"
    }
    found = {
        setting: (request.reference.label, _same(own, tokens), len(own)) for setting, tokens in others.items()
    }
    peer = next((s for s in request.settings if s.engine != "edgert"), None)
    if peer is not None:
        found[request.reference] = (peer.label, *found[peer][1:])
    return found


def _run(
    request: Request,
    test: Test,
    threads: int,
    agreements: dict[Setting, tuple[str, int, int]],
    context: dict[str, Any],
) -> list[dict[str, Any]]:
    text = request.text[: test.positions]
    with ExitStack() as stack:
        crew = []
        for setting in request.settings:
            worker = stack.enter_context(Worker(Job(setting, test, threads, text)))
            crew.append(Samples(worker, worker.about()))
        energy = stack.enter_context(closing(Energy()))
        before = {"temperature_before": temperatures(), "clock_before": clocks()}
        for samples in crew:
            _warm_up(samples, test)
        watch, bandwidth = Watch([s.worker.pid for s in crew]), []
        for turn in range(request.repetitions):
            _turn(crew, test, turn, energy)
            if test.generate:
                bandwidth.append(_native.probe_read_bandwidth(threads, PROBE_SECONDS))
        facts = Facts(
            test=test,
            threads=threads,
            bandwidth=statistics.median(bandwidth) if bandwidth else None,
            others=watch.share(),
            context={
                **context,
                **before,
                "temperature_after": temperatures(),
                "clock_after": clocks(),
                "energy_source": energy.source,
            },
        )
        agreements = {**agreements, **_identical(request, crew, test, threads)}
        rows = [
            make_row(facts, s, s.worker.ask("peak")["bytes"], agreements.get(s.worker.setting), request.model)
            for s in crew
        ]
    relate(rows)
    return rows


def _warm_up(samples: Samples, test: Test) -> None:
    spent = 0.0
    rates = samples.warmups
    while len(rates) < MOST_WARMUPS and spent < WARM_SECONDS:
        seconds = samples.worker.ask("run")["seconds"]
        spent += seconds
        rates.append(test.tokens / seconds)
        if len(rates) > 1 and abs(rates[-1] / rates[-2] - 1) <= NEAR:
            return


def _turn(crew: Sequence[Samples], test: Test, turn: int, energy: Energy) -> None:
    """Every engine once; every other turn in the opposite order."""
    for samples in crew if turn % 2 == 0 else reversed(crew):
        energy.take()
        samples.last = samples.worker.ask("run")
        joules = energy.take()
        samples.rates.append(test.tokens / samples.last["seconds"])
        samples.joules.append(None if joules is None else joules / test.tokens)
        say(f"{test.name}, turn {turn + 1}: {samples.worker.setting.label} {samples.rates[-1]:.1f} tok/s")


def _identical(
    request: Request, crew: Sequence[Samples], test: Test, threads: int
) -> dict[Setting, tuple[str, int, int]]:
    """The exact modes' tokens against those that edgert's dense head generates with full attention."""
    exact = [s for s in crew if s.worker.setting.exact]
    if not exact or not test.generate:
        return {}
    dense = next((s.last["tokens"] for s in crew if s.worker.setting == request.reference), None)
    if dense is None:
        with Worker(Job(request.reference, test, threads, request.text[: test.positions])) as worker:
            worker.about()
            dense = worker.ask("run")["tokens"]
    return {
        s.worker.setting: (
            request.reference.label,
            _same(dense, s.last["tokens"]),
            test.generate,
        )
        for s in exact
    }


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(x == y for x, y in zip(a, b, strict=True))
