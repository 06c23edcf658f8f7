"""What is read of an ONNX export before ONNX Runtime sees it: what the exporter writes, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
from edgert.models import BadModelMetadata, LayerSpec, ModelSpec, UnsupportedArchitecture, spec_from_dict
from flash_files import spec_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_directories import change_about, change_graph, exported, seal
from tiny_models import NAMES, tiny

from edgert import onnx_preflight, onnx_wire
from edgert.errors import EdgertError, ModelFileError, UnsupportedModelError
from edgert.onnx_directory import OnnxDirectory
from edgert.onnx_preflight import check_graph, preflight
from edgert.onnx_wire import WireError, read_model
from edgert.tokenizer import Tokenizer


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """A directory to spoil, with a FlashHead."""
    return Path(shutil.copytree(exported("llama", "int4", "lowrank"), tmp_path / "out"))


@pytest.mark.parametrize("name", NAMES)
def test_every_family_passes(name: str) -> None:
    directory = OnnxDirectory.open(exported(name))
    assert directory.spec == spec_of(tiny(name).path)
    graph = preflight(directory).graph
    model = onnx.load(directory.graph, load_external_data=False).graph
    assert [node.op for node in graph.nodes] == [node.op_type for node in model.node]
    assert [(t.name, list(t.dims)) for t in graph.initializers] == [
        (t.name, list(t.dims)) for t in model.initializer
    ]


@pytest.mark.parametrize(
    ("name", "quant", "recipe"),
    [
        ("gemma3", "f32", ""),
        ("llama3", "f16", ""),
        ("lfm2", "f16", ""),
        ("llama", "int8", "lowrank"),
        ("llama3", "int4", "clusters"),
        ("llama3", "f32", "clusters"),
        ("gemma3", "f16", "clusters+lowrank"),
    ],
)
def test_every_type_of_weights_and_head_passes(name: str, quant: str, recipe: str) -> None:
    directory = OnnxDirectory.open(exported(name, quant, recipe))
    preflight(directory)
    assert (directory.quant, directory.flash_head is not None) == (quant, bool(recipe))


def test_what_a_directory_says() -> None:
    path = exported("llama", "int4", "lowrank")
    directory = OnnxDirectory.open(path)
    about = json.loads((path / "edgert.json").read_text())
    assert directory.path == path
    assert directory.flash_head == about["flash_head"]
    assert directory.tokenizer == about["tokenizer"]
    assert directory.context == about["context"]
    assert directory.weight_bytes == (path / "model.onnx.data").stat().st_size
    made = Tokenizer.from_gguf(directory.metadata)
    assert made.eos_ids == set(about["tokenizer"]["eos_ids"])
    assert directory.sha256 != OnnxDirectory.open(exported("llama")).sha256


SPEC = tiny("gemma3").spec.as_dict()


@pytest.mark.parametrize("kind", [ModelSpec, LayerSpec])
def test_every_field_of_a_spec_is_needed_and_checked(kind: type) -> None:
    for field in fields(kind):
        if field.name == "layers":
            continue
        wrongs: tuple[Any, ...] = (None, [], {}, "\u2026")
        if isinstance(field.default, bool):
            wrongs = (None, 1, "true")
        for wrong in wrongs:
            if field.name in ("family", "name", "output_norm") and isinstance(wrong, str):
                continue
            values = json.loads(json.dumps(SPEC))
            (values if kind is ModelSpec else values["layers"][3])[field.name] = wrong
            with pytest.raises(BadModelMetadata, match=field.name):
                spec_from_dict(values)
    with pytest.raises(UnsupportedArchitecture, match="softcap"):
        spec_from_dict({**SPEC, "softcap": 30.0})
    for layers in (None, [], {}, [3], [SPEC["layers"][0]] * 2000):
        with pytest.raises(BadModelMetadata, match="layers"):
            spec_from_dict({**SPEC, "layers": layers})


ABOUT: dict[str, tuple[Callable[[dict[str, Any]], object], type[EdgertError], str]] = {
    "a later format": (lambda a: a.update(format=3), UnsupportedModelError, "format = 3"),
    "no format": (lambda a: a.pop("format"), ModelFileError, "format is missing"),
    "an unknown key": (lambda a: a.update(adapter="x"), UnsupportedModelError, "adapter"),
    "another quant": (lambda a: a.update(quant="int2"), UnsupportedModelError, "int2"),
    "another kv": (lambda a: a.update(kv="q8"), UnsupportedModelError, "kv: expected one of f32, f16"),
    "too much context": (lambda a: a.update(context=300), ModelFileError, "context: expected an integer"),
    "context as text": (lambda a: a.update(context="9"), ModelFileError, "context: expected an integer"),
    "no spec": (lambda a: a.pop("spec"), ModelFileError, "spec.layers"),
    "absurd spec": (lambda a: a["spec"].update(dim=2**30), ModelFileError, "dim: expected 1 to"),
    "no files": (lambda a: a.pop("files"), ModelFileError, "files: expected model.onnx"),
    "no graph": (lambda a: a["files"].pop("model.onnx"), ModelFileError, "expected model.onnx"),
    "a path": (lambda a: a["files"].update({"../x": {}}), ModelFileError, "plain names"),
    "an absolute path": (lambda a: a["files"].update({"/etc/passwd": {}}), ModelFileError, "plain names"),
    "a size as text": (
        lambda a: a["files"]["model.onnx"].update(bytes="1"),
        ModelFileError,
        "files.model.onnx.bytes: expected an integer",
    ),
    "no hash": (lambda a: a["files"]["model.onnx"].update(sha256="ff"), ModelFileError, "64 hexadecimal"),
    "another size": (
        lambda a: a["files"]["model.onnx.data"].update(bytes=5),
        ModelFileError,
        "expected 5 bytes, as edgert.json says",
    ),
    "an end outside": (
        lambda a: a["tokenizer"].update(eos_ids=[10**6]),
        ModelFileError,
        "eos_ids: expected ids from 0",
    ),
    "too many tokens": (lambda a: a["flash_head"].update(tokens=10**6), ModelFileError, "flash_head.tokens"),
}


@pytest.mark.parametrize("name", ABOUT)
def test_a_wrong_description_is_refused(spoilt: Path, name: str) -> None:
    change, error, text = ABOUT[name]
    change_about(spoilt, change)
    with pytest.raises(error, match=text) as raised:
        OnnxDirectory.open(spoilt)
    assert str(spoilt) in str(raised.value)
    assert "export" in str(raised.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "[" * 100_000, '{"format": ' + "9" * 5000 + "}", "\ud800"]
)
def test_a_description_that_is_no_object_is_refused(spoilt: Path, text: str) -> None:
    (spoilt / "edgert.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelFileError, match=r"edgert\.json: expected"):
        OnnxDirectory.open(spoilt)


def test_damaged_files_are_refused(spoilt: Path) -> None:
    data = spoilt / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(ModelFileError, match=r"model\.onnx\.data: .*found \d+; copy the directory whole"):
        OnnxDirectory.open(spoilt)
    data.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(ModelFileError, match=r"SHA-256 .* copy the directory again"):
        preflight(OnnxDirectory.open(spoilt))
    data.unlink()
    with pytest.raises(ModelFileError, match="No such file"):
        OnnxDirectory.open(spoilt)
    other = spoilt.parent / "elsewhere"
    other.write_bytes(whole)
    data.symlink_to(other)
    with pytest.raises(ModelFileError, match=f"found a link to {other}"):
        OnnxDirectory.open(spoilt)
    data.unlink()
    data.mkdir()
    with pytest.raises(ModelFileError, match="expected a file"):
        OnnxDirectory.open(spoilt)
    data.rmdir()
    os.mkfifo(data)
    with pytest.raises(ModelFileError, match="expected a file"):
        OnnxDirectory.open(spoilt)


def _node(op: str, domain: str = "", **attributes: Any) -> Callable[[onnx.ModelProto], object]:
    node = helper.make_node(op, ["hidden"], ["x"], domain=domain, name="mine", **attributes)
    return lambda m: m.graph.node.append(node)


def _first(m: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(n for n in m.graph.node if n.op_type == op)


def _integer(m: onnx.ModelProto, op: str, name: str, value: int) -> None:
    next(a for a in _first(m, op).attribute if a.name == name).i = value


def _in_branch(m: onnx.ModelProto) -> None:
    branch = next(n for n in m.graph.node if n.op_type == "If").attribute[0].g
    branch.node.append(helper.make_node("Loop", [], ["x"]))


def _external(m: onnx.ModelProto, **values: object) -> None:
    tensor = next(t for t in m.graph.initializer if t.name == "output_norm.weight")
    for entry in tensor.external_data:
        entry.value = str(values.get(entry.key, entry.value))


def _dims(m: onnx.ModelProto, name: str, *dims: int) -> None:
    tensor = next(t for t in m.graph.initializer if t.name == name)
    tensor.dims[:] = dims


def _weight(name: str, dims: list[int], length: int) -> Callable[[onnx.ModelProto], object]:
    tensor = TensorProto(name=name, data_type=1, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "model.onnx.data"), ("offset", 0), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return lambda m: m.graph.initializer.append(tensor)


FOREIGN: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "an operator": (_node("Loop"), "operator Loop is not among"),
    "one of another domain": (_node("MatMulNBits"), "operator MatMulNBits is not among"),
    "a custom operator": (_node("Add", "evil"), "operator evil.Add is not among"),
    "an operator in a branch": (_in_branch, "operator Loop is not among"),
    "an attribute": (_node("Cast", saturate=1), "Cast with the attribute saturate"),
    "a second If": (
        _node(
            "If",
            then_branch=helper.make_graph([], "t", [], []),
            else_branch=helper.make_graph([], "e", [], []),
        ),
        "expected 2 branches, found 4",
    ),
    "heads that the model has not": (
        lambda m: _integer(m, "GroupQueryAttention", "num_heads", 60),
        "GroupQueryAttention with sizes .*60.* that do not fit",
    ),
    "another window": (
        lambda m: _integer(m, "GroupQueryAttention", "local_window_size", 7),
        "GroupQueryAttention with sizes",
    ),
    "rows that a matrix has not": (
        lambda m: _integer(m, "MatMulNBits", "N", 10**6),
        "MatMulNBits with sizes",
    ),
    "longer rows than a matrix has": (
        lambda m: _integer(m, "MatMulNBits", "K", 9600),
        "MatMulNBits with sizes",
    ),
    "other blocks": (lambda m: _integer(m, "MatMulNBits", "block_size", 256), "MatMulNBits with sizes"),
    "other bits": (
        lambda m: _integer(m, "GatherBlockQuantized", "bits", 4),
        "GatherBlockQuantized with sizes",
    ),
    "a cache that is none": (
        lambda m: _first(m, "GroupQueryAttention").input.__setitem__(3, "k.3"),
        "GroupQueryAttention with sizes",
    ),
    "another matrix": (
        lambda m: _first(m, "MatMulNBits").input.__setitem__(1, "output_norm.weight"),
        "MatMulNBits with sizes",
    ),
    "no matrix": (
        lambda m: _first(m, "MatMulNBits").input.__delitem__(slice(1, 9)),
        "MatMulNBits with sizes",
    ),
    "no branches": (lambda m: m.graph.node.pop(), "expected 2 branches, found 0"),
    "many nodes": (
        lambda m: m.graph.node.extend([helper.make_node("Add", ["a"], ["b"])] * 1000),
        "expected at most 448 nodes",
    ),
    "another opset": (lambda m: m.opset_import.add(domain="evil", version=1), "operator sets"),
    "another version": (lambda m: setattr(m, "ir_version", 12), "IR version 11"),
    "an input more": (
        lambda m: m.graph.input.append(helper.make_tensor_value_info("more", 1, [1])),
        "expected 12 inputs, found 13, differing in .*more",
    ),
    "an input twice": (lambda m: m.graph.input.append(m.graph.input[0]), "differing in .*two of one name"),
    "an input of another shape": (
        lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 2),
        "input input_ids: expected .*1, 'T'.*found .*2, 'T'",
    ),
    "an output of another type": (
        lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", 16),
        r"output k_out\.0: expected",
    ),
    "an output less": (lambda m: m.graph.output.pop(), "differing in .*logits"),
    "weights elsewhere": (lambda m: _external(m, location="/etc/passwd"), "found /etc/passwd"),
    "weights above": (lambda m: _external(m, location="../model.onnx.data"), "found ../model.onnx.data"),
    "weights beyond the end": (lambda m: _external(m, offset=10**9), "from byte 1000000000"),
    "a negative offset": (lambda m: _external(m, offset=-4), "expected location, offset and length"),
    "a huge length": (lambda m: _external(m, length=2**63), "expected location, offset and length"),
    "another length": (lambda m: _external(m, length=4), "found 4 from byte"),
    "another shape": (
        lambda m: _dims(m, "output_norm.weight", 48, 2),
        r"output_norm.weight: expected type and shape \(1, \(96,\)\), found \(1, \(48, 2\)\)",
    ),
    "a negative size": (lambda m: _dims(m, "output_norm.weight", -96), "found type and shape"),
    "an overflowing size": (lambda m: _dims(m, "output_norm.weight", 2**33, 2**33), "found type and shape"),
    "a weight more": (_weight("more", [4], 16), "llama models have none of this name"),
    "a weight twice": (_weight("output_norm.weight", [96], 384), "there are two"),
    "many parts of the FlashHead": (
        lambda m: [_weight(f"flash.{i}", [4], 16)(m) for i in range(20)],
        "expected at most 20 .* found number 21",
    ),
    "a constant of another size": (
        lambda m: m.graph.initializer.append(TensorProto(name="c", data_type=1, dims=[5], raw_data=b"1234")),
        "expected 20 bytes, found 4",
    ),
    "functions": (
        lambda m: m.functions.add(name="f", domain="evil"),
        r"model: field 25 \(functions\) is not allowed",
    ),
    "metadata": (lambda m: m.metadata_props.add(key="ort_config", value="{}"), "metadata_props"),
    "values in fields": (
        lambda m: m.graph.initializer.append(helper.make_tensor("c", 1, [1], [1.0])),
        r"initializer: field 4 is not allowed",
    ),
    "sparse weights": (lambda m: m.graph.sparse_initializer.add(), "sparse_initializer"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_graph_is_refused(spoilt: Path, name: str) -> None:
    change, text = FOREIGN[name]
    change_graph(spoilt, change)
    with pytest.raises((UnsupportedModelError, ModelFileError), match=text) as raised:
        preflight(OnnxDirectory.open(spoilt))
    assert str(spoilt / "model.onnx") in str(raised.value)


def test_a_part_of_a_flash_head_has_bounds() -> None:
    """Those of a file as large as the tiny ones cannot be met."""
    directory = OnnxDirectory.open(exported("llama", "int4", "lowrank"))
    most = (2 * 301 + 4096) * 96
    for count, values, fine in ((1, most, True), (1, most + 1, False), (20, 4, True), (21, 4, False)):
        tensor = onnx_wire.Tensor("flash.x", 1, (values,), 0, {})
        with nullcontext() if fine else pytest.raises(ValueError, match=f"number {count} of shape"):
            onnx_preflight._check_flash(directory, tensor, count)


@cache
def graph() -> bytes:
    return (exported("gemma3", "int4", "lowrank") / "model.onnx").read_bytes()


ANYWHERE = st.integers(0, 2**32).map(lambda n: n % len(graph()))
SOME = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SOME
@given(ANYWHERE)
def test_a_truncated_graph_is_refused(length: int) -> None:
    with pytest.raises(WireError):
        read_model(graph()[:length])


@SOME
@given(st.lists(st.tuples(ANYWHERE, st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes_are_refused_or_harmless(spoilt: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(graph())
    for place, value in changes:
        data[place] = value
    directory = OnnxDirectory.open(exported("gemma3", "int4", "lowrank"))
    (spoilt / "model.onnx").write_bytes(data)
    try:
        check_graph(OnnxDirectory(**{**vars(directory), "path": spoilt}))
    except (ModelFileError, UnsupportedModelError):
        return
    # Such as a letter of a node's name.
    assert {n.op_type for n in onnx.ModelProto.FromString(bytes(data)).graph.node} <= {
        n.op_type for n in onnx.ModelProto.FromString(graph()).graph.node
    } | {"Add", "Sub", "Mul", "Div", "Cos", "Sin", "Max", "Abs"}


@SOME
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        read_model(data)


@pytest.mark.alone
def test_long_files_take_no_time() -> None:
    began = time.process_time()
    many = bytes((0x08, 1)) * (onnx_wire.MOST_FIELDS + 10)  # dims of one tensor
    tensor = b"\x2a" + _varint(len(many)) + many
    with pytest.raises(WireError, match="at most"):
        read_model(b"\x3a" + _varint(len(tensor)) + tensor)
    nested = b""
    for _ in range(2000):  # a graph in an attribute of a node of a graph
        attribute = b"\x32" + _varint(len(nested)) + nested
        node = b"\x2a" + _varint(len(attribute)) + attribute
        nested = b"\x0a" + _varint(len(node)) + node
    with pytest.raises(WireError, match="without further ones"):
        read_model(b"\x3a" + _varint(len(nested)) + nested)
    for length in (2**31, 2**63, 2**64 - 1):
        with pytest.raises(WireError, match="beyond the end"):
            read_model(b"\x3a" + _varint(length) + b"1234")
    with pytest.raises(WireError, match="does not end"):
        read_model(b"\x3a" + b"\xff" * 20)
    assert time.process_time() - began < 5


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@SOME
@given(st.data())
def test_a_description_with_any_values_is_refused_or_read(spoilt: Path, data: st.DataObject) -> None:
    about = json.loads((exported("llama", "int4", "lowrank") / "edgert.json").read_text())
    at: Any = about
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not (isinstance(at[key], (dict, list)) and at[key] and data.draw(st.booleans())):
            break
        at = at[key]
    at[key] = data.draw(JSON)
    (spoilt / "edgert.json").write_text(json.dumps(about))
    try:
        preflight(OnnxDirectory.open(spoilt))
    except (ModelFileError, UnsupportedModelError) as error:
        assert str(spoilt) in str(error)


def test_the_seal_of_these_tests_is_the_exporters(spoilt: Path) -> None:
    """Otherwise what they refuse would be refused for its hash."""
    seal(spoilt)
    preflight(OnnxDirectory.open(spoilt))
