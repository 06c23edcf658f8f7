"""Exports on the command line and in load(): what runs, and what is refused with what to change."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_process import edgert as command
from onnx_directories import exported
from tiny_models import prompt, tiny

import edgert
from edgert import onnx_time
from edgert.engines import onnx_providers
from edgert.engines.onnx_providers import load_graph, load_runtime
from edgert.errors import EngineError, ModelFileError, PlanError, UsageError
from edgert.plan_time import Step


def test_a_directory_is_run_by_the_onnx_engine() -> None:
    path = exported("llama", "int4", "lowrank")
    for engine in ("auto", "onnx"):
        model = edgert.load(path, engine=engine, threads=1, head="flash")
        assert (model.engine.name, model.head, model.kv) == ("onnx", "flash", "f32")
        assert (model.context, model.trained_context) == (256, 256)
    assert model.head_note() == (
        "flash head in the graph, 23 tokens, 50.00% of the dense head's as its sidecar was measured"
    )
    described = model.engine.describe()
    assert described["provider"] == "cpu" and described["threads"] == 1
    assert described["nodes"].keys() == {"CPUExecutionProvider"}
    assert edgert.load(exported("llama"), threads=1).head == "dense"
    assert edgert.load(path, context=100).context == 100


def test_auto_is_the_head_that_is_expected_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported("llama", "int4", "lowrank")
    told = json.loads(command("info", path, "--json").stdout)["head"]
    assert told == edgert.load(path).head == edgert.plan(path).head == "dense", "of 301 tokens all are few"
    monkeypatch.setattr(onnx_time, "head_steps", lambda *case: [Step("head", case[2] == "dense", 0, "fixed")])
    assert edgert.load(path).head == edgert.plan(path).head == "flash"
    assert edgert.load(exported("llama")).head == edgert.plan(exported("llama")).head == "dense"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "native"}, "engine='native' does not run: use engine='onnx'"),
        ({"engine": "llamacpp"}, "engine='llamacpp' does not run"),
        ({"engine": "other"}, "unknown engine 'other'"),
        ({"provider": "npu"}, "unknown provider 'npu': expected one of cpu, cuda, tensorrt"),
        ({"kv": "q8"}, "kv='q8' is not for .*--kv.; drop it"),
        ({"probes": 3}, "probes=3 is not for .*exported; drop it"),
        ({"attention": "exact"}, "attention='exact' is not for"),
        ({"budget": 8}, "a budget is for sparse"),
        ({"heads": "sidecar"}, "heads='sidecar' is not for"),
        ({"memory": 10**9}, "memory=1000000000 is not for .*full attention"),
        ({"page_directory": "x"}, "page_directory='x' is not for"),
        ({"page_limit": 5}, "page_limit=5 is not for"),
        ({"attention": "sparse", "budget": 8}, "at least 528, not 8"),
        (
            {"head": "flash"},
            "no FlashHead, which head='flash' needs: export the model again with --flash-head",
        ),
        ({"head": "exact"}, "no FlashHead"),
        ({"context": 257}, "context must be 2 to 256"),
    ],
)
def test_what_an_export_cannot_be_loaded_with(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        edgert.load(exported("llama"), **options)


@pytest.mark.parametrize("options", [{"engine": "onnx"}, {"provider": "cuda"}])
def test_a_gguf_file_is_not_for_onnx_runtime(options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(UsageError, match=f"{name}=.*`edgert export MODEL --format onnx`"):
        edgert.load(tiny("llama").path, **options)


def test_a_directory_is_looked_into_before_onnx_runtime_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in exported("llama").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (tmp_path / "model.onnx.data").write_bytes(data)
    monkeypatch.setattr(onnx_providers, "load_graph", None)
    with pytest.raises(ModelFileError, match="sha256"):
        edgert.load(tmp_path)


def test_what_does_not_fit_is_refused_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgert.onnx_plan.memory_left", lambda threads: (40_000_000, "this machine"))
    monkeypatch.setattr(onnx_providers, "load_graph", None)
    with pytest.raises(PlanError, match=r"with a context of 200 tokens needs .* of memory and this machine"):
        edgert.load(exported("llama"), context=200)


def test_a_missing_onnxruntime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r"onnxruntime, which is missing; pip install 'edgert\[onnx\]'"):
        edgert.load(exported("llama"))


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_missing_is_no_fall_to_the_processor(provider: str) -> None:
    with pytest.raises(EngineError, match=rf"provider='{provider}' needs .*pip install 'edgert\[onnx-gpu\]'"):
        edgert.load(exported("llama"), provider=provider)


@pytest.mark.parametrize(
    ("release", "remedy"),
    [
        (
            "36",
            r"JetPack 6 \(L4T 36.4.7\).*not that of PyPI: look in https://pypi.jetson-ai-lab.io/jp6/cu126",
        ),
        ("35", r"JetPack 5 \(L4T 35.4.7\).*not that of PyPI"),
        ("38", r"JetPack 7 "),
    ],
)
def test_on_a_jetson_the_wheel_is_another_one(tmp_path: Path, release: str, remedy: str) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text(f"# R{release} (release), REVISION: 4.7, GCID: 1\n")
    assert re.search(remedy, onnx_providers._remedy("cuda", tmp_path))


def test_an_onnxruntime_that_computes_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = FakeRuntime([], [])
    for version, refused in (("1.23.2", True), ("0.99", True), ("1.24.0", False), ("2.0.0rc1", False)):
        old.__version__ = version
        monkeypatch.setitem(sys.modules, "onnxruntime", old)
        if refused:
            with pytest.raises(EngineError, match=rf"onnxruntime {version} is too old.*1\.24 or newer"):
                onnx_providers.load_runtime("cpu")
        else:
            assert onnx_providers.load_runtime("cpu") is old


class FakeRuntime:
    """onnxruntime with a GPU: ``nodes`` are (provider, operator), ``started`` the providers of a session."""

    __version__ = "9.9"
    ExecutionOrder = SimpleNamespace(PRIORITY_BASED=1)

    def __init__(self, nodes: list[tuple[str, str]], started: list[str]) -> None:
        self.nodes, self.started, self.asked = nodes, started, []

    def disable_telemetry_events(self) -> None:
        self.quiet = True

    def get_available_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

    def SessionOptions(self) -> Any:
        return SimpleNamespace(add_session_config_entry=lambda key, value: None)

    def InferenceSession(self, path: str, options: Any, providers: list[str]) -> Any:
        self.asked = providers
        told = [
            SimpleNamespace(ep_name=name, get_nodes=lambda op=op: [SimpleNamespace(op_type=op)])
            for name, op in self.nodes
        ]
        return SimpleNamespace(
            get_providers=lambda: self.started, get_provider_graph_assignment_info=lambda: told
        )


CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def test_queries_are_gathered_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not at the end, until when those of all tokens and layers would stay in memory."""
    runtime = load_runtime("cpu")

    def profiled() -> Any:
        options = ordinary()
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "run")
        return options

    ordinary = runtime.SessionOptions
    monkeypatch.setattr(runtime, "SessionOptions", profiled)
    with edgert.load(exported("llama"), threads=1) as model:
        model.generate(prompt(tiny("llama"), 20), max_tokens=1)
        events = json.loads(Path(model.engine.loaded.session.end_profiling()).read_text())
    ran = [event["name"] for event in events if event["name"].endswith("_kernel_time")]
    gathered = [ran.index(f"queries.{i}_kernel_time") for i in range(3)]
    attended = [i for i, name in enumerate(ran) if name.startswith("GroupQueryAttention")][:3]
    assert gathered[0] < attended[1] < attended[2] and gathered[1] < attended[2]


def test_nodes_are_counted_by_what_they_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRuntime([(CUDA, "MatMulNBits"), (CUDA, "GroupQueryAttention"), (CPU, "Shape")], [CUDA, CPU])
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    loaded = load_graph(Path("x"), "cuda", 1)
    assert loaded.nodes == {CUDA: 2, CPU: 1} and loaded.device == "cuda" and fake.quiet
    assert fake.asked == [CUDA, CPU]


def test_heavy_nodes_on_the_processor_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRuntime([(CPU, "MatMulNBits"), (CPU, "MatMulNBits"), (CUDA, "Add")], [CUDA, CPU])
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    with pytest.raises(EngineError, match="leaves 2 MatMulNBits of x to the processor"):
        load_graph(Path("x"), "cuda", 1)


def test_a_provider_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime warns and goes on without when the libraries of CUDA are not there."""
    monkeypatch.setitem(sys.modules, "onnxruntime", FakeRuntime([], [CPU]))
    with pytest.raises(EngineError, match="provider='tensorrt' did not start, only CPUExecutionProvider did"):
        load_graph(Path("x"), "tensorrt", 1)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_gpu_has_no_attention_in_float32(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRuntime([], [CPU])
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    with pytest.raises(EngineError, match=f"provider='{provider}'.* GroupQuery.*again with --kv f16"):
        edgert.load(exported("llama"), provider=provider)
    with pytest.raises(EngineError, match="did not start"):  # a step further
        edgert.load(exported("llama", kv="f16"), provider=provider)


def test_telemetry_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(load_runtime("cpu"), "disable_telemetry_events", lambda: calls.append(1))
    load_runtime("cpu")
    assert calls == [1]


def test_run_on_the_command_line() -> None:
    path = exported("gemma3", "int4", "lowrank")
    model = edgert.load(path, head="dense")
    words = ["run", str(path), "hello", "--raw", "--max-tokens", "8", "--threads", "1", "--json"]
    expected = list(model.generate("hello", max_tokens=8).tokens)
    for head in ("dense", "exact"):
        done = command(*words, "--head", head, "--engine", "onnx")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["tokens"] == expected
        assert found["stats"]["engine"]["provider"] == "cpu" and found["stats"]["bytes_per_token"] > 0
    assert "onnx cpu, 1 threads" in command(*words[:-1]).stderr  # and as text
    done = command(*words, "--provider", "cuda")
    assert done.returncode == 1 and "pip install 'edgert[onnx-gpu]'" in done.stderr
    assert command(*words, "--engine", "native").returncode == 2


def test_prompts_of_any_length() -> None:
    """Shorter and longer than a pass."""
    model = edgert.load(exported("llama", "f32"), threads=1)
    text = prompt(tiny("llama"), 255)
    for length in (1, 2, 255):
        reply = model.generate(text[:length], max_tokens=1)
        assert reply.tokens[0] == int(tiny("llama").logits(text[:length])[-1].argmax())
