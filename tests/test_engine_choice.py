"""Which engine a file gets, and what is said when none will do."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import edgert
from edgert import engines
from edgert.engines import open_engine
from edgert.errors import EdgertError, EngineError, ModelFileError, UnsupportedModelError, UsageError


def mystery(path: Path, architecture: str = "mystery") -> Path:
    """A sound GGUF file of an architecture that nobody knows."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    for finish in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        finish()
    writer.close()
    return path


def test_auto_is_native_for_what_native_knows(real_model: Callable[[str], Path]) -> None:
    engine = open_engine(real_model("smollm2-135m"), threads=1)
    assert engine.name == "native" and engine.describe()["threads"] == 1
    assert engine.vocab_size == 49152
    engine.close()


def test_llamacpp_on_request(real_model: Callable[[str], Path]) -> None:
    pytest.importorskip("llama_cpp")
    engine = open_engine(real_model("smollm2-135m"), engine="llamacpp", threads=1, context=64)
    assert engine.name == "llamacpp" and engine.context_length == 64
    engine.close()


def test_auto_falls_back_to_llamacpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = mystery(tmp_path / "m.gguf")
    opened: list[Any] = []

    def fake_open(*args: Any, kv: str) -> Any:
        opened.append((*args, kv))
        return "the engine"

    monkeypatch.setattr(engines, "find_spec", lambda _: "found")
    monkeypatch.setattr(engines.llamacpp, "open", fake_open)
    assert open_engine(path, threads=2, context=32, kv="q8") == "the engine"
    assert opened == [(str(path), 2, 32, "q8")]


def test_without_llamacpp_architecture_and_remedy_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mystery(tmp_path / "m.gguf")
    monkeypatch.setattr(engines, "find_spec", lambda _: None)
    with pytest.raises(UnsupportedModelError, match=r"'mystery'.*pip install 'edgert\[llamacpp\]'"):
        open_engine(path)


def test_native_on_request_never_falls_back(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'mystery'.*engine='llamacpp'"):
        open_engine(mystery(tmp_path / "m.gguf"), engine="native")


@pytest.mark.skipif(not importlib.util.find_spec("llama_cpp"), reason="needs the llamacpp extra")
def test_what_no_engine_knows_is_refused_by_both(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"native engine cannot.*nor can the llamacpp engine"):
        open_engine(mystery(tmp_path / "m.gguf"))


def test_llamacpp_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.llamacpp, "_api", None)
    for name in ("llama_cpp", "llama_cpp.llama_cpp"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineError, match=r"pip install 'edgert\[llamacpp\]'"):
        open_engine(mystery(tmp_path / "m.gguf"), engine="llamacpp")


def test_a_known_architecture_with_missing_keys(tmp_path: Path) -> None:
    path = mystery(tmp_path / "m.gguf", "llama")
    with pytest.raises(ModelFileError, match="llama") as caught:
        open_engine(path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("engine", "torch", "auto, native, llamacpp"),
        ("threads", -1, "threads must be 0"),
        ("threads", 10**6, "threads must be 0"),
        ("threads", 1.5, "threads must be 0"),
        ("threads", True, "threads must be 0"),
        ("kv", "f64", "expected one of f16, q8"),
        ("context", 0, "context must be 2 to 8192"),
        ("context", -5, "context must be 2 to 8192"),
        ("context", 8193, "context must be 2 to 8192"),
        ("context", "big", "context must be 2 to 8192"),
    ],
)
def test_bad_options_of_load(real_model: Callable[[str], Path], option: str, value: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        edgert.load(real_model("smollm2-135m"), **{option: value})


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("Once upon a time there was a model. " * 10)
    (tmp_path / "empty.gguf").write_bytes(b"")
    for path in ("text.gguf", "empty.gguf"):
        with pytest.raises(ModelFileError):
            edgert.load(tmp_path / path)
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(EdgertError):
            edgert.load(path)
    with pytest.raises(ModelFileError, match="context_length"):
        edgert.load(mystery(tmp_path / "no-arch.gguf", ""))
