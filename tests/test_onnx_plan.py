"""`edgert plan` and `edgert info` of ONNX exports: terms that are the graph's own sizes, totals that are what
a process takes, and refusal with what would help."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from cli_process import edgert as command
from conftest import real_model
from edgert.bench.plan_check_sparse import text_of
from onnx_directories import exported

import edgert
from edgert import onnx_plan
from edgert.errors import PlanError, UsageError
from edgert.onnx_directory import QUANTS, OnnxDirectory
from edgert.onnx_interface import ITEM_BYTES
from edgert.onnx_memory import AROUND, SLOTS_AGAIN, held, kv_bytes, products, rows_bytes, scores_bytes
from edgert.onnx_plan import OnnxCase, fitting, needed_bytes
from edgert.onnx_wire import Graph, Node, Tensor
from edgert.rates import rates_for

MB = 1_000_000


def case_of(path: Path, head: str = "auto") -> OnnxCase:
    return OnnxCase.read(OnnxDirectory.open(path), 2, head)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", ["llama", "llama3", "gemma3", "lfm2"])
def test_weights_are_those_of_the_graph(name: str, quant: str) -> None:
    """As often as a matrix is an input of products it is packed, what is only looked up stays mapped."""
    case = case_of(exported(name, quant))
    graph = onnx.load(case.directory.graph, load_external_data=False).graph
    size = {t.name: ITEM_BYTES[t.data_type] * math.prod(t.dims) for t in graph.initializer}
    shape = {t.name: list(t.dims) for t in graph.initializer}
    blocks = [n.input[1] for n in graph.node if n.op_type == "MatMulNBits"]
    packed = sum(size[name] + 8 * shape[name][0] * shape[name][1] for name in blocks)
    table = {n.output[0]: n.input[0] for n in graph.node if n.op_type in ("Cast", "Transpose")}

    def source(name: str) -> str:
        return source(table[name]) if name in table else name

    for node in graph.node:
        if node.op_type == "MatMul" and (matrix := source(node.input[1])) in shape:
            packed += 4 * math.prod(shape[matrix])
    rows = [n.input[0] for n in graph.node if n.op_type in ("GatherBlockQuantized", "Gather")]
    spec = case.directory.spec
    found = held(spec, quant, case.graph, False)
    assert found.packed == packed and found.tables == 0
    assert found.rows == sum(size[name] for name in rows if name in size and "const" not in name)
    assert found.mapped == sum(size[name] for name in size if name.endswith(".scales"))


def multiplied(path: str, outer: str) -> tuple[Node, ...]:
    """Nodes that multiply with "w" by ``path`` of operators, those of ``outer`` outside the branch."""
    inner, outside, name = list[Node](), list[Node](), "w"
    for op in path.split():
        node = Node(op, "", op, (name,), (op,), {}, {})
        (outside if op in outer.split() else inner).append(node)
        name = op
    inner.append(Node("MatMul", "", "m", ("x", name), ("y",), {}, {}))
    branch = Graph(tuple(inner), (), (), ())
    return (*outside, Node("If", "", "i", ("c",), ("y",), {"then_branch": branch}, {}))


@pytest.mark.parametrize(
    ("path", "outer", "kept"),
    [
        ("", "", False),
        ("Transpose", "", True),
        ("Cast Transpose", "Cast", True),
        ("Cast Transpose", "Cast Transpose", False),
    ],
)
def test_what_a_branch_makes_of_a_matrix_stays(path: str, outer: str, kept: bool) -> None:
    weight = Tensor("w", 1, (4, 4), 64, None)
    assert products(Graph(multiplied(path, outer), (weight,), (), ())) == {"w": kept}


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("recipe", ["clusters+lowrank", "lowrank", "clusters"])
def test_a_flash_head_takes_no_head_twice(quant: str, recipe: str) -> None:
    """Its own matrices are packed beside the dense head, its tables are mapped once it is used."""
    case, plain = case_of(exported("llama", quant, recipe), "flash"), case_of(exported("llama", quant))
    assert not any(products(case.graph).values())
    spec, own = case.directory.spec, case.graph.initializers
    found, without = held(spec, quant, case.graph, True), held(spec, quant, plain.graph, False)
    size = {
        t.name: ITEM_BYTES[t.dtype] * math.prod(t.dims) for t in own if t.name.startswith(("head.", "flash."))
    }
    packed = sum(size[name] for name in products(case.graph) if name in size)
    assert packed and packed <= found.packed - without.packed <= 2 * packed
    assert found.tables == sum(size.values()) - packed
    named = {part.name: part.bytes for part in case.memory(100)}
    assert named["FlashHead, mapped"] == found.tables
    assert "FlashHead, mapped" not in {
        part.name for part in case_of(case.directory.path, "dense").memory(100)
    }


def test_rows_of_a_text_are_mapped_with_what_lies_around() -> None:
    """More of them the longer the text and the less there are; never more than all."""
    found = [rows_bytes(10**8, n, "int8") for n in (50, 500, 5000, 10**6)]
    assert found == sorted(found) and found[-1] <= 10**8
    assert 50 * 640 < found[0] < 50 * AROUND["int8"]
    assert rows_bytes(10**7, 500, "int8") / 10**7 > rows_bytes(10**8, 500, "int8") / 10**8


def test_caches_are_those_of_a_session() -> None:
    for name in ("llama", "gemma3", "lfm2", "mistral-window"):
        with edgert.load(exported(name), context=200) as model, model.session() as session:
            session.prefill(list(range(5, 195)), lambda: False)
            spec = model.engine.spec
            assert session._sequence.length == 190
            buffers = [
                *session._sequence._full.buffers.values(),
                *session._sequence._windows.buffers.values(),
            ]
            slots = {buffer.value.shape()[2] for buffer in buffers}
            assert sum(kv_bytes(spec, "f32", 190).values()) == session._sequence.nbytes
            assert min(slots) >= 190  # a tiny window with its spare room holds more


def test_scores_of_float16_keys() -> None:
    """As ONNX Runtime 1.32 took them on x86 (bench/results/amd-epyc-2-cores-plan-onnx.md)."""
    every, some = (OnnxDirectory.open(exported(name)).spec for name in ("llama", "gemma3"))
    assert scores_bytes(every, "f32", 4000) == 0
    assert scores_bytes(every, "f16", 100) == 4 * every.n_heads * 100 * 100
    assert scores_bytes(every, "f16", 4000) == 2 * 4 * every.n_heads * 256 * 4000
    assert scores_bytes(every, "f16", 8000) == 4 * every.n_heads * 256 * (8000 + SLOTS_AGAIN)
    assert scores_bytes(some, "f16", 4000) == 4 * some.n_heads * 256 * 4000


def test_windowed_layers_stop_growing() -> None:
    spec = OnnxDirectory.open(exported("gemma3")).spec
    short, long = kv_bytes(spec, "f32", 100_000), kv_bytes(spec, "f32", 200_000)
    assert long[0] == 2 * short[0]
    assert long[11] == short[11]


def test_another_context_head_and_quant_change_what_they_should() -> None:
    case = case_of(exported("llama", "int8", "lowrank"), "exact")
    longer = case.needed(200) - case.needed(100)
    assert longer >= 100 * sum(kv_bytes(case.directory.spec, "f32", 1).values())
    assert case.needed(100, "int4") < case.needed(100) < case.needed(100, "f32")
    assert needed_bytes(case.directory, 100, 2, "dense") < case.needed(100)
    rates = rates_for("jetson-orin-nano-8gb", 6)
    plan = case.plan(100, rates, 10**9, "x")
    assert plan.fits and plan.kv == "f32" and plan.max_context == 256
    assert plan.needed == case.needed(100)
    assert plan.decode_seconds < case.plan(256, rates, 10**9, "x").decode_seconds
    slow = rates_for("raspberry-pi-5-4gb", 4)
    assert plan.decode_seconds < case.plan(100, slow, 10**9, "x").decode_seconds


def test_what_does_not_fit_is_refused_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = OnnxDirectory.open(exported("llama3", "f32"))
    needed = needed_bytes(directory, 200)
    monkeypatch.setattr(onnx_plan, "memory_left", lambda threads: (needed - 1, "the test"))
    with pytest.raises(PlanError, match="the test leaves") as raised:
        fitting(case_of(directory.path), 200)
    assert (raised.value.needed, raised.value.available) == (needed, needed - 1)
    assert any("--context 1" in text for text in raised.value.remedies)
    assert any("--quant int4" in text for text in raised.value.remedies)
    with pytest.raises(PlanError, match="the test leaves"):
        edgert.load(directory.path, context=200)
    monkeypatch.setattr(onnx_plan, "memory_left", lambda threads: (needed, "the test"))
    fitting(case_of(directory.path), 200)
    edgert.load(directory.path, context=200).close()


def test_a_head_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="has no FlashHead"):
        case_of(exported("llama"), "flash")


def test_the_command(tmp_path: Path) -> None:
    path = str(exported("gemma3", "int4", "lowrank"))
    done = command("plan", path, "--context", 100, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["kv"], plan["head"], plan["context"]) == ("f32", "dense", 100)
    assert plan["needed"] == needed_bytes(OnnxDirectory.open(path), 100)
    refused = command("plan", path, "--memory", "60MB", "--head", "dense")
    assert refused.returncode == 1
    assert "weights, packed" in refused.stdout
    assert "it does not fit; what would help:" in refused.stdout
    wrong = command("plan", path, "--context", 257)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "context must be 2 to 256" in wrong.stderr
    wrong = command("plan", path, "--kv", "q8")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "edgert export --kv" in wrong.stderr


def _nodes(graph: onnx.GraphProto) -> int:
    """Those in branches too."""
    branches = [a.g for n in graph.node for a in n.attribute if a.HasField("g")]
    return len(graph.node) + sum(map(_nodes, branches))


def test_info() -> None:
    path = exported("gemma3", "int4", "lowrank")
    facts = json.loads(command("info", path, "--json").stdout)
    model = onnx.load(path / "model.onnx", load_external_data=False)
    assert facts["operators"]["com.microsoft.GroupQueryAttention"] == facts["layers"] == 7
    assert sum(facts["operators"].values()) == _nodes(model.graph)
    assert facts["weight_bytes"] == (path / "model.onnx.data").stat().st_size
    assert facts["flash_bytes_per_token"] > 0
    shown = command("info", path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "lowrank, scores 23 tokens, 50.00% of the dense head's tokens" in shown.stdout
    assert facts["head"] == "dense" and "FlashHead is not expected to be faster" in shown.stdout
    assert "FlashHead" not in command("info", exported("lfm2")).stdout


_CHILD = """
import json, sys
import edgert
ids = json.load(sys.stdin)
with edgert.load(sys.argv[1], context=len(ids) + 48, threads=1, head="dense") as model:
    with model.session() as session:
        print(session.generate(ids, max_tokens=48).stats.peak_memory)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quant", "kv"),
    [
        ("smollm2-135m", "int4", "f32"),
        ("smollm2-135m", "f16", "f16"),
        ("gemma-3-270m", "int4", "f16"),
        ("gemma-3-270m", "int8", "f32"),
    ],
)
def test_the_peak_is_what_the_plan_says(name: str, quant: str, kv: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    words = ["--format", "onnx", "--quant", quant, "--kv", kv, "-o", target]
    done = command("export", real_model(name), *words, timeout=500)
    assert done.returncode == 0, done.stderr
    directory = OnnxDirectory.open(target)
    for context in (128, 2000):
        ids = json.dumps(text_of(directory.metadata, context)[: context - 48])
        child = [sys.executable, "-c", _CHILD, str(target)]
        peak = int(subprocess.run(child, input=ids, capture_output=True, text=True, check=True).stdout)
        planned = needed_bytes(directory, context, 1, "dense")
        assert abs(planned - peak) <= 0.03 * peak + 8 * MB


@pytest.mark.slow
@pytest.mark.parametrize(("name", "faster"), [("smollm2-135m", "dense"), ("gemma-3-270m", "flash")])
def test_the_faster_head_of_real_models(name: str, faster: str, tmp_path: Path) -> None:
    """As the bench measured it where rates are nearly these (bench/results/amd-epyc-2-cores-onnx.md)."""
    model = tmp_path / "model.gguf"
    model.symlink_to(real_model(name))
    target = tmp_path / "out"
    done = command("export", model, "--format", "onnx", "--flash-head", "-o", target, timeout=500)
    assert done.returncode == 0, done.stderr
    assert edgert.plan(target, platform="x86-laptop-ddr4", threads=2).head == faster
