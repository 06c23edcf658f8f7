"""FlashHead and the exact head on tiny models: which clusters are scored, that what is scored is what the
dense head gives, that exact gives dense's tokens, and that a wrong sidecar is refused."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgert.export.gguf_writer import Tensor, Value, write_gguf
from edgert.export.quantise import dequantise
from flash_files import SIZE, SPECIAL, parts, spec_of
from tiny_models import tiny

import edgert
from edgert import _native
from edgert.engines import open_engine
from edgert.engines.native import NativeEngine
from edgert.errors import ModelFileError, UsageError
from edgert.locate import find_sidecar, sidecar_path
from edgert.sidecar import RECIPES, Sidecar

MODELS = [
    ("llama", "Q4_0"),
    ("gemma3", "Q8_0"),
    ("qwen2", "F32"),
    ("lfm2", "Q4_0"),
    ("mistral-window", "Q8_0"),
]


@pytest.fixture(params=MODELS, ids=lambda m: m[0])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a tiny model, for a sidecar to lie beside."""
    copy = tmp_path / "model.gguf"
    shutil.copy(tiny(*request.param).path, copy)
    return copy


def open_flash(base: Path, sidecar: Path | None) -> NativeEngine:
    file = _native.GgufFile(str(base))
    return NativeEngine(file, spec_of(base), 2, Sidecar(sidecar, base) if sidecar else None)


def cheap_scores(base: Path, metadata: dict[str, Value], tensors: list[Tensor], state: Any) -> Any:
    """What the runtime should rank clusters and units of 16 rows by, in float64 up to the rounding of its
    input; zeros for a stage that the recipe lacks."""
    spec, file = spec_of(base), _native.GgufFile(str(base))
    x = state.astype(np.float64)
    h = x / np.sqrt(np.square(x).mean() + spec.norm_eps) * file.dequantize(spec.output_norm)
    values = {t.name: dequantise(t.data, t.type, t.shape[1]) for t in tensors if len(t.shape) == 2}
    ids = np.asarray(metadata["edgert.head.tokens"])
    clusters = np.zeros(len(ids) // int(str(metadata["edgert.head.cluster_size"])))
    units = np.zeros(len(ids) // SIZE)
    if "head.routers" in values:
        bias = next(t.data.view(np.float32) for t in tensors if t.name == "head.bias")
        clusters = values["head.routers"] @ h + bias
    if "head.rows" in values:
        rows = values["head.rows"] @ (values["head.projection"] @ h)
        rows[ids < 0] = -math.inf
        units = rows.reshape(-1, SIZE).max(1)
    return clusters, units


def beyond(scores: Any, among: set[int], count: int) -> set[int]:
    """Those of ``among`` that clearly do not belong to its ``count`` best: int8 codes of the input may turn
    round two that score alike."""
    order = sorted(scores[list(among)])
    cut = order[-count] if count <= len(order) else -math.inf
    finite = scores[np.isfinite(scores)]
    return {i for i in among if scores[i] < cut - 0.1 * np.std(finite)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_scored_tokens_have_the_dense_logits_and_are_those_of_the_best_rows(base: Path, recipe: str) -> None:
    metadata, tensors = parts(base, recipe)
    write_gguf(sidecar_path(base), metadata, tensors)
    ids = np.asarray(metadata["edgert.head.tokens"])
    per = int(str(metadata["edgert.head.cluster_size"])) // SIZE
    unit_of = {int(token): row // SIZE for row, token in enumerate(ids) if token >= 0}
    plain, flash = open_flash(base, None), open_flash(base, sidecar_path(base))
    prompt = np.array([5, 9, 2, 11], np.int32)
    a, b = _native.Cache(plain._model, 16), _native.Cache(flash._model, 16)
    dense = plain._model.forward(a, prompt, True)
    hidden = flash._model.hidden(b, prompt)
    # Rows in another order, the head apart from the body: the same bits.
    np.testing.assert_array_equal(flash._model.dense(hidden), dense)
    rows, order = flash._model.dense_rows(hidden), flash._model.row_tokens
    assert order is not None and order.view(np.int32).tolist() == ids.tolist()
    np.testing.assert_array_equal(rows[:, ids >= 0], dense[:, ids[ids >= 0]])
    assert np.isneginf(rows[:, ids < 0]).all()
    np.testing.assert_array_equal(flash._model.best(hidden), dense.argmax(1))
    for probes, keep in ((1, 1), (3, 2), (len(ids), len(ids))):
        for position, state in enumerate(hidden):
            more = [position, position + 40]
            found, logits = flash._model.flash(state, probes, keep, more)
            assert len(set(found.tolist())) == len(found)
            np.testing.assert_array_equal(logits, dense[position, found])
            forced = {unit_of[token] for token in (SPECIAL, *more)}
            chosen = {unit_of[int(token)] for token in found}
            clusters, units = cheap_scores(base, metadata, tensors, state)
            everything = set(range(len(units)))
            assert forced <= chosen
            if "clusters" in recipe:
                bad = beyond(clusters, set(range(len(clusters))), probes)
                assert not {u // per for u in chosen - forced} & bad
                everything = {u for u in everything if u // per not in bad}
                if "lowrank" not in recipe:
                    assert len(chosen) >= min(probes * per, len(units))
            if "lowrank" in recipe:
                # With the clusters beside the cut some units of the set may not have been candidates.
                assert len(chosen - forced) <= keep
                if recipe == "lowrank":
                    assert not (chosen - forced) & beyond(units, everything, keep)


def test_among_reads_the_rows_of_the_tokens_asked_for(base: Path) -> None:
    write_gguf(sidecar_path(base), *parts(base))
    for engine in (open_flash(base, None), open_flash(base, sidecar_path(base))):
        model = engine._model
        hidden = model.hidden(_native.Cache(model, 16), np.array([5, 9], np.int32))
        dense = model.dense(hidden)
        for ids in ([7], [3, 3, 90, 4], list(range(engine.vocab_size))):
            found, logits = model.among(hidden[1], ids)
            assert sorted(found.tolist()) == sorted(set(ids))
            np.testing.assert_array_equal(logits, dense[1, found])
        with pytest.raises(edgert.EdgertError, match="outside the vocabulary"):
            model.among(hidden[0], [engine.vocab_size])


@pytest.mark.parametrize("head", ["dense", "flash", "exact"])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "seed": 3, "logprobs": 1}], ids=["greedy", "drawn"]
)
def test_constrained_ids(base: Path, head: str, options: dict[str, Any]) -> None:
    """A reply among allowed ids is that of the dense head with every other id banned."""
    write_gguf(sidecar_path(base), *parts(base))
    allowed = [4, 8, 15, 16, 23, 42]
    with edgert.load(base, head="dense") as dense, edgert.load(base, head=head) as model:
        banned = {i: -math.inf for i in range(dense.vocab_size) if i not in allowed}
        wanted = dense.generate([1, 2, 3], max_tokens=12, logit_bias=banned, **options)
        reply = model.generate([1, 2, 3], max_tokens=12, allowed=allowed, **options)
        assert reply.tokens == wanted.tokens and reply.logprobs == wanted.logprobs

        def rising(tokens: Any) -> Any:
            return [t for t in allowed if not tokens or t > tokens[-1]] or allowed[:1]

        steps = model.generate([1, 2, 3], max_tokens=len(allowed), allowed=rising, **options).tokens
        assert all(a < b or b == allowed[0] for a, b in itertools.pairwise(steps))
        for wrong in ([], [-1], [dense.vocab_size], 7, ["x"], lambda tokens: []):
            with pytest.raises(UsageError, match="allowed"):
                model.generate([1, 2, 3], max_tokens=2, allowed=wrong)


def test_every_thread_count_chooses_the_same(base: Path) -> None:
    write_gguf(sidecar_path(base), *parts(base))
    results = []
    for threads in (1, 3):
        engine = NativeEngine(
            _native.GgufFile(str(base)), spec_of(base), threads, Sidecar(sidecar_path(base), base)
        )
        session = engine.session(8)
        results.append(session.flash(session.hidden(7), []))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.8, "seed": 4},
        {"temperature": 1.0, "seed": 5, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"logit_bias": {7: 3.0, 9: -math.inf}, "temperature": 0.5, "seed": 1},
    ],
    ids=["greedy", "drawn", "filtered", "penalties", "bias"],
)
def test_exact_gives_the_dense_heads_tokens(base: Path, options: dict[str, Any]) -> None:
    """With useless routers nearly every draft is wrong, so that blocks are cut and the cache goes back."""
    write_gguf(sidecar_path(base), *parts(base))
    with edgert.load(base, head="dense") as dense, edgert.load(base, head="exact") as exact:
        for seed in range(3):
            prompt = np.random.default_rng(seed).integers(0, dense.vocab_size, 12).tolist()
            wanted = dense.generate(prompt, max_tokens=60, **options)
            with exact.session() as session:
                reply = session.generate(prompt, max_tokens=60, **options)
                assert reply.tokens == wanted.tokens and reply.finish_reason == wanted.finish_reason
                # The session goes on from what it holds.
                longer = [*prompt, *reply.tokens[:20], 1]
                again = session.generate(longer, max_tokens=10, **options)
            assert again.tokens == dense.generate(longer, max_tokens=10, **options).tokens
            assert again.stats.reused_tokens > 0


def test_with_all_clusters_flash_gives_the_dense_heads_tokens(base: Path) -> None:
    write_gguf(sidecar_path(base), *parts(base))
    prompt = [4, 8, 15, 16, 23]
    with edgert.load(base, head="dense") as dense, edgert.load(base, probes=1000) as flash:
        assert flash.head == "flash"
        options = {"max_tokens": 40, "temperature": 0.9, "seed": 2, "logprobs": 2}
        one, other = dense.generate(prompt, **options), flash.generate(prompt, **options)
        assert one.tokens == other.tokens and one.logprobs == other.logprobs


def test_biased_tokens_are_scored_and_log_probabilities_are_exact(base: Path) -> None:
    write_gguf(sidecar_path(base), *parts(base))
    with edgert.load(base, head="flash") as flash, edgert.load(base, head="dense") as dense:
        reply = flash.generate([1, 2, 3], max_tokens=6, logit_bias={42: 1e6}, logprobs=1)
        assert set(reply.tokens) <= {42, *flash.tokenizer.eos_ids}
        scored = dense.generate([1, 2, 3], max_tokens=6, logit_bias={42: 1e6}, logprobs=1)
        assert reply.logprobs == scored.logprobs


def test_a_stream_of_exact_can_be_cancelled_and_the_session_used(base: Path) -> None:
    write_gguf(sidecar_path(base), *parts(base))
    with edgert.load(base, head="exact") as exact, exact.session() as session:
        stream = session.stream([3, 1, 4, 1, 5], max_tokens=50)
        tokens = [next(stream).token for _ in range(5)]
        stream.cancel()
        assert next(stream).finish_reason == "cancelled"
        assert list(session.generate([3, 1, 4, 1, 5], max_tokens=5).tokens) == tokens


def broken(metadata: dict[str, Value], tensors: list[Tensor], how: str) -> None:
    """Break the parts of a sidecar in one way."""
    tokens = np.asarray(metadata["edgert.head.tokens"]).copy()
    if how == "version":
        metadata["edgert.version"] = 1
    elif how == "base":
        metadata["edgert.base.fingerprint"] = "0" * 64
    elif how == "size":
        metadata["edgert.head.cluster_size"] = 24
    elif how == "range":
        tokens[tokens == 5] = 10**6
    elif how == "negative":
        tokens[tokens == 5] = -7
    elif how == "twice":
        tokens[tokens == 5] = 6
    elif how == "missing":
        tokens[tokens == 5] = -1
    elif how == "short":
        tokens = tokens[:-SIZE]
    elif how == "special":
        metadata["edgert.head.special"] = np.array([10**6], np.int32)
    elif how == "probes":
        metadata["edgert.head.probes"] = 0
    elif how == "keep":
        metadata["edgert.head.keep"] = 7
    elif how == "other recipe":
        metadata["edgert.head.recipe"], metadata["edgert.head.probes"] = "lowrank", 0
        metadata["edgert.head.keep"] = 2
    elif how == "recipe":
        metadata["edgert.head.recipe"] = "magic"
    elif how == "nan bias":
        tensors[1].data.view(np.float32)[3] = np.nan
    elif how == "nan routers":
        tensors[0].data[0, :2] = np.array([np.nan], np.float16).view(np.uint8)
    elif how == "shape":
        tensors[1] = Tensor("head.bias", "F32", (4,), np.zeros(16, np.uint8))
    elif how == "no routers":
        del tensors[0]
    metadata["edgert.head.tokens"] = tokens


WAYS = [
    "version",
    "base",
    "size",
    "range",
    "negative",
    "twice",
    "missing",
    "short",
    "special",
    "probes",
    "recipe",
]
WAYS += ["keep", "other recipe", "nan bias", "nan routers", "shape", "no routers"]


@pytest.mark.parametrize("how", WAYS)
def test_a_wrong_sidecar_is_refused_and_dense_still_runs(tmp_path: Path, how: str) -> None:
    base = tmp_path / "model.gguf"
    shutil.copy(tiny("llama", "Q4_0").path, base)
    metadata, tensors = parts(base)
    broken(metadata, tensors, how)
    write_gguf(sidecar_path(base), metadata, tensors)
    for head in ("auto", "flash", "exact"):
        with pytest.raises(ModelFileError, match=r"edgert|head") as caught:
            edgert.load(base, head=head)
        assert str(sidecar_path(base)) in str(caught.value)
    with edgert.load(base, head="dense") as model:
        assert len(model.generate([1, 2], max_tokens=2).tokens) >= 1


def test_a_truncated_sidecar_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "model.gguf"
    shutil.copy(tiny("llama", "Q4_0").path, base)
    write_gguf(sidecar_path(base), *parts(base))
    whole = sidecar_path(base).read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 40):
        sidecar_path(base).write_bytes(whole[:size])
        with pytest.raises(ModelFileError):
            edgert.load(base)


def test_heads_without_a_sidecar(tmp_path: Path) -> None:
    base = tmp_path / "model.gguf"
    shutil.copy(tiny("llama", "Q4_0").path, base)
    assert find_sidecar(base) is None
    with edgert.load(base) as model:
        assert model.head == "dense"
    for head in ("flash", "exact"):
        with pytest.raises(UsageError, match="edgert export"):
            edgert.load(base, head=head)
    with pytest.raises(UsageError, match="unknown head"):
        edgert.load(base, head="round")
    with pytest.raises(edgert.EdgertError, match="without a FlashHead"):
        session: Any = open_engine(base, "native").session(8)
        session.flash(session.hidden(1), [])
