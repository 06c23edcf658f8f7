"""The directory of an ONNX export: complete, described, whole or not at all; and the command that writes
it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_process import edgert as command
from edgert.export import onnx_directory
from edgert.export.gguf_writer import OutputError, write_gguf
from edgert.export.hf_tokenizer_check import compare
from edgert.export.onnx_directory import Request, export_directory
from edgert.export.onnx_flash import COMMON
from edgert.models import ModelSpec
from flash_files import parts
from hf_files import save
from onnx_runs import Run
from tiny_models import prompt, tiny
from tokenizers import Tokenizer as HfTokenizer

from edgert import _native
from edgert.errors import EngineError, UsageError
from edgert.tokenizer import Tokenizer


def quiet(_: str, __: int = 0) -> Any:
    return lambda n: None


def no_head(model: Path) -> None:
    raise AssertionError("no FlashHead was asked for")


def write(source: Path, target: Path, quant: str = "int4", context: int | None = None) -> Path:
    return export_directory(Request(source, quant, context), target, no_head, quiet, quiet)


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
def test_a_directory_is_complete_and_described(tmp_path: Path, name: str) -> None:
    model = tiny(name)
    target = write(model.path, tmp_path / "out", context=100)
    about = json.loads((target / "edgert.json").read_text())
    found = {path.name for path in target.iterdir()} - {"edgert.json"}
    genai = {"genai.onnx", "genai_config.json", "tokenizer_config.json"}
    needed = {"model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer.gguf"}
    assert found == about["files"].keys() == needed | (set() if name == "lfm2" else genai)
    for file, said in about["files"].items():
        data = (target / file).read_bytes()
        assert said == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert about["model"]["sha256"] == hashlib.sha256(model.path.read_bytes()).hexdigest()
    spec = _spec(model.path)
    assert about["spec"] == json.loads(json.dumps(spec.as_dict()))
    assert (about["format"], about["quant"], about["context"], about["flash_head"]) == (2, "int4", 100, None)
    assert list(tmp_path.iterdir()) == [target]


def _spec(path: Path) -> ModelSpec:
    from edgert.engines import native_spec

    file = _native.GgufFile(str(path))
    return native_spec(file, file.metadata)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_tokenizers_give_the_same_ids(tmp_path: Path, name: str) -> None:
    target = write(tiny(name).path, tmp_path / "out")
    own = Tokenizer.from_gguf(_native.GgufFile(str(tiny(name).path)).metadata)
    kept = Tokenizer.from_gguf(_native.GgufFile(str(target / "tokenizer.gguf")).metadata)
    text = "Hello, wörld! 12 345\n\n  x_y <|im_end|>"
    assert kept.encode(text, parse_special=True) == own.encode(text, parse_special=True)
    compare(target, HfTokenizer.from_file(str(target / "tokenizer.json")), own, False)


def test_a_flash_head_comes_from_the_sidecar(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(tiny("llama").path.read_bytes())
    (tmp_path / "model.edgert.gguf").write_bytes(b"damaged")
    made = []

    def make(path: Path) -> None:
        made.append(path)
        write_gguf(tmp_path / "model.edgert.gguf", *parts(path, "lowrank"))

    for _ in range(2):
        request = Request(model, "int4", flash_head=True)
        target = export_directory(request, tmp_path / "out", make, quiet, quiet)
    assert made == [model]  # once: then it was there
    head = json.loads((target / "edgert.json").read_text())["flash_head"]
    tokens = -(-tiny("llama").spec.vocab_size // COMMON) + 4  # common ones and two for each of two units
    rare = {"rare": 4, "clusters": 2}
    assert head == {"recipe": "lowrank", "tokens": tokens, **rare, "quality": {"agreement": 0.5}}
    ids = Run(target / "model.onnx")(prompt(tiny("llama"), 4), 0, ("flash_ids",), flash=np.array(True))[0]
    assert ids.shape == (1, 4, tokens)


def test_a_hugging_face_directory_gives_the_graph_of_its_gguf_file(tmp_path: Path) -> None:
    model = tiny("qwen3")
    checkpoint = save("qwen3", tmp_path / "checkpoint")
    target = write(checkpoint, tmp_path / "out", "f32")
    tokens = prompt(model, 20)
    found = Run(target / "model.onnx")(tokens, 0)[0][0]
    expected = model.logits(tokens)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert (target / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert not any(path.is_dir() for path in target.iterdir())


def test_nothing_is_left_of_an_export_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write(tiny("llama").path, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in target.iterdir()}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_directory, "_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tiny("qwen2").path, target)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    with pytest.raises(KeyboardInterrupt):
        write(tiny("qwen2").path, tmp_path / "new")
    assert list(tmp_path.iterdir()) == [target]
    monkeypatch.undo()
    (tmp_path / ".out.edgert-new").mkdir()  # what a killed process left
    write(tiny("qwen2").path, target)
    assert json.loads((target / "edgert.json").read_text())["spec"]["family"] == "qwen2"
    assert list(tmp_path.iterdir()) == [target]


def test_what_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    for target, text in (
        (other, "something else than an ONNX export"),
        (tmp_path / "no" / "x", "no such dir"),
    ):
        with pytest.raises(UsageError, match=text):
            write(tiny("llama").path, target)
    assert (other / "letter.txt").read_text() == "mine"
    with pytest.raises(UsageError, match="--context 300: expected 1 to 256"):
        write(tiny("llama").path, tmp_path / "out", context=300)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_directory, "_tokenizer", full)
    with pytest.raises(OutputError, match="No space left"):
        write(tiny("llama").path, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(onnx_directory, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install 'edgert\[export\]'"):
        write(tiny("llama").path, tmp_path / "out")


def test_the_command(tmp_path: Path) -> None:
    model, target = str(tiny("llama").path), str(tmp_path / "out")
    options = ("--format", "onnx", "--quant", "int8", "--kv", "f16", "-o", target, "--json")
    done = command("export", model, *options)
    assert json.loads(done.stdout)["path"] == target
    about = json.loads((tmp_path / "out" / "edgert.json").read_text())
    assert (about["quant"], about["kv"]) == ("int8", "f16")
    for wrong, text in (
        (("--format", "onnx"), "name it with --output"),
        (("--format", "onnx", "--retrieval-head", "-o", target), "leave out --format onnx"),
        (("--context", 10), "--context is for --format onnx"),
        (("--kv", "f32"), "--kv is for --format onnx"),
    ):
        failed = command("export", model, *wrong)
        assert (failed.returncode, failed.stdout) == (2, "")
        assert text in failed.stderr
    failed = command("heads", target)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert "is an ONNX export" in failed.stderr
