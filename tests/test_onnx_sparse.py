"""Sparse keys and values on ONNX Runtime: what steps see, what is copied, and that a store on a disk and
interruptions change nothing."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_directories import exported
from onnx_runs import Run, worst
from tier_runs import on_disk
from tiny_models import prompt, tiny

import edgert
from edgert.engines.onnx import OnnxEngine, OnnxSession
from edgert.engines.onnx_sparse import ENTERING, LEAST_SLOTS, PAGE, WorkingSet
from edgert.engines.onnx_sparse_session import SparseSession
from edgert.errors import EngineError, UsageError
from edgert.onnx_directory import OnnxDirectory
from edgert.tier import IN_MEMORY, Tier

READ, STEPS = 1200, 60
LONGEST = 4096  # of a session, whatever a tiny model was made for
NEAR = 5e-3  # of the largest logit: keys and values that left and came back are float16
SAME = 2e-5  # the order of float32 sums


@cache
def engine(name: str, slots: int = LEAST_SLOTS, tier: Tier = IN_MEMORY) -> OnnxEngine:
    made = OnnxEngine(OnnxDirectory.open(exported(name, "f32")), threads=1, slots=slots, tier=tier)
    made.spec = made.spec.__class__(**{**vars(made.spec), "context_length": LONGEST})
    return made


def sparse(name: str, slots: int = LEAST_SLOTS, tier: Tier = IN_MEMORY) -> SparseSession:
    session = engine(name, slots, tier).session(2000)
    assert isinstance(session, SparseSession)
    return session


def full(name: str) -> OnnxSession:
    return OnnxSession(engine(name), 2000)


def steps(session: OnnxSession, tokens: list[int]) -> np.ndarray:
    return np.stack([session.step(token).copy() for token in tokens])


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
def test_with_slots_for_all_tokens_it_is_full_attention(name: str) -> None:
    tokens = prompt(tiny(name), 700)
    here, everything = sparse(name, 720), full(name)
    for session in (here, everything):
        session.prefill(tokens[:300])
    assert worst(steps(here, tokens[300:400]), steps(everything, tokens[300:400])) < SAME
    assert worst(here.prefill(tokens[400:650]), everything.prefill(tokens[400:650])) < SAME
    assert worst(steps(here, tokens[650:]), steps(everything, tokens[650:])) < SAME
    assert here.copied_bytes == 0


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_prompts_and_scores_see_everything(name: str) -> None:
    """In the working set's slots, in larger ones, and when a part of it has left the slots."""
    tokens = prompt(tiny(name), READ + 300)
    here, everything = sparse(name), full(name)
    assert worst(here.prefill(tokens[:200]), everything.prefill(tokens[:200])) < SAME
    assert worst(here.prefill(tokens[200:READ]), everything.prefill(tokens[200:READ])) < NEAR
    for token in tokens[READ : READ + 20]:
        here.step(token)
    here.rewind(READ)
    found, expected = (s.score(tokens[READ:]) for s in (here, everything))
    assert worst(found, expected) < NEAR
    assert found.shape == (300, tiny(name).spec.vocab_size)


def off_its_set(session: SparseSession, found: np.ndarray, token: int) -> tuple[float, float]:
    """By how much ``found``, the logits after a step with ``token``, differs from what a graph gives whose
    caches hold the session's pages in the order of their positions, and one with a page too few."""
    pages, length = session._set.pages, session.length - 1
    session.rewind(length)
    with session._everything(1):
        everything = {name: buffer.read() for name, buffer in session._set.buffers.items()}
    reference = Run(exported("qwen3", "f32") / "model.onnx", 2000)

    def step(pages: list[int]) -> np.ndarray:
        slots = [s for page in pages for s in range(PAGE * page, min(PAGE * page + PAGE, length))]
        for name, array in everything.items():
            seen = np.zeros((1, array.shape[1], 2000, array.shape[3]), np.float32)
            seen[:, :, : len(slots)] = array[:, :, slots]
            reference.caches[name].update_inplace(seen)
        filled = np.array([len(slots)], np.int32)
        return np.asarray(reference([token], length, filled=filled)[0][0, 0])

    return worst(found, step(pages)), worst(found, step([*pages[:5], *pages[6:]]))


def test_a_step_sees_the_pages_of_the_set_and_no_others() -> None:
    tokens = prompt(tiny("qwen3"), READ + STEPS)
    here = sparse("qwen3")
    here.prefill(tokens[:READ])
    found = steps(here, tokens[READ:])[-1]
    assert len(here._set.pages) == LEAST_SLOTS // PAGE < here.length // PAGE
    these, others = off_its_set(here, found, tokens[-1])
    assert these < NEAR < 0.1 * others


def test_the_difference_alone_is_copied() -> None:
    tokens = prompt(tiny("qwen3"), READ + STEPS)
    here = sparse("qwen3")
    here.prefill(tokens[:READ])
    assert here.copied_bytes == 0
    before: set[int] = set()
    page_bytes = PAGE * here._set.row_bytes
    entered = []
    for at, token in enumerate(tokens[READ:], READ):
        copied = here.copied_bytes
        here.step(token)
        pages = set(here._set.pages)
        written = {at // PAGE} if at // PAGE * PAGE == at else set()  # a page that begins is not copied
        assert here.copied_bytes - copied == page_bytes * len(pages - before - written)
        entered.append(len(pages - before - written))
        indexed = (at + 1 - 128) // 256 * 16
        assert {0, *range(indexed, at // PAGE + 1)} <= pages
        assert len(pages) == LEAST_SLOTS // PAGE
        before = pages
    assert entered[0] == LEAST_SLOTS // PAGE - 1
    assert max(entered[1:]) <= ENTERING
    assert 0 < sum(entered[1:]) < ENTERING * STEPS


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_store_on_a_disk_gives_the_same_bits(name: str) -> None:
    tokens = prompt(tiny(name), 1700 + STEPS)
    found = []
    with on_disk() as directory:
        for tier in (IN_MEMORY, Tier(70, str(directory))):
            here = sparse(name, tier=tier)
            here.prefill(tokens[:1700])
            found.append(steps(here, tokens[1700:]))
        assert here.tier and here.tier["pages"] > 100
        # What is not in memory is read when it enters the set, and nothing else is.
        assert 0 < here.tier["bytes_read"] < here.copied_bytes // 2
        here.close()
    np.testing.assert_array_equal(found[0], found[1])


def test_going_back() -> None:
    """Within a page, further, and to where all of it fits."""
    tokens = prompt(tiny("qwen3"), READ + STEPS)
    here, fresh = sparse("qwen3"), full("qwen3")
    here.prefill(tokens[:READ])
    steps(here, tokens[READ:])
    for length in (READ + STEPS - 3, READ + 7, READ - 400):
        assert here.rewind(length) == length == here.length
        found = steps(here, tokens[:5])[-1]
        these, others = off_its_set(here, found, tokens[4])
        assert these < NEAR < 0.1 * others
    assert here.rewind(405) == 405
    fresh.prefill(tokens[:405])
    other = prompt(tiny("qwen3"), 60, seed=1)
    assert worst(steps(here, other), steps(fresh, other)) < NEAR
    assert here.rewind(0) == 0
    np.testing.assert_array_equal(here.prefill(tokens[:100]), sparse("qwen3").prefill(tokens[:100]))


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "lfm2"])
def test_a_snapshot_goes_on_alike(name: str) -> None:
    tokens = prompt(tiny(name), READ + STEPS)
    here, other = sparse(name), sparse(name)
    here.prefill(tokens[:READ])
    steps(here, tokens[READ : READ + 20])
    state = here.snapshot()
    other.restore(state)
    assert other.length == READ + 20
    assert worst(steps(other, tokens[READ + 20 :]), steps(here, tokens[READ + 20 :])) < NEAR
    for damaged in (state[:4], state[:-1], state[:100] + state[101:]):
        with pytest.raises(EngineError):
            other.restore(damaged)
        assert other.length == other._set.length
    other.restore(state)
    assert other.length == READ + 20


def test_a_pass_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(tiny("qwen3"), READ + STEPS)
    here, undisturbed = sparse("qwen3"), sparse("qwen3")
    for session in (here, undisturbed):
        session.prefill(tokens[:READ])

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkingSet, "append", interrupted)
        for trouble in (lambda: here.step(7), lambda: here.prefill(tokens[:300])):
            with pytest.raises(KeyboardInterrupt):
                trouble()
    assert here.length == READ
    assert worst(steps(here, tokens[READ:]), steps(undisturbed, tokens[READ:])) < NEAR


def test_votes_are_shares_of_the_best_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numpy with the two-bit index of native/kernels_index.h, on every kind of kernel here."""
    spec = tiny("llama").spec
    length, blocks = 700, 2
    rng = np.random.default_rng(0)
    for isa in edgert._native.isa_levels():
        monkeypatch.setenv("EDGERT_ISA", isa)
        made = WorkingSet(onnxruntime, spec, "f32", 2000, 720, 1)
        for buffer in made.buffers.values():
            buffer.read()[:] = rng.normal(size=buffer.read().shape)
        queries = rng.normal(size=(1, made.query_width)).astype(np.float32)
        made.whole(length)
        made.append(0, length, queries)
        expected = np.zeros(16 * blocks)
        each = queries.reshape(len(spec.layers), spec.n_heads, spec.head_dim)
        for i, layer in enumerate(spec.layers):
            keys = made.buffers[f"k.{i}"].read()[0, :, :length].astype(np.float16).astype(np.float64)
            group = spec.n_heads // layer.n_kv_heads
            for head in range(layer.n_kv_heads):
                q = each[i, head * group : (head + 1) * group] * spec.attn_scale * np.log2(np.e)
                expected += shares(keys[head], q, blocks)
        assert worst(made._worth, expected) < 0.02, isa
        kept = {name: buffer.read().copy() for name, buffer in made.buffers.items()}
        made._store.read([3], made._slots, [5])
        for name, buffer in made.buffers.items():
            rounded = kept[name][:, :, 48:64].astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(buffer.read()[:, :, 80:96], rounded)
            np.testing.assert_array_equal(buffer.read()[:, :, 96:], kept[name][:, :, 96:])


def shares(keys: np.ndarray, queries: np.ndarray, blocks: int) -> np.ndarray:
    """What ``queries`` [group, head dim] give to pages by the index of their keys [tokens, head dim]."""
    always = np.concatenate([keys[:16], keys[-16:]])
    level = np.log2(np.exp2(queries @ always.T).sum(1))
    weights = []
    for block in keys[: 256 * blocks].reshape(blocks, 256, -1):
        mean, step = block.mean(0), block.std(0)
        codes = np.clip(np.round((block - mean) / step + 1.5), 0, 3)
        approximate = mean + (codes - 1.5) * step
        worth = np.clip(np.round(8 * (queries @ approximate.T - level[:, None]).max(0)), -127, 127)
        weights.append(np.exp2(worth.reshape(-1, 16).max(1) / 8))
    weight = np.concatenate(weights)
    return weight / (1 + weight.sum())


def test_queries_are_those_of_the_last_rows() -> None:
    """Of layer 0, against transformers' own rotation."""
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    torch = pytest.importorskip("torch")
    made, tokens = tiny("qwen2"), prompt(tiny("qwen2"), 30)
    model, spec = made.model.model, made.spec
    with torch.no_grad():
        x = model.embed_tokens(torch.tensor([tokens]))
        layer = model.layers[0]
        q = layer.self_attn.q_proj(layer.input_layernorm(x)).view(1, 30, spec.n_heads, -1).transpose(1, 2)
        cos, sin = model.rotary_emb(x, torch.arange(30)[None])
        expected, _ = apply_rotary_pos_emb(q, q, cos, sin)
    found = Run(exported("qwen2", "f32") / "model.onnx")(tokens, 0, ("queries",), rows=[3, -1])[0][0]
    width = spec.n_heads * spec.head_dim
    assert found.shape == (2, width * spec.n_layers)
    picked = expected[0].transpose(0, 1).reshape(30, -1)[[3, 29]].numpy()
    assert worst(found[:, :width], picked) < SAME


def test_the_graph_for_genai_has_no_queries() -> None:
    graph = onnx.load(exported("llama", "f32") / "genai.onnx", load_external_data=False).graph
    assert not any("queries" in name for node in graph.node for name in node.output)


def test_options_that_make_no_sense_are_refused() -> None:
    path = exported("llama", "f32")
    for options, word in (
        ({"attention": "sparse", "budget": LEAST_SLOTS - PAGE}, str(LEAST_SLOTS)),
        ({"attention": "sparse", "budget": LEAST_SLOTS + 1}, "multiple"),
        ({"attention": "sparse", "budget": LEAST_SLOTS, "page_limit": 0}, "page_limit"),
    ):
        with pytest.raises(UsageError, match=word):
            edgert.load(path, **options)
    with pytest.raises(EngineError, match="every"):
        edgert._native.SlotStore(tiny("gemma3").spec.as_dict(), 100, 1)


def test_generation_with_a_working_set() -> None:
    """Through load(), with saving and going on."""
    path = exported("llama", "int4")
    text = prompt(tiny("llama"), 60)
    with edgert.load(path, attention="sparse", budget=LEAST_SLOTS, threads=1) as model:
        reply = model.generate(text, max_tokens=40)
        described = model.engine.describe()
    assert (described["slots"], described["pages_chosen_by"]) == (LEAST_SLOTS, "votes")
    with edgert.load(path, threads=1) as model:
        assert model.generate(text, max_tokens=40).tokens == reply.tokens
