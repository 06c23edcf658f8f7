"""Processes killed while they generate with pages on a disk: the next one has the right tokens, nothing is
left behind and nothing hangs."""

from __future__ import annotations

import random
import threading
import time

import pytest
from conftest import real_model
from tier_runs import Job, least_memory, long_tiny, on_disk, told

TIMEOUT = 120.0  # seconds; also while other tests run
EVERY = 5  # rounds, after which one begins without the saved session


@pytest.mark.timeout(600)
def test_a_killed_process_leaves_nothing_and_the_next_goes_on() -> None:
    path = long_tiny()
    prompt = [i * i % 300 for i in range(2800)]
    with on_disk() as here:
        memory = least_memory(path, 4096, 64)
        job = Job(path, memory, 4096, 64, prompt, here / "pages", here / "session", tokens=48, each=8)
        kill_often(job, rounds=4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_killed_processes_of_a_real_model() -> None:
    path = real_model("smollm2-135m")
    prompt = [i * i % 40000 for i in range(2200)]
    with on_disk() as here:
        memory = least_memory(path, 4096, 256)
        job = Job(path, memory, 4096, 256, prompt, here / "pages", here / "session", tokens=64, each=8)
        kill_often(job, rounds=50)


def kill_often(job: Job, rounds: int) -> None:
    began = time.monotonic()
    right, tier = job.finish(TIMEOUT)
    longest = time.monotonic() - began
    assert [position for position, _ in right] == list(range(len(job.prompt), len(job.prompt) + job.tokens))
    assert tier["pages_read"] > 0 and tier["pages"] > tier["slots"]
    job.known = [token for _, token in right]
    job.saved.unlink()
    moments = random.Random(5)
    finished = tokens = 0
    for n in range(rounds):
        if n % EVERY == 0:
            job.saved.unlink(missing_ok=True)
        after = None if n % 2 else moments.randrange(job.tokens)
        out = kill(
            job, moments.uniform(0.05, 0.9) * longest if after is None else moments.uniform(0, 0.1), after
        )
        finished += out.endswith("}\n")
        cut = out if out.endswith("\n") else out[: out.rfind("\n") + 1]
        for position, token in told(cut.splitlines()):
            assert token == job.known[position - len(job.prompt)]
            tokens += 1
        assert_nothing_left(job)
        if out.endswith("}\n"):
            job.saved.unlink()
    assert tokens > 0 and finished < rounds
    job.finish(TIMEOUT)
    assert not any(job.pages.iterdir())
    assert [entry.name for entry in job.saved.parent.iterdir() if entry != job.pages] == [job.saved.name]


def kill(job: Job, seconds: float, tokens: int | None) -> str:
    """What a process said that was killed so long after its start, or after it told so many tokens."""
    with job.start() as child:
        hung = threading.Timer(TIMEOUT, child.kill)
        hung.start()
        assert child.stdout is not None and child.stderr is not None
        lines = [child.stdout.readline() for _ in range(tokens or 0)]
        time.sleep(seconds)
        assert hung.is_alive(), "hangs"
        hung.cancel()
        child.kill()
        said = "".join(lines) + child.stdout.read()
        error = child.stderr.read()
    assert child.returncode in (0, -9), error
    return said


def assert_nothing_left(job: Job) -> None:
    """Pages have no name. What may have one for an instant is an empty file of pages or a complete session,
    which the next process removes."""
    if job.pages.exists():
        assert all(entry.stat().st_size == 0 for entry in job.pages.iterdir())
    names = {entry.name for entry in job.saved.parent.iterdir() if entry != job.pages}
    assert names <= {job.saved.name, f".{job.saved.name}.edgert-new"}
