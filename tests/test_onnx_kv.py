"""ONNX exports with keys and values in float16: the graph, sessions, the working set of sparse attention, and
who knows of the type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_directories import change_about, exported, seal
from onnx_runs import Run, worst
from onnx_runs import exported as graph_of
from tiny_models import NAMES, prompt, tiny

import edgert
from edgert.engines import onnx as onnx_engine
from edgert.engines.onnx import OnnxEngine
from edgert.engines.onnx_sparse import LEAST_SLOTS, WorkingSet
from edgert.errors import EngineError, UnsupportedModelError
from edgert.onnx_directory import OnnxDirectory
from edgert.onnx_memory import kv_bytes
from edgert.onnx_plan import OnnxCase
from edgert.onnx_preflight import preflight
from edgert.placement import place

CONTEXT = 200
NEAR = 5e-3  # of the largest logit: keys, values and attention in float16


def engine(name: str, slots: int = 0) -> OnnxEngine:
    return OnnxEngine(OnnxDirectory.open(exported(name, "f32", kv="f16")), threads=1, slots=slots)


@pytest.mark.parametrize("name", NAMES)
def test_graphs(name: str) -> None:
    """The checker, float16 in attention and nowhere else, logits, and caches written in place."""
    path = graph_of(name, kv="f16")
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(path, load_external_data=False).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]}
    for value, kind in kinds.items():
        cache = value.split(".")[0] in ("k", "v", "k_out", "v_out")
        assert (kind == onnx.TensorProto.FLOAT16) == cache
    tokens, run = prompt(tiny(name), 60), Run(path)
    expected = tiny(name).logits(tokens)
    assert worst(run(tokens[:40], 0)[0][0], expected[:40]) < NEAR
    before = {n: (c.numpy().copy(), c.data_ptr()) for n, c in run.caches.items() if n[0] in "kv"}
    found = [run(tokens[40:41], 40)[0][0]]
    for cache, (values, address) in before.items():
        assert values.dtype == np.float16 and run.caches[cache].data_ptr() == address
        changed = np.nonzero((run.caches[cache].numpy() != values).any((0, 1, 3)))
        assert changed[0].tolist() == [40]
    found.append(run(tokens[41:], 41)[0][0])
    assert worst(np.concatenate(found), expected[40:]) < NEAR


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
def test_sessions(name: str, small: None) -> None:
    """Past a window many times over, back, saved and gone on with; half the bytes."""
    tokens, loaded = prompt(tiny(name), 100), engine(name)
    expected = tiny(name).logits(tokens)
    session, other = loaded.session(CONTEXT), loaded.session(CONTEXT)
    assert worst(session.prefill(tokens[:30]), expected[29]) < NEAR
    steps = np.stack([session.step(token).copy() for token in tokens[30:60]])
    assert worst(steps, expected[30:60]) < NEAR
    state = session.snapshot()
    assert worst(session.score(tokens[60:]), expected[60:]) < NEAR
    other.restore(state)
    assert other.snapshot() == state
    assert worst(other.score(tokens[60:]), expected[60:]) < NEAR
    kept = session.rewind(98)
    assert worst(session.score(tokens[kept:]), expected[kept:]) < NEAR
    whole = OnnxEngine(OnnxDirectory.open(exported(name, "f32")), threads=1).session(CONTEXT)
    whole.prefill(tokens)
    session.rewind(0)
    session.prefill(tokens)
    assert 2 * session.nbytes == whole.nbytes
    assert 2 * session.step_bytes == whole.step_bytes
    assert loaded.describe()["kv"] == "f16"


def test_exact_mode_gives_the_dense_heads_tokens() -> None:
    path, text = exported("gemma3", "int4", "lowrank", "f16"), prompt(tiny("gemma3"), 12)
    replies = [
        edgert.load(path, head=head, threads=1).generate(text, max_tokens=30) for head in ("dense", "exact")
    ]
    assert replies[0].tokens == replies[1].tokens


def test_pages_come_back_with_their_bits() -> None:
    """From slots to the store of the working set and back, on every kind of kernel here."""
    spec, rng = tiny("llama").spec, np.random.default_rng(0)
    made = WorkingSet(onnxruntime, spec, "f16", 2000, 720, 1)
    for buffer in made.buffers.values():
        buffer.read()[:] = rng.normal(size=buffer.read().shape)
    made.whole(700)
    made.append(0, 700, rng.normal(size=(1, made.query_width)).astype(np.float32))
    before = {name: buffer.read().copy() for name, buffer in made.buffers.items()}
    assert {values.dtype for values in before.values()} == {np.dtype(np.float16)}
    made._store.read([3], made._slots, [5])
    made._store.move(made._slots, 7, 9)
    for name, buffer in made.buffers.items():
        expected = before[name]
        expected[:, :, 80:96] = expected[:, :, 48:64].copy()
        expected[:, :, 144:160] = expected[:, :, 112:128].copy()
        np.testing.assert_array_equal(buffer.read(), expected)
    keys, values = ([made.buffers[f"{c}.{i}"].read() for i in range(len(spec.layers))] for c in "kv")
    with pytest.raises(EngineError, match="all of float32 or all of float16"):
        edgert._native.Slots(made._store, keys, [v.astype(np.float32) for v in values])


def test_votes_are_those_of_float32_slots() -> None:
    spec, rng = tiny("llama").spec, np.random.default_rng(0)
    sets = [WorkingSet(onnxruntime, spec, kv, 2000, 720, 1) for kv in ("f32", "f16")]
    queries = rng.normal(size=(1, sets[0].query_width)).astype(np.float32)
    for name, buffer in sets[0].buffers.items():
        values = rng.normal(size=buffer.read().shape).astype(np.float16)
        for made in sets:
            made.buffers[name].read()[:] = values
    for made in sets:
        made.whole(700)
        made.append(0, 700, queries)
    np.testing.assert_array_equal(sets[0]._worth, sets[1]._worth)
    assert sets[0].row_bytes == 2 * sets[1].row_bytes


def test_a_step_with_a_working_set_is_that_of_full_attention_over_its_pages() -> None:
    """Pages that left and came back included: going back brings them from the store."""
    tokens, loaded = prompt(tiny("qwen3"), 240), engine("qwen3", LEAST_SLOTS)
    here, everything = loaded.session(256), onnx_engine.OnnxSession(loaded, 256)
    for session in (here, everything):
        session.prefill(tokens[:200])
    for token in tokens[200:]:
        np.testing.assert_array_equal(here.step(token), everything.step(token))
    state = here.snapshot()
    assert here.rewind(150) == 150
    here.restore(state)
    np.testing.assert_array_equal(here.step(5), everything.step(5))
    assert here.copied_bytes > 0


def test_the_type_is_told_and_held_to_the_graph(tmp_path: Path) -> None:
    made = {kv: exported("gemma3", kv=kv) for kv in ("f32", "f16")}
    for kv, path in made.items():
        directory = OnnxDirectory.open(path)
        preflight(directory)
        assert (directory.kv, edgert.load(path).kv, edgert.plan(path).kv) == (kv, kv, kv)
        (tmp_path / kv).mkdir()
        for file in path.iterdir():
            (tmp_path / kv / file.name).write_bytes(file.read_bytes())
    change_about(tmp_path / "f16", lambda about: about.update(kv="f32"))
    with pytest.raises(UnsupportedModelError, match=r"input k\.0: expected type and shape"):
        preflight(OnnxDirectory.open(tmp_path / "f16"))
    change_about(tmp_path / "f32", lambda about: about.pop("kv"))
    seal(tmp_path / "f32")
    assert (
        preflight(OnnxDirectory.open(tmp_path / "f32")) and OnnxDirectory.open(tmp_path / "f32").kv == "f32"
    )


def test_the_plan_knows_half_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny("gemma3").spec
    assert {w: 2 * n for w, n in kv_bytes(spec, "f16", 200).items()} == kv_bytes(spec, "f32", 200)
    whole, half = (
        OnnxCase.read(OnnxDirectory.open(exported("gemma3", kv=kv)), 1, "dense") for kv in ("f32", "f16")
    )
    scores = 4 * spec.n_heads * 200 * 200
    saved = sum(kv_bytes(spec, "f16", 200).values()) - scores
    assert whole.needed(200, kv="f16") == whole.needed(200) - saved
    # Its graph has four nodes more a layer that attends.
    assert 0 <= half.needed(200) - whole.needed(200, kv="f16") <= 50_000 * len(spec.layers)
    # A tiny model's scores are more than its keys and values: what helps a real one.
    monkeypatch.setattr("edgert.onnx_memory.scores_bytes", lambda spec, kv, context: 0)
    remedies = [[r.text for r in case.remedies(200, case.needed(200) - 1)] for case in (whole, half)]
    assert ["--kv f16" in " ".join(texts) for texts in remedies] == [True, False]
    # With sparse attention a limit that float32 cannot keep leaves float16 some of its store in memory.
    n = 100_000
    full, halved = (
        OnnxCase.read(OnnxDirectory.open(exported("llama", "f32", kv=kv)), threads=1, chosen=LEAST_SLOTS)
        for kv in ("f32", "f16")
    )
    least = [replace(case, slots=case.fewest_pages(n)).needed(n) for case in (full, halved)]
    limit = (least[1] + halved.needed(n)) // 2
    assert least[0] > limit
    assert halved.fewest_pages(n) < place(halved, n, limit).slots < n // 16
