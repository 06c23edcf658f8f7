"""What stands behind `edgert bench`: the engines do the same work, and the int8 baseline is what it says."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from edgert.bench.int8_head import q8_0, requantise
from edgert.bench.peers import OnnxGenai, Transformers
from edgert.bench.remote import Worker
from edgert.bench.runners import LlamaCpp, Native, Runner
from edgert.bench.settings import Job, Setting
from edgert.bench.settings import Test as Task
from edgert.export import quantise
from edgert.export.gguf_writer import write_gguf
from flash_files import parts
from onnx_directories import exported
from tiny_models import prompt, tiny

from edgert import _native
from edgert.errors import EngineError, ModelFileError
from edgert.locate import sidecar_path

TEXT = [int(t) for t in np.random.default_rng(0).integers(3, 290, 40)]


def run(runner: Runner, depth: int = 8, n: int = 12) -> list[int]:
    """Tokens generated after a text, twice, with a prompt read in between."""
    first = runner.prefill(TEXT[:depth])
    runner.mark()
    tokens = runner.generate(first, n)
    if not runner.back():
        runner.clear()
        runner.prefill(TEXT[:depth])
        runner.mark()
    runner.prefill(TEXT[depth : depth + 20])
    if not runner.back():
        runner.clear()
        runner.prefill(TEXT[:depth])
    assert runner.generate(first, n) == tokens
    runner.close()
    return tokens


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
def test_heads_and_peers_generate_the_same(name: str, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    shutil.copy(tiny(name, "F32").path, model)
    write_gguf(sidecar_path(model), *parts(model))
    dense = run(Native(model, 1, 64))
    assert run(Native(model, 1, 64, "exact")) == dense
    assert len(run(Native(model, 1, 64, "flash"))) == len(dense)
    assert run(Native(exported(name, "f32"), 1, 64, engine="onnx")) == dense
    assert run(Native(exported(name, "f32", "lowrank"), 1, 64, "exact", engine="onnx")) == dense
    checkpoint = tiny(name, "F32").path.parent / name
    assert run(Transformers(checkpoint, 1)) == dense
    if name != "lfm2":
        pytest.importorskip("llama_cpp")
        for flash in (True, False):
            theirs = run(LlamaCpp(model, 1, 64, flash))
            assert sum(a == b for a, b in zip(theirs, dense, strict=True)) >= 6


def test_transformers_says_why_it_cannot_load(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"transformers cannot load {tmp_path}"):
        Transformers(tmp_path, 1)


class FakeGenerator:
    """onnxruntime-genai's, with the sum of all tokens as the likeliest next one."""

    def __init__(self, model: Any, parameters: Any) -> None:
        self.tokens: list[int] = []

    def append_tokens(self, tokens: Any) -> None:
        assert tokens.dtype == np.int32
        self.tokens += tokens.tolist()

    def get_logits(self) -> np.ndarray:
        logits = np.zeros((1, 1, 100), np.float32)
        logits[0, 0, sum(self.tokens) % 100] = 1
        return logits

    def rewind_to(self, length: int) -> None:
        del self.tokens[length:]


def test_onnxruntime_genai_is_driven_by_its_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[Any] = []
    fake = SimpleNamespace(
        Config=lambda path: SimpleNamespace(overlay=told.append),
        Model=lambda config: None,
        GeneratorParams=lambda model: SimpleNamespace(set_search_options=lambda **o: told.append(o)),
        Generator=FakeGenerator,
    )
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", fake)
    runner = OnnxGenai(tmp_path, 3, 64)
    assert '"intra_op_num_threads": 3' in told[0] and told[1]["max_length"] == 64
    assert runner.prefill([1, 2, 3]) == 6
    runner.mark()
    assert runner.generate(6, 3) == [12, 24, 48]
    assert runner.back() and runner.step(6) == 12
    runner.clear()
    assert runner.prefill([5]) == 5


def test_q8_0_is_the_exporters() -> None:
    x = np.random.default_rng(1).standard_normal((50, 96)).astype(np.float32)
    x[7] = 0
    np.testing.assert_array_equal(q8_0(x).reshape(50, -1), quantise.q8_0(x))


@pytest.mark.parametrize(("name", "quant"), [("llama", "Q4_0"), ("llama3", "F32"), ("gemma3", "F32")])
def test_the_baseline_has_an_int8_head_and_nothing_else_of_its_own(
    name: str, quant: str, tmp_path: Path
) -> None:
    model, copy = tiny(name, quant).path, tmp_path / "copy.gguf"
    requantise(model, copy)
    a, b = _native.GgufFile(str(model)), _native.GgufFile(str(copy))
    assert a.metadata == b.metadata
    head = "output.weight" if name == "llama3" else "token_embd.weight"
    for old, new in zip(a.tensors, b.tensors, strict=True):
        assert (old.name, old.shape) == (new.name, new.shape)
        if old.name != head:
            assert old.type == new.type and a.read(old.name) == b.read(new.name)
    assert {t.name: t.type for t in b.tensors}[head] == "Q8_0"
    packed = np.frombuffer(b.read(head), np.uint8).reshape(len(a.dequantize(head)), -1)
    np.testing.assert_array_equal(packed, quantise.q8_0(a.dequantize(head)))
    expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(b.dequantize(head), expected)
    assert len(run(Native(copy, 1, 64))) == 12


def test_a_head_that_cannot_be_int8_is_refused(tmp_path: Path) -> None:
    class Odd:
        tensors = (SimpleNamespace(name="token_embd.weight", shape=(8, 33), shard=0, type="F32"),)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgert.bench.int8_head._native.GgufFile", lambda path: Odd())
        with pytest.raises(ValueError, match="no multiple of 32"):
            requantise(tmp_path / "a", tmp_path / "b")


def test_a_worker_raises_what_its_engine_raises(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    job = Job(Setting("edgert", str(broken)), Task(0, 4, 0), 1, [1])
    with Worker(job) as worker, pytest.raises(ModelFileError, match=r"edgert dense: .*broken\.gguf"):
        worker.about()


def test_a_worker_that_dies_is_no_riddle() -> None:
    model = tiny("llama", "Q4_0")
    job = Job(Setting("edgert", str(model.path)), Task(0, 4, 0), 1, prompt(model, 5))
    with Worker(job) as worker:
        assert worker.about()["engine_version"]
        worker._process.kill()
        with pytest.raises(EngineError, match="its process ended with -9"):
            worker.ask("run")
