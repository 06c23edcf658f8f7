"""Exported graphs beside the list of kernels that ONNX Runtime has for CUDA."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_runs
import pytest
from onnx import defs
from onnx_directories import exported
from tiny_models import NAMES

from edgert.engines.onnx_providers import check_kernels, load_graph
from edgert.errors import EngineError
from edgert.onnx_directory import OnnxDirectory
from edgert.onnx_interface import CONTRIB, INTEGERS, OPERATORS, OPSETS
from edgert.onnx_kernels import CUDA, ON_PROCESSOR, without_kernel
from edgert.onnx_preflight import check_graph
from edgert.onnx_wire import Graph, read_model

# Nodes that are chosen on the CPU alone, where a graph has them for both.
INTEGERS_ALONE = {"MatMulInteger", "ReduceMax", "Round"}
ATTENTION = "GroupQueryAttention (float32, int32)"


def graph(name: str, quant: str = "int4", recipe: str = "", kv: str = "f32") -> Graph:
    return check_graph(OnnxDirectory.open(exported(name, quant, recipe, kv))).graph


def test_the_list_is_of_the_operator_set_that_graphs_have() -> None:
    for (domain, op), kernel in CUDA.items():
        if domain != CONTRIB:
            assert defs.get_schema(op, OPSETS[""], domain).since_version == kernel.version, op
    without = {op for domain, op in OPERATORS.keys() - CUDA.keys() - ON_PROCESSOR}
    # Identity: exports of before this list had it.
    assert without == INTEGERS_ALONE - {"MatMulInteger"} | {"Identity"}


@pytest.mark.parametrize("quant", ["f32", "f16", "int8", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_attention_in_float32_is_all_that_cuda_lacks(name: str, quant: str) -> None:
    found = read_model(onnx_runs.exported(name, quant).read_bytes()).graph
    layers = sum(node.op == "GroupQueryAttention" for node in found.nodes)
    assert without_kernel(found) == Counter({ATTENTION: layers} if layers else {})


@pytest.mark.parametrize(
    ("name", "quant", "recipe"),
    [
        ("gemma3", "int4", ""),
        ("qwen2", "int8", ""),
        ("lfm2", "f16", ""),
        ("llama3", "f32", "clusters"),
        ("llama", "int8", "lowrank"),
        ("gemma3", "f16", "clusters+lowrank"),
        ("gemma3", "int4", "clusters+lowrank"),
        ("qwen3", "int8", "clusters+lowrank"),
    ],
)
def test_with_keys_and_values_in_float16_it_lacks_nothing(name: str, quant: str, recipe: str) -> None:
    assert not without_kernel(graph(name, quant, recipe, "f16"))


def test_what_is_missing_is_named_and_what_to_export_instead() -> None:
    path, found = Path("x"), graph("llama", "int4", "clusters+lowrank", "f16")
    check_kernels(found, path, "cuda")
    assert any(tensor.name == INTEGERS for tensor in found.initializers)

    def check(nodes: tuple[object, ...], text: str) -> None:
        for provider in ("cuda", "tensorrt"):
            with pytest.raises(EngineError, match=f"provider='{provider}'.*of x: {text}"):
                check_kernels(replace(found, nodes=nodes), path, provider)
        check_kernels(replace(found, nodes=nodes), path, "cpu")

    def other(found_op: str, **changes: object) -> tuple[object, ...]:
        return tuple(replace(n, **changes) if n.op == found_op else n for n in found.nodes)

    flash = next(node for node in found.nodes if node.op == "If")
    check(
        other("If", attributes={key: _without_choice(value) for key, value in flash.attributes.items()}),
        r"2 MatMulInteger \(int8, uint8\), 1 ReduceMax \(float32, int64\), 2 Round \(float32\); "
        r".* with this version of edgert, or",
    )
    product = next(node for node in found.nodes if node.op == "MatMulNBits")
    biased = replace(product, inputs=(*product.inputs, "", "", "output_norm.weight"))
    check((*found.nodes, biased), r"1 MatMulNBits \(float32, uint8\); .* with this")
    check(other("RMSNormalization", op="LayerNormalization"), r"\d+ LayerNormalization \(float32\); ")
    with pytest.raises(EngineError, match=r"GroupQueryAttention \(float32, int32\); .* again with --kv f16"):
        check_kernels(graph("llama"), path, "cuda")


def _without_choice(branch: Graph | None) -> Graph:
    """With inner branches that both may be run."""
    assert branch
    nodes = [replace(n, inputs=("flash",)) if n.op == "If" else n for n in branch.nodes]
    return replace(branch, nodes=tuple(nodes))


def test_the_choice_reaches_the_nodes() -> None:
    """ONNX Runtime drops the branch that is not chosen when it loads a graph."""
    path = exported("gemma3", "int4", "clusters+lowrank", "f16") / "model.onnx"
    for constants, integers in (({}, True), ({INTEGERS: np.array(0, np.uint8)}, False)):
        session = load_graph(path, "cpu", 1, constants=constants).session
        told = session.get_provider_graph_assignment_info()
        ops = Counter(node.op_type for part in told for node in part.get_nodes())
        assert ops["If"] == 1
        assert INTEGERS_ALONE & set(ops) == (INTEGERS_ALONE if integers else set())
