"""Exported graphs of real weights against transformers on the same weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import real_model
from edgert.bench.onnx_run import Run
from edgert.export.calibration_text import TEXTS
from hf_reference import Reference

from edgert import _native
from edgert.tokenizer import Tokenizer

SLOTS, GENERATED = 320, 64


_CHILD = """
import sys, time
from edgert.cli import main
from edgert.generate import peak_memory
began = time.monotonic()
code = main(sys.argv[1:])
print(time.monotonic() - began, peak_memory())
sys.exit(code)
"""


def export(model: Path, target: Path, *options: str) -> tuple[float, float]:
    """Seconds and bytes at the peak of `edgert export --format onnx`."""
    arguments = ["export", str(model), "--format", "onnx", "-o", str(target), *options]
    command = [sys.executable, "-c", _CHILD, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak = done.stdout.splitlines()[-1].split()
    return float(seconds), float(peak)


def prompts(model: Path, count: int) -> Iterator[list[int]]:
    """The beginnings of ``count`` paragraphs of the calibration texts, of many kinds."""
    tokenizer = Tokenizer.from_gguf(_native.GgufFile(str(model)).metadata)
    paragraphs = [
        part
        for path in sorted(TEXTS.glob("*.txt"))
        for part in path.read_text(encoding="utf-8").split("\n\n")[:4]
        if len(part) > 80
    ]
    for part in paragraphs[:: max(1, len(paragraphs) // count)][:count]:
        yield tokenizer.encode(part)[:100]


def compare(name: str, directory: Path, count: int) -> None:
    model = real_model(name)
    reference = Reference(model)
    export(model, directory / "out", "--quant", "f32")
    run = Run(directory / "out" / "model.onnx", SLOTS, SLOTS, 2)
    for tokens in prompts(model, count):
        logits = run(tokens, 0)[0][0]
        expected = reference.logits(reference.hidden(tokens)).numpy()
        assert np.abs(logits - expected).max() < 1e-3 * np.abs(expected).max()
        ids = list(tokens)
        ids.append(int(logits[-1].argmax()))
        while len(ids) < len(tokens) + GENERATED:
            ids.append(int(run(ids[-1:], len(ids) - 1)[0][0, -1].argmax()))
        # Each token is the arg max of transformers after those before it: the same greedy text.
        chosen = reference.logits(reference.hidden(ids)[len(tokens) - 1 : -1]).argmax(-1)
        assert chosen.tolist() == ids[len(tokens) :]


def test_smollm2_is_transformers(tmp_path: Path) -> None:
    compare("smollm2-135m", tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_twenty_prompts_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    compare(name, tmp_path, 20)


@pytest.mark.slow
def test_an_int4_export_is_quick_and_small_in_memory(tmp_path: Path) -> None:
    seconds, peak = export(real_model("gemma-3-270m"), tmp_path / "out", "--quant", "int4")
    assert seconds < 180
    assert peak < 3e9
