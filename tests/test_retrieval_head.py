"""The retrieval head: its export, its sidecar, and what the core makes of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgert.export.gguf_writer import Tensor, Value, write_gguf
from edgert.export.quantise import dequantise, q8_0
from edgert.export.retrieval_fit import Moments, choose_heads, reduced
from edgert.export.retrieval_head import Request, export_retrieval_head
from edgert.export.retrieval_text import lookup_sequence
from edgert.export.retrieval_trace import Tracer, full_layers
from edgert.export.retrieval_train import Sequences, evaluate, lost, train
from edgert.export.sidecar_writer import write_part
from edgert.export.torch_decoder import TorchDecoder
from tier_caches import BUDGET, LENGTH, SLOTS, Floats, Ids, assert_saved_goes_on_alike, cache, read, steps
from tiny_models import kv_types, prompt, tiny

import edgert
from edgert import _native
from edgert.engines import native_spec
from edgert.errors import ModelFileError
from edgert.heads import choose_retrieval, choose_sidecar
from edgert.locate import sidecar_path
from edgert.plan_time import decode_steps
from edgert.planner import Case
from edgert.rates import rates_for
from edgert.sidecar import Sidecar
from edgert.tokenizer import Tokenizer

FAMILIES = ("llama", "gemma3", "lfm2")
STEPS = 24
RANK = 32
SMALL = Request(length=1280, texts=1, others=1, steps=8, rank=32, heads=2, budget=64)


def random_head(name: str, seed: int = 0) -> tuple[dict[str, Value], list[Tensor], dict[str, Any]]:
    """Keys and tensors of a head with random weights, and the numbers they stand for."""
    spec = tiny(name).spec
    rng = np.random.default_rng(seed)
    layers = full_layers(spec)
    kv = spec.layers[layers[0]].n_kv_heads
    places = [(layers[0], 0), (layers[-1], kv - 1)]
    rows = len(places) * spec.n_heads // kv * spec.head_dim
    floats = {
        "retrieval.down": rng.standard_normal((RANK, 2 * spec.dim)).astype(np.float32),
        "retrieval.up": rng.standard_normal((rows, RANK)).astype(np.float32) / 8,
        "retrieval.bias": rng.standard_normal(rows).astype(np.float32),
        "retrieval.worth": np.array([1.5, 0.5], np.float32),
    }
    tensors = []
    for key, x in floats.items():
        if x.ndim == 2:
            codes = q8_0(x)
            tensors.append(Tensor(key, "Q8_0", x.shape, codes))
            floats[key] = dequantise(codes, "Q8_0", x.shape[1])
        else:
            tensors.append(Tensor(key, "F32", x.shape, x.view(np.uint8)))
    metadata: dict[str, Value] = {
        "edgert.retrieval.layers": np.array([layer for layer, _ in places], np.int32),
        "edgert.retrieval.heads": np.array([head for _, head in places], np.int32),
        "edgert.retrieval.predictor": "head",
        "edgert.retrieval.quality": "{}",
    }
    return metadata, tensors, {"places": places, **floats}


def base_of(name: str, directory: Path) -> Path:
    """A copy of a tiny model that may have a sidecar."""
    path = directory / f"{name}.gguf"
    shutil.copy(tiny(name).path, path)
    return path


def with_head(name: str, directory: Path) -> Path:
    base = base_of(name, directory)
    metadata, tensors, _ = random_head(name)
    write_part(sidecar_path(base), base, "retrieval", metadata, tensors)
    return base


def open_model(base: Path, name: str, threads: int = 2, head: bool = True) -> _native.Model:
    sidecar = _native.GgufFile(str(sidecar_path(base))) if head else None
    file = _native.GgufFile(str(base))
    return _native.Model(file, native_spec(file, file.metadata).as_dict(), threads, None, sidecar)


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_head(name, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(base: Path, name: str) -> _native.Model:
    return open_model(base, name)


@pytest.fixture(scope="module")
def ids(name: str) -> Ids:
    return np.array(prompt(tiny(name), LENGTH + STEPS), dtype=np.int32)


def expected_worth(name: str, numbers: dict[str, Any], ids: Ids, keys: Any, state: Floats) -> Floats:
    """What retrieval.h says, in numpy; ``keys`` [L, KV, T, head_dim] rotated, ``state`` the final one of the
    last of ``ids`` but one, normed."""
    tracer = Tracer(TorchDecoder(tiny(name).path))
    spec, position = tracer.spec, len(ids) - 1
    embedded = tracer.decoder.embed(torch.tensor([[int(ids[-1])]]))[0, 0].numpy()
    x = np.concatenate([embedded, state])
    queries = numbers["retrieval.up"] @ (numbers["retrieval.down"] @ x) + numbers["retrieval.bias"]
    queries = queries.reshape(len(numbers["places"]), -1, spec.head_dim)
    pages = (position - 128) // 256 * 16
    total = np.zeros(pages, np.float32)
    for q, (layer, head), worth in zip(queries, numbers["places"], numbers["retrieval.worth"], strict=True):
        turned = tracer.decoder.rotate(
            spec.layers[layer], torch.from_numpy(q)[:, None].float(), torch.tensor([position])
        )
        q = turned[:, 0].numpy() * spec.attn_scale * np.log2(np.e)
        k = keys[tracer.layers.index(layer), head].float().numpy()
        near = q @ np.concatenate([k[:16], k[position - 16 : position]]).T
        level = np.log2(np.exp2(near).sum(1))
        scanned = Tracer.indexed(torch.from_numpy(k)[None], pages)[0].numpy()
        scores = (q @ scanned.T).reshape(len(q), pages, 16).max(2) - level[:, None]
        weights = np.exp2(np.clip(scores.max(0), -16, 16))
        total += worth * weights / (1 + weights.sum())
    return total


def test_the_core_predicts_what_numpy_does(name: str, model: _native.Model, ids: Ids, tmp_path: Path) -> None:
    _, _, numbers = random_head(name)
    trace = Tracer(TorchDecoder(tiny(name).path)).trace([int(t) for t in ids[:LENGTH]])
    tiered = cache(model, tmp_path)
    read(model, tiered, ids[: LENGTH - 1])
    found = model.page_worth(tiered, int(ids[LENGTH - 1]))
    state = trace.inputs[LENGTH - 1, tiny(name).spec.dim :].float().numpy()
    expected = expected_worth(name, numbers, ids[:LENGTH], trace.keys, state)
    assert len(found) == len(expected) > SLOTS
    # The core's queries are int8, worth comes in eighths of a power of two, and a key between two levels may
    # take either.
    assert np.corrcoef(np.log(found), np.log(expected))[0, 1] > 0.995
    assert np.median(np.abs(found / expected - 1)) < 0.15
    assert abs(found.sum() / expected.sum() - 1) < 0.05


def test_the_pages_worth_most_enter(model: _native.Model, ids: Ids, tmp_path: Path) -> None:
    tiered = cache(model, tmp_path)
    read(model, tiered, ids[:LENGTH])
    steps(model, tiered, ids[LENGTH : LENGTH + 4])
    before = set(tiered.page_set)
    worth = model.page_worth(tiered, int(ids[LENGTH + 4]))
    steps(model, tiered, ids[LENGTH + 4 : LENGTH + 5])
    after = set(tiered.page_set)
    assert len(after) == len(before) <= SLOTS
    assert len(after - before) <= 8
    # Past votes count too, but on the whole those that came are worth more than those that went.
    if after - before:
        assert worth[sorted(after - before)].mean() > worth[sorted(before - after)].mean()


def test_a_head_changes_the_choice(
    base: Path, name: str, model: _native.Model, ids: Ids, tmp_path: Path
) -> None:
    plain = open_model(base, name, head=False)
    sets = []
    for one in (model, plain):
        tiered = cache(one, tmp_path)
        read(one, tiered, ids[:LENGTH])
        steps(one, tiered, ids[LENGTH:])
        sets.append(tiered.page_set)
    assert sets[0] != sets[1]


def test_nothing_is_predicted_where_all_may_be_read(model: _native.Model, ids: Ids, tmp_path: Path) -> None:
    whole = _native.Cache(model, 4096, "f16", BUDGET)
    roomy = _native.Cache(model, 4096, "f16", BUDGET, slots=300, directory=str(tmp_path))
    for c in (whole, roomy):
        read(model, c, ids[:LENGTH])
        assert len(model.page_worth(c, 0)) == 0
    np.testing.assert_array_equal(steps(model, roomy, ids[LENGTH:]), steps(model, whole, ids[LENGTH:]))


def test_threads_and_timing_change_nothing(base: Path, name: str, ids: Ids, tmp_path: Path) -> None:
    for kv in kv_types(name):
        found = []
        for threads, delay in ((1, 0), (3, 2000)):
            one = open_model(base, name, threads)
            tiered = cache(one, tmp_path, kv=kv, read_delay_us=delay)
            read(one, tiered, ids[:LENGTH])
            found.append(steps(one, tiered, ids[LENGTH:]))
            stats = tiered.tier
            assert stats is not None
            assert stats["pages_read"] > 0
        np.testing.assert_array_equal(found[0], found[1])


def test_a_saved_session_goes_on_alike(model: _native.Model, ids: Ids, tmp_path: Path) -> None:
    assert_saved_goes_on_alike(model, ids, tmp_path)


def test_going_back_predicts_alike(model: _native.Model, ids: Ids, tmp_path: Path) -> None:
    tiered = cache(model, tmp_path)
    read(model, tiered, ids[:LENGTH])
    expected = model.page_worth(tiered, int(ids[LENGTH]))
    read(model, tiered, ids[LENGTH : LENGTH + 8])
    if tiered.rewind(LENGTH) == LENGTH:  # else a window has forgotten
        np.testing.assert_array_equal(model.page_worth(tiered, int(ids[LENGTH])), expected)
        # A state too far back is not known, and past votes choose alone.
        assert tiered.rewind(LENGTH - 100) in (0, LENGTH - 100)
        assert len(model.page_worth(tiered, 0)) == 0
    assert np.isfinite(steps(model, tiered, ids[:3])).all()


def test_exact_attention_confirms_what_was_drafted_with_it(
    base: Path, name: str, model: _native.Model, ids: Ids, tmp_path: Path
) -> None:
    """A full pass over drafts gives the states of full attention, and leaves a cache that drafts alike."""
    plain = _native.Cache(model, 4096, "f16")
    tiered = cache(model, tmp_path)
    for c in (plain, tiered):
        read(model, c, ids[:LENGTH])
    drafts = np.stack([model.hidden(tiered, ids[i : i + 1])[0] for i in range(LENGTH, LENGTH + 8)])
    assert tiered.rewind(LENGTH) == LENGTH
    wanted = np.stack([model.hidden(plain, ids[i : i + 1])[0] for i in range(LENGTH, LENGTH + 8)])
    assert not np.array_equal(drafts, wanted)
    np.testing.assert_array_equal(model.hidden(tiered, ids[LENGTH : LENGTH + 8], full=True), wanted)
    assert tiered.tier is not None
    assert tiered.tier["pages_read"] > 0


def test_load_uses_the_head_with_a_limit_of_memory_alone(tmp_path: Path) -> None:
    base = with_head("llama", tmp_path)
    path = str(base)
    assert choose_sidecar(path, "auto", "native") is None
    assert choose_retrieval(path, 64, None) is None
    assert choose_retrieval(path, 0, 2**30) is None
    found = choose_retrieval(path, 64, 2**30)
    assert found is not None
    file, spec = _native.GgufFile(path), tiny("llama").spec.as_dict()
    sizes = _native.Sizes(file, spec, 2, None, 0, found.file)
    expected = sum(t.nbytes for t in found.file.tensors)
    assert sizes.weights()["retrieval_head"] >= expected * 0.9
    with edgert.load(base, attention="sparse", budget=64, threads=1) as loaded:
        assert loaded.memory()["retrieval_head"] == 0


def test_a_plan_counts_its_scan_where_pages_lie_on_the_disk(tmp_path: Path) -> None:
    path = str(with_head("llama", tmp_path))
    rates = rates_for("pi5", 0)
    file = _native.GgufFile(path)
    retrieval = choose_retrieval(path, BUDGET, 2**30)
    case = Case.read(file, None, 0, 2, "f16", "dense", 0, BUDGET, "sparse", retrieval=retrieval)
    names = [step.name for step in decode_steps(case, rates, 2048)]
    assert "retrieval head" not in names
    placed = {
        step.name: step for n in (2048, 4096) for step in decode_steps(replace(case, slots=SLOTS), rates, n)
    }
    assert placed["retrieval head"].bytes == case.sizes.weights()["retrieval_head"]
    short = {step.name: step for step in decode_steps(replace(case, slots=SLOTS), rates, 2048)}
    assert 0 < short["retrieval head"].seconds < placed["retrieval head"].seconds
    alone = decode_steps(replace(case, slots=SLOTS, predicted=0), rates, 2048)
    assert [step.name for step in alone] == [name for name in short if name != "retrieval head"]


def change(base: Path, edit: Callable[[dict[str, Any], list[Tensor]], None]) -> None:
    metadata, tensors, _ = random_head("llama")
    side = Sidecar(sidecar_path(base), base).file
    keep = {k: side.get(k) for k in side.metadata_keys if not k.startswith("edgert.retrieval.")}
    everything = {**keep, **metadata}
    edit(everything, tensors)
    write_gguf(sidecar_path(base), everything, tensors)


def tensor(tensors: list[Tensor], name: str, x: Floats) -> None:
    i = next(i for i, t in enumerate(tensors) if t.name == name)
    kind = tensors[i].type
    data = q8_0(x) if kind == "Q8_0" else x.view(np.uint8)
    tensors[i] = Tensor(name, kind, x.shape, data)


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (
            lambda m, t: m.update({"edgert.retrieval.layers": np.array([0, 99], np.int32)}),
            "edgert.retrieval.layers",
        ),
        (
            lambda m, t: m.update({"edgert.retrieval.heads": np.array([0, 9], np.int32)}),
            "edgert.retrieval.heads",
        ),
        (
            lambda m, t: m.update({"edgert.retrieval.heads": np.array([0], np.int32)}),
            "edgert.retrieval.heads",
        ),
        (lambda m, t: m.pop("edgert.retrieval.layers"), "edgert.retrieval.layers"),
        (lambda m, t: t.pop(0), "retrieval.down"),
        (lambda m, t: tensor(t, "retrieval.up", np.ones((16, RANK), np.float32)), "retrieval.up"),
        (lambda m, t: tensor(t, "retrieval.worth", np.array([1, np.nan], np.float32)), "retrieval.worth"),
        (lambda m, t: tensor(t, "retrieval.down", np.full(t[0].shape, np.inf, np.float32)), "retrieval.down"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_broken_head_is_refused(edit: Callable[..., Any], field: str, tmp_path: Path) -> None:
    base = with_head("llama", tmp_path)
    change(base, edit)
    with pytest.raises(ModelFileError, match="retrieval") as caught:
        open_model(base, "llama")
    assert caught.value.field == field


def test_a_sidecar_of_another_model_is_refused(tmp_path: Path) -> None:
    base = with_head("llama", tmp_path)
    with base.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelFileError, match="another file"):
        choose_retrieval(str(base), 64, 2**30)
    change_back = base_of("llama", tmp_path)
    change(change_back, lambda m, t: m.update({"edgert.retrieval.predictor": "luck"}))
    with pytest.raises(ModelFileError, match="one of head, votes"):
        choose_retrieval(str(change_back), 64, 2**30)


def test_parts_of_a_sidecar_do_not_lose_each_other(tmp_path: Path) -> None:
    base = with_head("llama", tmp_path)
    path = sidecar_path(base)
    x = np.arange(64, dtype=np.float32).reshape(2, 32)
    flash = [Tensor("head.rows", "F32", x.shape, x.view(np.uint8).reshape(2, -1))]
    write_part(path, base, "head", {"edgert.head.tokens": np.arange(4, dtype=np.int32)}, flash)
    metadata, tensors, numbers = random_head("llama", 1)
    # An incomplete FlashHead is refused as a whole, so this one has to be read past the checks of a sidecar.
    file = _native.GgufFile(str(path))
    assert {t.name for t in file.tensors} == {"head.rows", *(t.name for t in tensors)}
    assert file.get("edgert.head.tokens") == [0, 1, 2, 3]
    assert file.get("edgert.retrieval.predictor") == "head"
    np.testing.assert_array_equal(file.dequantize("head.rows"), x)
    del metadata, numbers


class Stop(Exception):
    """What Ctrl-C is to a test."""


def quiet(_: str, __: int) -> Callable[[int], None]:
    return lambda _: None


def test_an_interrupted_export_gives_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgert.export.retrieval_train.SAVED_EVERY", 2)
    monkeypatch.setattr("edgert.export.retrieval_quality.SCORED", 48)
    straight, broken = base_of("llama", tmp_path), tmp_path / "broken.gguf"
    shutil.copy(straight, broken)
    done = export_retrieval_head(straight, SMALL, None, lambda _: None, quiet)
    for what, after in (("reading text", 1), ("training", 5)):

        def interrupt(name: str, _: int, what: str = what, after: int = after) -> Callable[[int], None]:
            count = 0

            def progress(_: int) -> None:
                nonlocal count
                count += 1
                if name.startswith(what) and count > after:
                    raise Stop

            return progress

        with pytest.raises(Stop):
            export_retrieval_head(broken, SMALL, None, lambda _: None, interrupt)
    notes: list[str] = []
    export_retrieval_head(broken, SMALL, None, notes.append, quiet)
    assert any("resuming" in note for note in notes)
    assert sidecar_path(broken).read_bytes() == sidecar_path(straight).read_bytes()
    assert not list(tmp_path.glob(".*"))
    assert done.quality["share_of_draft_layer_and_embedding"] < 0.1
    found = Sidecar(done.path, straight)
    assert found.predictor == done.predictor
    assert found.retrieval_quality == done.quality


def test_training_loses_less_on_sequences_it_did_not_see(tmp_path: Path) -> None:
    made = tiny("llama")
    tracer = Tracer(TorchDecoder(made.path))
    traces = [tracer.trace(prompt(made, 1536, seed)) for seed in range(3)]
    moments = Moments.empty(tracer)
    for trace in traces[:2]:
        moments.add(trace)
    full = moments.solve()
    places, worth = choose_heads(tracer, traces[:2], full, 2)
    moment = torch.eye(made.spec.head_dim)
    head = reduced(tracer, moments, full, places, worth, 32, [moment] * len(places))
    # Random weights leave training nothing to find that the closed form has not: it starts from a worse head.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head.up += head.up.std() * torch.randn(head.up.shape, generator=generator)
    unseen = Sequences(tracer, traces[2:], places)
    before, without = evaluate(head, unseen)
    train(head, Sequences(tracer, traces[:2], places), 60, 0, tmp_path / "checkpoint", lambda _: None)
    after, _ = evaluate(head, unseen)
    assert after < before
    assert after < without


def test_what_is_lost_depends_on_the_order_of_pages_alone() -> None:
    """Else training makes all pages worth more instead of the right ones."""
    generator = torch.Generator().manual_seed(0)
    value, effect = torch.rand(4, 80, generator=generator), torch.rand(4, 80, generator=generator)
    assert lost(7 * value, effect).item() == pytest.approx(lost(value, effect).item(), abs=1e-5)
    assert lost(effect, effect) < lost(value, effect) < lost(1 - effect, effect)
    log = value.log().requires_grad_()
    torch.autograd.backward(lost(log.exp(), effect))
    assert log.grad is not None and log.grad.abs().max() > 1e-5
    assert log.grad.sum().abs() < 1e-3 * log.grad.abs().sum()


def test_lookups_ask_for_what_stands_far_back() -> None:
    tokenizer = Tokenizer.from_gguf(_native.GgufFile(str(tiny("llama").path)).metadata)
    filler = tokenizer.encode("Nothing of note happened on that day. " * 20, add_special=False)
    ids = lookup_sequence(tokenizer, filler, 3000, 4)
    assert len(ids) <= 3000
    text = tokenizer.decode(ids)
    asked = text[-200:].strip().split("\n\n")[-1]
    assert text.count(asked) == 2
