"""`edgert export DIRECTORY`: checkpoints as transformers saves them, converted and run against transformers
and llama.cpp; and the command."""

from __future__ import annotations

import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_process import edgert
from edgert.export.checkpoint import Checkpoint
from edgert.export.gguf_writer import Streamed, write_gguf
from edgert.export.hf_weights import Weight, encoded
from hf_files import (
    change,
    logits,
    nothing,
    rms,
    run,
    save,
    spec_of,
)
from safetensors.numpy import load_file, save_file
from tiny_models import NAMES, prompt, tiny

import edgert as package
from edgert import _native
from edgert.cli import main
from edgert.errors import UsageError
from edgert.locate import model_path, sidecar_path
from edgert.sidecar import Sidecar

# --- models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_family(name: str, tmp_path: Path) -> None:
    """As float32: the very tensors and the description of the file that tiny_models converts on its own, and
    transformers' logits (keys and values are float16, so 2^-11 grown by a few layers). In 8 bits: nearly."""
    model, directory = tiny(name), save(name, tmp_path)
    path = run(directory)
    assert path == directory / f"{directory.name}.F32.gguf" and path.stat().st_mode & 0o777 == 0o644
    ours, theirs = _native.GgufFile(str(path)), _native.GgufFile(str(model.path))
    assert spec_of(ours) == spec_of(theirs)
    assert {t.name for t in ours.tensors} == {t.name for t in theirs.tensors}
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(ours.dequantize(tensor.name), theirs.dequantize(tensor.name))
    tokens = prompt(model, 40)
    expected = model.logits(tokens)
    assert np.abs(logits(path, tokens) - expected).max() < 5e-3 * np.abs(expected).max()
    int8 = run(directory, "int8", tmp_path / "int8.gguf")
    assert rms(logits(int8, tokens), expected) < 0.08
    kinds = {t.name: t.type for t in _native.GgufFile(str(int8)).tensors}
    for tensor in theirs.tensors:
        matrix = len(tensor.shape) == 2 and "shortconv.conv" not in tensor.name
        kind = "F32" if not matrix else "F16" if tensor.shape[1] % 32 else "Q8_0"
        assert kinds[tensor.name] == kind, tensor.name


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "qwen3", "gemma3", "lfm2"])
def test_llama_cpp_runs_it(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    path = run(save(name, tmp_path), "int8")
    tokens = prompt(tiny(name), 24)
    assert rms(logits(path, tokens), logits(path, tokens, "llamacpp")) < 0.08


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints(dtype: torch.dtype, directory: Path) -> None:
    weights = {
        k: torch.from_numpy(v).to(dtype) for k, v in load_file(directory / "model.safetensors").items()
    }
    from safetensors.torch import save_file as save_torch

    save_torch(weights, directory / "model.safetensors")
    file = _native.GgufFile(str(run(directory)))
    np.testing.assert_array_equal(
        file.dequantize("token_embd.weight"), weights["model.embed_tokens.weight"].float().numpy()
    )
    np.testing.assert_array_equal(
        file.dequantize("blk.1.ffn_norm.weight"),
        weights["model.layers.1.post_attention_layernorm.weight"].float().numpy(),
    )


@pytest.mark.parametrize(("quant", "kind", "error"), [("f16", "F16", 1e-3), ("int4", "Q4_0", 0.12)])
def test_other_types(quant: str, kind: str, error: float, directory: Path) -> None:
    path = run(directory, quant)
    assert path.name == f"model.{kind}.gguf"
    file = _native.GgufFile(str(path))
    assert {t.name: t.type for t in file.tensors}["blk.0.ffn_down.weight"] == kind
    expected = load_file(directory / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert rms(file.dequantize("blk.0.ffn_down.weight"), expected) < error


def test_shards_give_the_same_file(saved: Path, tmp_path: Path) -> None:
    sharded = save("llama", tmp_path / "sharded", max_shard_size="300KB")
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 2
    paths = [run(d, "int8", tmp_path / f"{d.name}.gguf") for d in (saved, sharded)]
    files = [_native.GgufFile(str(p)) for p in paths]
    for tensor in files[0].tensors:
        np.testing.assert_array_equal(*(f.dequantize(tensor.name) for f in files))


def test_what_other_checkpoints_store_besides_is_left_out(directory: Path) -> None:
    """A tied head stored all the same, and the frequencies of rope."""
    first = run(directory).read_bytes()
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(weights, path)
    assert run(directory).read_bytes() == first


def test_layers_of_gemma_in_another_pattern(tmp_path: Path) -> None:
    directory = save("gemma3", tmp_path)
    change(
        directory, "config.json", layer_types=["full_attention", "sliding_attention"] * 3 + ["full_attention"]
    )
    file = _native.GgufFile(str(run(directory)))
    assert [layer["window"] for layer in spec_of(file)["layers"]] == [0, 11, 0, 11, 0, 11, 0]


def test_memory_does_not_hold_a_tensor(tmp_path: Path) -> None:
    """64 MB of float32, converted within a quarter of that."""
    save_file({"x": np.ones((16384, 1024), np.float32)}, tmp_path / "model.safetensors")
    weight = Weight("x", "x", "Q8_0", (16384, 1024), 0, 0.0)
    tracemalloc.start()
    with Checkpoint(tmp_path) as checkpoint, ThreadPoolExecutor(2) as pool:
        parts = encoded(weight, checkpoint, pool, nothing)
        tensor = Streamed("x", "Q8_0", weight.shape, lambda: parts)
        write_gguf(tmp_path / "x.gguf", {}, [tensor])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48e6
    assert (tmp_path / "x.gguf").stat().st_size > 16384 * 1024


# --- the writer --------------------------------------------------------------------------------------


def test_every_kind_of_value_reads_back(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "yes": True,
        "number": 0.5,
        "texts": ["a", "", "ä"],
        "integers": [3, -1],
        "numbers": [0.25, -2.0],
        "flags": [True, False],
        "empty": [],
    }
    write_gguf(tmp_path / "x.gguf", values, [])
    found = _native.GgufFile(str(tmp_path / "x.gguf")).metadata
    assert found == values and [type(v) for v in found.values()] == [type(v) for v in values.values()]


def test_a_stream_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    short = Streamed("x", "F32", (4,), lambda: [np.zeros(12, np.uint8)])
    with pytest.raises(ValueError, match="x: expected 16 bytes of F32, found 12"):
        write_gguf(tmp_path / "x.gguf", {}, [short])
    assert list(tmp_path.iterdir()) == []


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture
def few_states(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"FIT_MAIN": 60, "FIT_OTHER": 30, "HELD_MAIN": 30, "HELD_OTHER": 10, "OWN_FIT": 3, "OWN_HELD": 2}
    for name, size in sizes.items():
        monkeypatch.setattr(f"edgert.export.flash_head.{name}", size)


def test_export_of_a_directory_with_a_head(
    directory: Path, few_states: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(directory), "--flash-head", "--agreement", "0.9", "--seed", "1"]) == 0
    base = directory / "model.Q8_0.gguf"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{base}: 0.") and lines[1].startswith(f"{sidecar_path(base)}: ")
    assert Sidecar(sidecar_path(base), base).quality["agreement"] >= 0.9
    with package.load(directory) as model:
        assert model.head == "flash"
        assert model.chat([{"role": "user", "content": "Hi"}], max_tokens=3).stats.prompt_tokens > 3


def test_export_says_what_it_wrote(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.gguf"
    assert main(["export", str(directory), "--quant", "int4", "-o", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"path": str(path), "quant": "int4", "bytes": path.stat().st_size}
    assert not list(directory.glob("*.gguf"))


def test_the_command_as_a_process(directory: Path) -> None:
    done = edgert("export", directory, "--quant", "f16")
    assert done.returncode == 0 and done.stdout.endswith("MB, f16\n"), done.stderr
    done = edgert("run", directory, "The river", "--max-tokens", 4)
    assert done.returncode == 0 and done.stdout.strip()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{gguf}", "--quant", "int8"], "--quant is for a Hugging Face model directory"),
        (["smollm2-135m", "--quant", "int8"], "--quant is for a Hugging Face model directory"),
        (
            ["{gguf}"],
            "nothing to export; add --flash-head or --retrieval-head, or give a Hugging Face model directory",
        ),
        (["{dir}", "--quant", "int3"], "invalid choice: 'int3'"),
        (["{dir}", "-o", "{dir}/no/x.gguf"], "no such directory"),
        (["{dir}", "-o", "{dir}/model.safetensors"], "expected the name of a .gguf file"),
    ],
)
def test_wrong_use(words: list[str], says: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {"dir": directory, "gguf": tiny("llama").path}
    assert main(["export", *(word.format(**paths) for word in words)]) == 2
    assert says in capsys.readouterr().err


def test_a_directory_is_the_one_model_in_it(directory: Path) -> None:
    with pytest.raises(
        UsageError, match=rf"is a directory; give a \.gguf file; `edgert export {directory}` makes"
    ):
        model_path(directory)
    path = run(directory)
    (directory / "model.F32.edgert.gguf").touch()
    assert model_path(directory) == model_path(str(directory)) == path
    (directory / "other-00002-of-00002.gguf").touch()
    assert model_path(directory) == path
    (directory / "other-00001-of-00002.gguf").touch()
    with pytest.raises(UsageError, match=r"give the file itself, such as .*model\.F32\.gguf"):
        model_path(directory)
