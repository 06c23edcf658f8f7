"""Exported graphs in ONNX Runtime against transformers on the same weights, on every family."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
import pytest
from onnx_runs import Run, exported, worst
from tiny_models import NAMES, prompt, tiny

LENGTH = 60
# Largest share of the largest logit by which one may differ: for f32 the order of sums, for f16 the rounding
# of weights. For int8 and int4 the files have such weights already: what is left is the rounding of states to
# int8.
BOUNDS = {"f32": 2e-5, "f16": 1e-2, "int8": 0.1, "int4": 0.1}
FILES = {"f16": "F32", "int8": "Q8_0", "int4": "Q4_0"}


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_passes_the_checker_and_strict_shape_inference(name: str) -> None:
    onnx.checker.check_model(str(exported(name)), full_check=True)
    model = onnx.load(exported(name), load_external_data=False)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert {node.domain for node in model.graph.node} <= {"", "com.microsoft"}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str) -> None:
    """In one pass, in chunks, and step by step."""
    tokens = prompt(tiny(name), LENGTH)
    expected = tiny(name).logits(tokens)
    assert worst(Run(exported(name))(tokens, 0)[0][0], expected) < BOUNDS["f32"]
    run, found = Run(exported(name)), []
    for first, end in ((0, 17), (17, 18), (18, 50), *((i, i + 1) for i in range(50, LENGTH))):
        found.append(run(tokens[first:end], first)[0][0])
    assert worst(np.concatenate(found), expected) < BOUNDS["f32"]


@pytest.mark.parametrize("quant", ["f16", "int8", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_quantised_logits_are_near(name: str, quant: str) -> None:
    model = tiny(name, FILES[quant])
    tokens = prompt(model, LENGTH)
    found = Run(exported(name, quant, FILES[quant]))(tokens, 0)[0][0]
    assert worst(found, model.logits(tokens)) < BOUNDS[quant]


@pytest.mark.parametrize("name", NAMES)
def test_slots_may_hold_positions_in_any_order(name: str) -> None:
    """Shuffled slots, with others in front of them left out of the sequence, give the same logits."""
    tokens = prompt(tiny(name), LENGTH)
    runs = [Run(exported(name)) for _ in range(2)]
    for run in runs:
        run(tokens[:40], 0)
    order = np.random.default_rng(0).permutation(40)
    full = [n for n, s in runs[0].shapes.items() if "slots" in s]
    for cache_name in full:
        kept = runs[1].caches[cache_name].numpy().copy()
        kept[:, :, :40] = kept[:, :, order]
        runs[1].caches[cache_name].update_inplace(kept)
    found, expected = (np.concatenate([r(tokens[i : i + 1], i)[0][0] for i in range(40, 50)]) for r in runs)
    assert worst(found, expected) < BOUNDS["f32"]
    if full:  # and the order of new tokens does matter
        assert worst(runs[1](tokens[50:][::-1], 50)[0][0], runs[0](tokens[50:], 50)[0][0]) > 1e-2


def test_slots_may_hold_fewer_than_all_positions() -> None:
    """Positions go on where tokens were left out: a query sees what the slots hold."""
    tokens = prompt(tiny("qwen3"), LENGTH)
    run = Run(exported("qwen3"))
    run(tokens, 0)
    before = {n: c.numpy().copy() for n, c in run.caches.items()}
    # Only the slots of positions 20 to 39 stay.
    for name, values in before.items():
        values[:, :, :20] = values[:, :, 20:40]
        run.caches[name].update_inplace(values)
    found = run(tokens[40:41], 40, filled=np.array([20], np.int32))[0]
    full = run(tokens[40:41], 40, filled=np.array([40], np.int32))[0]
    assert worst(found, full) > 1e-3
    assert all(
        np.array_equal(c.numpy()[:, :, 20], before[n][:, :, 20]) is False for n, c in run.caches.items()
    )


@pytest.mark.parametrize("name", ["gemma3", "mistral-window"])
def test_windowed_caches_may_drop_what_has_left_the_window(name: str) -> None:
    tokens = prompt(tiny(name), LENGTH)
    expected = tiny(name).logits(tokens)
    window = max(layer.window for layer in tiny(name).spec.layers)
    run, start, found = Run(exported(name), window_slots=window + 6), 0, []
    windowed = [n for n, s in run.shapes.items() if "window_slots" in s]
    assert windowed
    for i in range(0, LENGTH, 3):
        if i + 3 - start > window + 6:  # full: the last of a window go to the front
            moved = i - window + 1 - start
            for cache_name in windowed:
                values = run.caches[cache_name].numpy().copy()
                values[:, :, : i - start - moved] = values[:, :, moved : i - start]
                run.caches[cache_name].update_inplace(values)
            start += moved
        more = {"window_start": np.array([start], np.int32)}
        found.append(run(tokens[i : i + 3], i, **more)[0][0])
    assert start > 0
    assert worst(np.concatenate(found), expected) < BOUNDS["f32"]


def test_rows_and_states_of_earlier_passes() -> None:
    """``rows`` picks logits, in any order; ``hidden`` given back as ``more_states`` scores the same."""
    tokens = prompt(tiny("gemma3"), 20)
    run = Run(exported("gemma3"))
    logits, hidden = run(tokens, 0, ("logits", "hidden"))
    picked, states = run(tokens, 0, ("logits", "hidden"), rows=[7, -1, 3])
    assert worst(picked[0], logits[0][[7, 19, 3]]) < 1e-6
    assert worst(states[0], hidden[0][[7, 19, 3]]) < 1e-6
    both = run(tokens[:1], 20, rows=[-1], more_states=hidden[:, :5])[0]
    assert both.shape == (1, 6, tiny("gemma3").spec.vocab_size)
    assert worst(both[0, 1:], logits[0, :5]) < 1e-6
    assert run(tokens, 0, rows=[])[0].shape[1] == 0


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
def test_caches_are_written_in_place(name: str) -> None:
    """A step changes one slot of each cache, and its outputs are the memory of the inputs."""
    tokens = prompt(tiny(name), 20)
    run = Run(exported(name))
    run(tokens, 0)
    before = {n: c.numpy().copy() for n, c in run.caches.items()}
    places = {n: c.data_ptr() for n, c in run.caches.items()}
    run(tokens[:1], 20)
    for cache_name, value in run.caches.items():
        assert value.data_ptr() == places[cache_name]
        changed = np.nonzero(
            (value.numpy() != before[cache_name]).any((0, 1, 3) if cache_name[0] in "kv" else (0, 1))
        )
        assert changed[0].tolist() == ([20] if cache_name[0] in "kv" else [0, 1])


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
@pytest.mark.parametrize("quant", ["f32", "int4"])
def test_weights_are_stored_once(name: str, quant: str) -> None:
    """Also the embedding that is the head too: no byte of the data has two initializers but for reshaping."""
    model = onnx.load(exported(name, quant), load_external_data=False)
    spans = set()
    for tensor in model.graph.initializer:
        place = {e.key: e.value for e in tensor.external_data}
        if place:
            spans.add((int(place["offset"]), int(place["length"])))
    ordered = sorted(spans)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(ordered))
    spec = tiny(name).spec
    values = sum(int(np.prod(s)) for s in spec.tensor_shapes().values())
    size = (exported(name, quant).parent / "model.onnx.data").stat().st_size
    per_value = {"f32": 4, "int4": 0.625}[quant]
    assert size < 1.1 * values * per_value + 4096 * len(spans)
