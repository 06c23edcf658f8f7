"""What needs a process of its own: time from the start to the first token, and peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgert.bench.measure import Row, say
from edgert.bench.quiet import Watch
from edgert.bench.remote import Worker
from edgert.bench.settings import Job, Setting, Test

from edgert.errors import EngineError

LAST = 8  # tokens generated where memory is measured
# The shortest program that does with llama-cpp-python what `edgert run --raw` does.
LLAMA_CPP_PROGRAM = """
import sys
from llama_cpp import Llama
path, prompt, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
llm = Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
for piece in llm.create_completion(prompt, max_tokens=4, temperature=0.0, stream=True):
    print(piece["choices"][0]["text"], end="", flush=True)
"""


def time_start(path: Path, prompt: str, tokens: int, threads: int, repetitions: int) -> Row:
    """Seconds from starting the process to its first byte of text, file cache warm. Greedy, dense head."""
    run = [sys.executable, "-m", "edgert", "run", str(path), prompt, "--raw", "--max-tokens", "4"]
    programs = {
        # Dense, as all of the table, whether the model has a sidecar or not.
        "edgert": [*run, "--head", "dense", "--context", "512", "--threads", str(threads)],
        "llama.cpp": [sys.executable, "-c", LLAMA_CPP_PROGRAM, str(path), prompt, str(threads)],
    }
    first_texts: dict[str, bytes] = {}
    row = Row("start", tokens, unit="s", peers={"llama.cpp": []})
    for program in programs.values():
        _first_byte(program)  # fills the file cache
    watch = Watch()
    for turn in range(repetitions):
        for label in sorted(programs, reverse=bool(turn % 2)):
            seconds, first_texts[label] = _first_byte(programs[label])
            (row.ours if label == "edgert" else row.peers[label]).append(seconds)
            say(f"  start: {label} {seconds:.3f} s")
    row.same, row.compared = int(len(set(first_texts.values())) == 1), 1
    row.others = watch.share()
    return row


def _first_byte(command: Sequence[str]) -> tuple[float, bytes]:
    # An installed package is compiled once; so is one that lies in a work tree, unless this forbids it.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        first = os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - start
        rest, errors = process.communicate()
    if process.returncode != 0 or not first:
        raise EngineError(f"{command[0]} {command[1]} … failed: {errors.decode(errors='replace')[-500:]}")
    return seconds, (first + rest).strip()


def peak_memory(setting: Setting, threads: int, tokens: Sequence[int]) -> int:
    """Peak resident bytes of a process that loads the model, reads most of ``tokens`` and generates as many
    as are left."""
    test = Test(0, LAST, len(tokens) - LAST)
    with Worker(Job(setting, test, threads, list(tokens))) as worker:
        worker.about()
        worker.ask("run")
        return int(worker.ask("peak")["bytes"])
