"""Models, limits and runs for the tests of trouble with pages on a disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from edgert.bench.long_context import set_context

from edgert.planner import plan

_DIRECTORY = tempfile.TemporaryDirectory(prefix="edgert-long-")
CONTEXT = 8192


@cache
def long_tiny() -> Path:
    """A tiny model whose file says that it was made for CONTEXT positions: keys and values of 20 MB."""
    from tiny_models import tiny

    made = tiny("qwen3")
    path = Path(_DIRECTORY.name) / "long.gguf"
    shutil.copyfile(made.path, path)
    set_context(path, CONTEXT)
    return path


def least_memory(path: Path, context: int, budget: int) -> int:
    """The fewest bytes with which a session runs: as many of its pages as can be are on the disk."""

    def runs(memory: int) -> bool:
        made = plan(path, attention="sparse", budget=budget, context=context, memory=memory, head="dense")
        return made.slots > 0

    high = plan(path, attention="sparse", budget=budget, context=context, head="dense").needed - 1
    low = high // 2
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if runs(middle) else (middle + 1, high)
    assert runs(low), "what all pages take is less than what a plan keeps free"
    return low


@contextmanager
def on_disk() -> Iterator[Path]:
    """A directory on a disk: that of tests may lie in memory."""
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent.parent / "build") as name:
        yield Path(name)


@dataclass
class Job:
    """What tier_child.py is asked for; ``known`` are the right tokens of the reply, once they are known."""

    path: Path
    memory: int
    context: int
    budget: int
    prompt: list[int]
    pages: Path
    saved: Path
    tokens: int
    each: int
    known: list[int] = field(default_factory=list)

    def start(self) -> subprocess.Popen[str]:
        words = json.dumps({name: str(v) if isinstance(v, Path) else v for name, v in vars(self).items()})
        return subprocess.Popen(
            [sys.executable, Path(__file__).with_name("tier_child.py"), words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, timeout: float) -> tuple[list[tuple[int, int]], dict[str, Any]]:
        """A run to its end: positions and tokens that it told, and what its tier did."""
        with self.start() as child:
            out, err = child.communicate(timeout=timeout)
        assert child.returncode == 0, err
        *lines, last = out.splitlines()
        return told(lines), json.loads(last.removeprefix("done "))


def told(lines: list[str]) -> list[tuple[int, int]]:
    """Positions and tokens of a child's lines, of which a killed one's last may be cut off."""
    return [(int(p), int(t)) for p, t in (line.split() for line in lines if not line.startswith("done"))]
