"""The engine on ONNX Runtime with real weights: native's text, memory that does not grow, Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from cli_process import edgert as command
from cli_process import start
from conftest import real_model

import edgert
from edgert.engines.onnx import OnnxEngine
from edgert.onnx_directory import OnnxDirectory

pytestmark = pytest.mark.slow

PROMPTS = (
    "The history of the city of Rome begins",
    "Water boils at",
    "def fibonacci(n):\n",
    "The largest planet of the solar system is",
    "Once upon a time there was a",
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("smollm2-135m", tmp_path_factory.mktemp("export") / "small", "int4")


def export(name: str, target: Path, quant: str) -> Path:
    done = command(
        "export", real_model(name), "--format", "onnx", "--quant", quant, "-o", target, timeout=400
    )
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_texts_are_those_of_the_native_engine(tmp_path: Path, name: str) -> None:
    """Along what native says, greedy, ONNX Runtime in float32 chooses the same token or one that is as
    likely: native rounds states to 8 bits."""
    native = edgert.load(real_model(name), head="dense", threads=2)
    engine = OnnxEngine(OnnxDirectory.open(export(name, tmp_path / "out", "f32")), threads=2)
    same, behind = [], []
    for prompt in PROMPTS:
        ids = native.encode(prompt)
        tokens = native.generate(ids, max_tokens=48).tokens
        session = engine.session(256)
        logits = session.score([*ids, *tokens])[len(ids) - 1 : -1]
        chosen = logits[range(len(tokens)), list(tokens)]
        same.append(logits.argmax(1) == tokens)
        behind.append((logits.max(1) - chosen) / np.abs(logits).max(1))
    assert np.concatenate(same).mean() > 0.97
    assert np.concatenate(behind).max() < 0.03


_CHILD = """
import json, sys
from edgert.engines.onnx import OnnxEngine
from edgert.onnx_directory import OnnxDirectory

def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024

session = OnnxEngine(OnnxDirectory.open(sys.argv[1]), threads=1).session(2200)
found = []
for step in range(2048):
    session.step(1000 + step % 500)
    if step + 1 in (64, 1024, 2048):
        found.append((resident(), session.nbytes))
print(json.dumps(found))
"""


def test_memory_grows_by_the_slots_in_use_alone(small: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, small], capture_output=True, text=True, check=True, timeout=400
    )
    found = json.loads(done.stdout)
    for (before, slots_before), (after, slots_after) in pairwise(found):
        assert abs((after - before) - (slots_after - slots_before)) < 3 << 20


def test_ctrl_c_ends_a_run(small: Path) -> None:
    process = start("run", small, "Write a long story about the sea.", "--max-tokens", 3000)
    assert process.stdout is not None and process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors


def test_a_conversation(small: Path) -> None:
    """Each turn computes what is new alone."""
    done = command("chat", small, "--max-tokens", 20, stdin="Hello\nWhat is 2 + 2?\n/stats\n", timeout=200)
    assert done.returncode == 0 and done.stdout.strip()
    reused = int(done.stderr.rpartition(" tokens (")[2].split()[0])
    assert reused > 30 and "onnx cpu" in done.stderr
