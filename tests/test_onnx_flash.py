"""The FlashHead in a graph: what it scores has the dense head's logits, and it scores what it should."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from edgert.export.gguf_writer import write_gguf
from edgert.export.onnx_flash import Flash, common_tokens
from edgert.export.quantise import dequantise
from flash_files import SPECIAL, parts
from onnx import numpy_helper
from onnx_runs import Run, export, new_directory
from tiny_models import prompt, tiny

from edgert import _native
from edgert.sidecar import Sidecar
from edgert.tokenizer import Tokenizer

RECIPES = ("clusters", "lowrank", "clusters+lowrank")


@cache
def flash_graph(name: str, recipe: str, quant: str) -> tuple[Path, Sidecar]:
    model, directory = tiny(name).path, new_directory()
    sidecar = directory / "model.edgert.gguf"
    write_gguf(sidecar, *parts(model, recipe))
    return export(model, directory / "onnx", quant, sidecar), Sidecar(sidecar, model)


@cache
def common(name: str) -> np.ndarray:
    tokenizer = Tokenizer.from_gguf(_native.GgufFile(str(tiny(name).path)).metadata)
    return common_tokens(tokenizer, tiny(name).spec.vocab_size)


def both(name: str, recipe: str, quant: str, integers: bool = True) -> tuple[np.ndarray, ...]:
    """(ids, flash logits, dense logits, hidden states) of every token of a prompt."""
    run, count = Run(flash_graph(name, recipe, quant)[0], integers=integers), 12
    tokens = prompt(tiny(name), count)
    ids, logits, none = run(tokens, 0, ("flash_ids", "flash_logits", "logits"), flash=np.array(True))
    dense, hidden, no_ids = run(tokens, 0, ("logits", "hidden", "flash_ids"))
    assert none.shape[1] == no_ids.shape[1] == 0
    return ids[0], logits[0], dense[0], hidden[0]


@pytest.mark.parametrize("quant", ["f32", "f16", "int8", "int4"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["llama", "qwen3"])  # a tied head and one of its own
def test_logits_are_the_dense_heads(name: str, recipe: str, quant: str) -> None:
    ids, logits, dense, _ = both(name, recipe, quant)
    scored = np.isfinite(logits)
    expected = np.take_along_axis(dense, ids, 1)
    assert np.abs(np.where(scored, logits - expected, 0)).max() < 1e-5 * np.abs(dense).max()
    for row, known in zip(ids, scored, strict=True):
        assert SPECIAL in row[known]
        assert len(set(row[known])) == known.sum() > 0
        assert not row[~known].any()


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_products_of_floats_are_those_of_integers_without_their_rounding(quant: str) -> None:
    """Logits are products of the unrounded states with the very rows; and the same tokens are chosen, but
    for those as good."""
    path, _ = flash_graph("llama", "clusters+lowrank", quant)
    ids, logits, dense, hidden = both("llama", "clusters+lowrank", quant, integers=False)
    rows = head_rows(path)
    expected = np.take_along_axis(hidden @ rows.T, ids, 1)
    always = len(common("llama")) + 1  # the special one too
    scored = np.isfinite(logits)
    assert scored[:, always:].any()
    error = np.abs(np.where(scored, logits - expected, 0))[:, always:].max()
    assert error < 1e-5 * np.abs(dense).max()
    in_integers, known, *_ = both("llama", "clusters+lowrank", quant)
    shared = [
        len(set(a[i]) & set(b[j])) / j.sum()
        for a, i, b, j in zip(ids, scored, in_integers, np.isfinite(known), strict=True)
    ]
    assert min(shared) > 0.9


def head_rows(path: Path) -> np.ndarray:
    """The rows of the tied head in a graph, float32 [vocab, dim]."""
    tensors = {t.name: t for t in onnx.load(path).graph.initializer}
    codes = numpy_helper.to_array(tensors["token_embd.weight"]).reshape(tiny("llama").spec.vocab_size, -1)
    scales = numpy_helper.to_array(tensors["token_embd.weight.scales"])
    rows: np.ndarray = (codes.astype(np.float32) - 128) * scales.repeat(32, 1)
    return rows


def rounded(x: np.ndarray) -> np.ndarray:
    """``x`` in blocks of 32 as MatMulNBits rounds it to int8."""
    blocks = x.reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    values: np.ndarray = (np.round(blocks / scale) * scale).ravel()
    return values


def matrix(sidecar: Sidecar, name: str) -> np.ndarray:
    info = next(t for t in sidecar.file.tensors if t.name == name)
    data = np.frombuffer(sidecar.file.read(name), np.uint8).reshape(info.shape[0], -1)
    return dequantise(data, info.type, info.shape[1])


def cluster_scores(sidecar: Sidecar, state: np.ndarray) -> np.ndarray:
    bias = np.frombuffer(sidecar.file.read("head.bias"), np.float32)
    return matrix(sidecar, "head.routers") @ rounded(state) + bias


def best_of(scores: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-scores)[:count]


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_rare_tokens_with_the_best_scores_are_chosen(recipe: str, integers: bool) -> None:
    """As the sidecar's tensors rank them, computed here; in two stages but for what rounding may exchange."""
    _, sidecar = flash_graph("llama", recipe, "f32")
    ids, logits, _, hidden = both("llama", recipe, "f32", integers)
    flash = Flash.of(sidecar, common("llama"))
    assert SPECIAL in flash.common
    for i, state in enumerate(hidden):
        always, found = np.split(ids[i], [len(flash.common)])
        assert always.tolist() == flash.common.tolist()
        found = found[np.isfinite(logits[i][len(always) :])]
        scores = candidates(flash, state)
        count = len(scores) if recipe == "clusters" else {"lowrank": 2, "clusters+lowrank": 1}[recipe]
        assert len(found) == min(len(scores), int(np.ceil(count * max(sidecar.keep, 1))))
        chosen = [scores.pop(t) for t in found]
        slack = 0.03 * np.ptp([*chosen, *scores.values()]) if recipe == "clusters+lowrank" else 0
        assert min(chosen) >= max(scores.values(), default=-np.inf) - slack


def candidates(flash: Flash, state: np.ndarray) -> dict[int, float]:
    """Scores of the rare tokens from which the best are to be taken."""
    sidecar, tokens = flash.sidecar, flash.tokens
    if sidecar.recipe == "clusters":
        scores = np.zeros(tokens.shape)
    else:
        image = rounded(matrix(sidecar, "head.projection") @ rounded(state))
        scores = (matrix(sidecar, "head.rows") @ image).reshape(tokens.shape)
    if sidecar.recipe == "lowrank":
        clusters = best_of(np.where(tokens < 0, -np.inf, scores).max(1), sidecar.keep)
    else:
        clusters = best_of(cluster_scores(sidecar, state), flash.clusters)
    pairs = zip(tokens[clusters].ravel(), scores[clusters].ravel(), strict=True)
    return {int(t): s for t, s in pairs if t >= 0}


def test_states_of_earlier_passes_can_be_scored_by_either_head() -> None:
    path, _ = flash_graph("llama", "clusters", "int4")
    run, tokens = Run(path), prompt(tiny("llama"), 8)
    dense, hidden = run(tokens, 0, ("logits", "hidden"))
    ids, logits = run(
        tokens[:1], 8, ("flash_ids", "flash_logits"), flash=np.array(True), more_states=hidden, rows=[]
    )
    assert ids.shape[1] == 8
    expected = np.take_along_axis(dense[0], ids[0], 1)
    assert (
        np.abs(np.where(np.isfinite(logits[0]), logits[0] - expected, 0)).max() < 1e-5 * np.abs(dense).max()
    )
