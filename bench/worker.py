"""A process that runs one test in one setting of one engine: what it has resident is that setting's alone.

It reads a :class:`Job` as a line of JSON from stdin, answers with what it loaded, then answers every line
that names a method of :class:`Bench`. Ends with its stdin.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from edgert.bench.peers import OnnxGenai, Transformers
from edgert.bench.runners import LlamaCpp, Native, Runner, back_to
from edgert.bench.settings import Job

from edgert.errors import EdgertError
from edgert.generate import peak_memory

# A first prompt also faults pages in and wakes threads; one that is shorter than this is timed again.
COLD_SECONDS = 1.0


def make_runner(job: Job) -> Runner:
    setting, context = job.setting, job.test.positions + 1
    path = Path(setting.source)
    if setting.engine == "edgert":
        s = setting
        return Native(path, job.threads, context, s.head, s.kv, s.attention, s.heads)
    if setting.engine == "onnx":
        return Native(path, job.threads, context, setting.head, engine="onnx")
    if setting.engine == "transformers":
        return Transformers(path, job.threads)
    if setting.engine == "onnxruntime-genai":
        return OnnxGenai(path, job.threads, context)
    return LlamaCpp(path, job.threads, context, **setting.options)


class Bench:
    """One test: its runs leave the cache as they found it."""

    def __init__(self, job: Job) -> None:
        self._job, self._test = job, job.test
        self._runner = make_runner(job)
        self._peak: int | None = None
        self._fill()
        if self._seconds < COLD_SECONDS:
            self._fill()

    def _fill(self) -> None:
        """Put the text in front of the test into the cache."""
        self._runner.clear()
        began = time.perf_counter()
        before = self._test.before
        self._first = self._runner.prefill(self._job.text[:before]) if before else 0
        self._seconds = time.perf_counter() - began
        if before:
            self._runner.mark()

    def about(self) -> dict[str, Any]:
        """The build, and the seconds from handing over the text in front to its first token."""
        return {**self._runner.about(), "fill_seconds": self._seconds}

    def run(self) -> dict[str, Any]:
        """``seconds``, the ``tokens`` chosen, and ``step_bytes``, the mean over a generation."""
        self._rewind()
        ran = self._prompt() if self._test.prompt else self._generate()
        if self._peak is None:
            # Of the first run: to go back for another, some engines keep a copy of their cache.
            self._peak = peak_memory()
        return ran

    def _generate(self) -> dict[str, Any]:
        if self._peak is not None:
            self._runner.step(self._first)  # wakes the threads, which slept while others had their turn
            self._rewind()
        before = self._runner.step_bytes()
        began = time.perf_counter()
        tokens = self._runner.generate(self._first, self._test.generate)
        seconds = time.perf_counter() - began
        after = self._runner.step_bytes()
        mean = None if before is None or after is None else (before + after) // 2
        return {"seconds": seconds, "tokens": tokens, "step_bytes": mean}

    def _rewind(self) -> None:
        if not self._test.before:
            self._runner.clear()
        else:
            back_to(self._runner, self._job.text[: self._test.before])

    def _prompt(self) -> dict[str, Any]:
        ids = self._job.text[self._test.depth : self._test.depth + self._test.prompt]
        began = time.perf_counter()
        token = self._runner.prefill(ids)
        return {"seconds": time.perf_counter() - began, "tokens": [token], "step_bytes": None}

    def along(self) -> dict[str, Any]:
        """The likeliest token after each token of the text but the first ones, one step at a time."""
        text = self._job.text
        self._runner.clear()
        tops = [self._runner.prefill(text[:1]), *(self._runner.step(token) for token in text[1:])]
        return {"tokens": tops}

    def peak(self) -> dict[str, Any]:
        """Highest resident bytes up to the end of the first run, which must have been."""
        return {"bytes": self._peak}


def main() -> None:
    # Whatever a library prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        bench = Bench(Job.from_json(json.loads(sys.stdin.readline())))
        answer(bench.about())
        for line in sys.stdin:
            answer(getattr(bench, line.strip())())
    except BrokenPipeError:
        pass  # nobody waits for the answer any more
    except Exception as error:
        kind = type(error).__name__ if isinstance(error, EdgertError) else "EngineError"
        text = str(error) if isinstance(error, EdgertError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(BrokenPipeError):
            answer({"error": text, "kind": kind})


if __name__ == "__main__":
    main()
