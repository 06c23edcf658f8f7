"""`edgert heads`: its traces against whole runs, its probes on attention whose heads are known, pattern
files, the sidecar it shares with a FlashHead, and what a run makes of the classes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from cli_process import edgert as command
from conftest import real_model
from edgert.export import classify_heads
from edgert.export.classify_heads import Verdict, classify
from edgert.export.gguf_writer import write_gguf
from edgert.export.head_probes import make_needles, read_needles, repeated_tokens
from edgert.export.head_trace import again, divergence, full_attention, read, seen
from edgert.export.sidecar_writer import write_part
from edgert.export.torch_decoder import TorchDecoder
from flash_files import parts
from tiny_models import prompt, tiny

import edgert
from edgert import _native
from edgert.errors import ModelFileError, SessionFileError, UnsupportedModelError, UsageError
from edgert.head_classes import (
    ALL_INDEXED,
    FULL,
    INDEXED,
    STREAMING,
    HeadClasses,
    choose_heads,
    classes_of,
    pattern_text,
    read_pattern,
    seeing_all,
)
from edgert.locate import sidecar_path
from edgert.planner import Case
from edgert.sidecar import Sidecar
from edgert.tokenizer import Tokenizer

NAMES = ["llama", "gemma3", "lfm2"]
LENGTH, END, WINDOW = 90, 14, 20


def steps(_: str, __: int) -> Any:
    return lambda n: None


def open_file(path: Path) -> _native.GgufFile:
    return _native.GgufFile(str(path))


@pytest.mark.parametrize("name", NAMES)
def test_a_trace_goes_on_as_the_whole_would(name: str) -> None:
    """Against one run over all positions in which the heads stream from the end's first position on."""
    decoder = TorchDecoder(tiny(name).path, torch.float64)
    ids, spec = prompt(tiny(name), LENGTH), decoder.spec
    heads = [(i, h) for i in seeing_all(spec) for h in range(spec.layers[i].n_kv_heads)]
    sets = [[], heads[:1], heads[-1:], heads]
    trace = read(decoder, ids, END)
    found = again(trace, sets, WINDOW)
    start = LENGTH - END
    for chosen, ours in zip(sets, found, strict=True):

        def attend(i: int, q: Any, k: Any, v: Any, _: Any, chosen: Any = chosen) -> torch.Tensor:
            plain = full_attention(decoder, i, q, k, v)
            group = q.shape[1] // k.shape[1]
            for head in range(q.shape[1]):
                if (i, head // group) in chosen:
                    scores = q[0, head, start:] @ k[0, head // group].T * spec.attn_scale
                    mask = seen(start, LENGTH, WINDOW, 16)
                    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
                    plain[0, head, start:] = weights @ v[0, head // group]
            return plain

        expected = decoder.logits(decoder.states(torch.tensor([ids]), attend)[0, start:]).log_softmax(-1)
        assert torch.allclose(ours, expected, atol=1e-9)
        assert bool((divergence(trace, ours).mean() > 1e-6) == bool(chosen))


def test_what_a_streaming_head_sees() -> None:
    rows = seen(20, 24, window=2, sinks=3)
    assert rows.shape == (4, 24)
    assert [row.nonzero()[:, 0].tolist() for row in rows] == [
        [0, 1, 2, 19, 20],
        [0, 1, 2, 20, 21],
        [0, 1, 2, 21, 22],
        [0, 1, 2, 22, 23],
    ]


class HandMade:
    """One layer of three KV heads with two query heads each, over one-hot tokens: the first looks for what
    followed the token, the second for the token itself, the third for nothing."""

    def __init__(self, vocabulary: int) -> None:
        layer = SimpleNamespace(kind="attention", window=0, n_kv_heads=3)
        self.spec = SimpleNamespace(
            vocab_size=vocabulary, n_layers=1, layers=[layer], attn_scale=1.0, n_heads=6, conv_kernel=0
        )

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(ids, self.spec.vocab_size).float()

    def layer(self, i: int, x: torch.Tensor, attend: Any) -> torch.Tensor:
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        keys = torch.stack([before, x, torch.zeros_like(x)], 1)
        blind = torch.zeros_like(x)
        # Of each pair only one query head looks: a KV head's score is its best query head's.
        queries = torch.stack([blind, 30 * x, 30 * x, blind, blind, blind], 1)
        attend(i, queries, keys, keys, torch.empty(0))
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_probes_find_the_heads_that_were_made() -> None:
    scores = repeated_tokens(cast(TorchDecoder, HandMade(5000)), 60, seed=3)
    assert scores.induction[0, 0] > 0.95
    assert scores.echo[0, 1] > 0.95 * 2 / 3  # a third of its weight stays with the token itself
    others = [scores.induction[0, 1], scores.induction[0, 2], scores.echo[0, 0], scores.echo[0, 2]]
    assert max(others) < 0.05


def test_needles_are_what_their_sources_say() -> None:
    tokenizer = Tokenizer.from_gguf(open_file(tiny("llama").path).metadata)
    text = prompt(tiny("llama"), 900)
    made = make_needles(tokenizer, text, 800, 100, seed=5)
    start = len(made.ids) - made.end
    assert len(made.ids) <= 800
    assert [made.ids[s] for s in made.sources] == [made.ids[start + at + 1] for at in made.predicting]
    assert max(made.sources) < start - 60
    assert sorted(set(made.answers)) == list(range(6))
    told = torch.full((made.end, 1000), -10.0)
    for at in made.predicting:
        told[at, made.ids[start + at + 1]] = 0
    assert made.right(told) == 6
    told[made.predicting[0]] = 0.0
    assert made.right(told) == 5
    # An induction head finds the second token of an answer and those behind it.
    decoder = HandMade(1000)
    _, scores = read_needles(cast(TorchDecoder, decoder), made)
    assert scores[0, 0] > max(scores[0, 1], scores[0, 2]) == 0


def test_a_pattern_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    spec = tiny("llama").spec
    pattern = [[0.0, 1.5], [0.499999, 0.5], [1.0, 0.25]]
    path = tmp_path / "full_attention_heads.tsv"
    path.write_text(pattern_text(pattern))
    assert read_pattern(path, spec) == pattern
    assert classes_of(pattern, spec).classes == [
        [STREAMING, FULL],
        [STREAMING, INDEXED],
        [INDEXED, STREAMING],
    ]
    # DuoAttention writes with numpy, in its own notation.
    np.savetxt(path, np.array(pattern), delimiter="\t")
    assert read_pattern(path, spec) == pattern


def test_layers_that_do_not_see_everything_have_no_classes() -> None:
    for name in ("gemma3", "lfm2"):
        spec = tiny(name).spec
        columns = max(layer.n_kv_heads for layer in spec.layers)
        classes = classes_of([[0.0] * columns] * spec.n_layers, spec).classes
        assert [i for i, row in enumerate(classes) if row] == seeing_all(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\t1\n", r"expected 3 rows \(layers\) of 2 numbers \(KV heads\), found 1 rows of 2"),
        ("0\n1\n0\n", "found 3 rows of 1"),
        ("0\t1\n0\t1\n0\n", "found 3 rows of 1 or 2"),
        ("", "found 0 rows of 0"),
        ("0\tx\n", "line 1: expected numbers with tabs"),
        ("0\t1\n0\t-1\n0\t1\n", "line 2: expected numbers from 0 on"),
        ("0\tnan\n", "line 1: expected numbers from 0 on"),
        ("0" * (1 << 21), "too large"),
    ],
)
def test_a_wrong_pattern_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.tsv"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        edgert.load(tiny("llama").path, attention="sparse", heads=path)
    with pytest.raises(UsageError, match="cannot read"):
        read_pattern(tmp_path / "none.tsv", tiny("llama").spec)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    copy = tmp_path / "model.gguf"
    shutil.copy(tiny("llama").path, copy)
    return copy


@pytest.fixture
def pattern(tmp_path: Path) -> Path:
    path = tmp_path / "pattern.tsv"
    path.write_text("0\t1\n2\t0.4\n1\t0\n")
    return path


CLASSES = [[STREAMING, INDEXED], [FULL, STREAMING], [INDEXED, STREAMING]]


def test_classes_join_a_flash_head_and_survive_its_export(base: Path, pattern: Path) -> None:
    target = sidecar_path(base)
    metadata, tensors = parts(base, "clusters+lowrank")
    write_gguf(target, metadata, tensors)
    done = command("heads", str(base), "--pattern", str(pattern), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["streaming"], told["indexed"], told["full"]) == (3, 2, 1)
    joined = Sidecar(target, base)
    assert joined.heads(tiny("llama").spec) == HeadClasses(512, CLASSES)
    assert (joined.recipe, joined.probes, joined.keep) == ("clusters+lowrank", 2, 2)
    for tensor in tensors:
        assert joined.file.read(tensor.name) == tensor.data.tobytes()
    assert joined.file.get("edgert.head.tokens") == metadata["edgert.head.tokens"].tolist()
    # The head again, of one stage: of the old one nothing is left, the classes stay.
    again_metadata, again_tensors = parts(base, "clusters", seed=1)
    head = {key: value for key, value in again_metadata.items() if key.startswith("edgert.head.")}
    write_part(target, base, "head", head, again_tensors)
    both = Sidecar(target, base)
    assert both.recipe == "clusters"
    assert {t.name for t in both.file.tensors} == {t.name for t in again_tensors}
    assert both.heads(tiny("llama").spec) == HeadClasses(512, CLASSES)
    with edgert.load(base, attention="sparse", budget=8, heads="sidecar") as model:
        assert model.head == "flash"
        assert model.engine.describe()["heads"]["streaming"] == 3
        assert model.generate([1, 2, 3], max_tokens=4).tokens


def test_a_sidecar_of_classes_alone_is_no_flash_head(base: Path, pattern: Path) -> None:
    assert command("heads", str(base), "--pattern", str(pattern)).returncode == 0
    with edgert.load(base) as model:
        assert model.head == "dense"
    with pytest.raises(UsageError, match="no sidecar with a FlashHead"):
        edgert.load(base, head="flash")


def test_the_option_says_whose_classes(base: Path, pattern: Path) -> None:
    spec = tiny("llama").spec
    with pytest.raises(UsageError, match="no classes of heads in a sidecar"):
        choose_heads("sidecar", base, spec, "sparse")
    assert choose_heads(pattern, base, spec, "sparse").classes == CLASSES
    assert command("heads", str(base), "--pattern", str(pattern)).returncode == 0
    assert choose_heads("sidecar", base, spec, "sparse").classes == CLASSES
    assert choose_heads("none", base, spec, "sparse") == ALL_INDEXED
    for attention in ("full", "exact"):
        assert choose_heads("none", base, spec, attention) == ALL_INDEXED
        with pytest.raises(UsageError, match="every head keeps every token"):
            edgert.load(base, attention=attention, heads="sidecar")
    for words, expected in (([], None), (["--heads", "sidecar"], {"indexed": 2, "full": 1, "streaming": 3})):
        done = command(
            "run", str(base), "hello", "--attention", "sparse", "--max-tokens", "2", "--json", *words
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["stats"]["engine"].get("heads") == expected


def test_damaged_classes_are_named(base: Path) -> None:
    metadata: dict[str, Any] = {"edgert.heads.window": 512, "edgert.heads.quality": "{}"}
    good = np.array(CLASSES, np.int32).ravel()
    for window, flat, message in (
        (512, good[:-1], "expected 3 rows of 2, found 5"),
        (512, good + 1, "from 0 to 2"),
        (15, good, "at least 16"),
    ):
        write_part(
            sidecar_path(base),
            base,
            "heads",
            {**metadata, "edgert.heads.window": window, "edgert.heads.classes": flat},
        )
        with pytest.raises(ModelFileError, match=message):
            edgert.load(base, attention="sparse", heads="sidecar")
        edgert.load(base, attention="sparse").close()


def test_a_share_of_a_pattern_streams(base: Path, pattern: Path) -> None:
    out = base.with_name("out.tsv")
    done = command("heads", str(base), "--pattern", str(pattern), "--stream", "0.5", "-o", str(out))
    assert done.returncode == 0, done.stderr
    assert classes_of(read_pattern(out, tiny("llama").spec), tiny("llama").spec).count(STREAMING) == 3
    done = command("heads", str(base), "--pattern", str(pattern), "--stream", "0")
    assert done.returncode == 0, done.stderr
    found = Sidecar(sidecar_path(base), base).heads(tiny("llama").spec)
    assert found is not None and found.count(STREAMING) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stream", "1.5"], "a share from 0 to 1"),
        (["--seed", "-1"], "must not be negative"),
        (["--plot", "x.pdf"], "ends in .png"),
        (["-o", "nowhere/x.tsv"], "no directory nowhere"),
        (["--pattern", "p.tsv", "--plot", "x.png"], "drop one of them"),
        (["--pattern", "missing.tsv"], "cannot read the pattern"),
        ([], "made for 256 tokens, of which streaming heads see 528"),
    ],
)
def test_wrong_words_leave_no_sidecar(base: Path, words: list[str], message: str) -> None:
    done = command("heads", str(base), *words)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert not sidecar_path(base).exists()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that tiny models can read."""
    for name, value in (
        ("WINDOW", 24),
        ("LENGTH", 200),
        ("NEEDLES_LENGTH", 240),
        ("SCORED", 8),
        ("HELD_SCORED", 16),
    ):
        monkeypatch.setattr(classify_heads, name, value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("short")
def test_heads_are_ranked_by_what_they_cost(name: str) -> None:
    spec = tiny(name).spec
    columns = max(layer.n_kv_heads for layer in spec.layers)
    verdict = classify(open_file(tiny(name).path), None, 0, steps)
    expected = {(i, h) for i in seeing_all(spec) for h in range(spec.layers[i].n_kv_heads)}
    assert {(h.layer, h.head) for h in verdict.heads} == expected
    assert [(h.kept, h.cost) for h in verdict.heads] == sorted((h.kept, h.cost) for h in verdict.heads)
    assert any(h.kept for h in verdict.heads)
    assert all(h.text > 0 for h in verdict.heads)
    if verdict.streaming:
        assert verdict.text <= classify_heads.TEXT_LIMIT
        assert not verdict.heads[verdict.streaming - 1].kept
    asked = classify(open_file(tiny(name).path), 1.0, 0, steps)
    assert asked.streaming == len(expected)
    assert asked.text > max(h.text for h in asked.heads) / 10
    for made in (verdict, asked):
        classes = classes_of(made.pattern(spec.n_layers, columns), spec)
        first = {(h.layer, h.head) for h in made.heads[: made.streaming]}
        found = {(i, h) for i, row in enumerate(classes.classes) for h, c in enumerate(row) if c == STREAMING}
        assert found == first
        assert classes.count(FULL) == 0


@pytest.mark.usefixtures("short")
def test_limits_decide_how_many_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no limits every head that no probe keeps; with limits of nothing none."""
    found = {}
    for limit in (0.0, 1e9):
        monkeypatch.setattr(classify_heads, "TEXT_LIMIT", limit)
        monkeypatch.setattr(classify_heads, "ANSWER_LIMIT", limit)
        found[limit] = classify(open_file(tiny("llama").path), None, 0, steps)
    assert found[0.0].streaming == 0
    assert found[1e9].streaming == sum(not head.kept for head in found[1e9].heads)


def test_a_model_of_windows_is_refused(base: Path) -> None:
    path = tiny("mistral-window", "Q8_0").path
    with pytest.raises(UnsupportedModelError, match="every layer has a window"):
        classify(open_file(path), None, 0, steps)


def test_heat_maps_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from edgert.export.head_plot import write_png

    heads = [classify_heads.Judged(i, h, 1e-4, 0.0, 0.1, 0.2, 0.3) for i in (1, 4) for h in range(2)]
    write_png(Verdict(heads, 2, 0.0, 0.0, 6, 6, 6), tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UsageError, match="cannot write"):
        write_png(Verdict(heads, 2, 0.0, 0.0, 6, 6, 6), tmp_path / "none" / "heads.png")


def test_a_run_takes_what_its_plan_says(base: Path, pattern: Path) -> None:
    before = _native.allocated()
    options: dict[str, Any] = {"threads": 2, "attention": "sparse", "budget": 24, "heads": pattern}
    with edgert.load(base, context=250, **options) as model, model.session() as session:
        session.generate(list(range(1, 200)), max_tokens=8)
        took = {k: n - before.get(k, 0) for k, n in _native.allocated().items()}
        kept, length = session._sequence.nbytes, session._sequence.length
    case = Case.read(open_file(base), None, 0, 2, "f16", "dense", 0, 24, "sparse", pattern)
    terms = {part.name: part.bytes for part in case.memory(length)}
    names = ("KV cache, 3 streaming heads", "KV cache, 2 indexed heads", "KV cache, 1 full heads")
    assert sum(terms[name] for name in names) == took["the KV cache"] == kept
    plan = edgert.plan(base, context=250, **options)
    assert {part.name for part in plan.memory} >= set(names)


def test_sessions_are_bound_to_their_classes(base: Path, pattern: Path) -> None:
    saved = base.with_name("session")
    with edgert.load(base, attention="sparse", heads=pattern) as model, model.session() as session:
        session.generate([1, 2, 3], max_tokens=3)
        session.save(saved)
        with model.session() as other:
            other.restore(saved)
            assert other.tokens == session.tokens
    with (
        edgert.load(base, attention="sparse") as model,
        model.session() as session,
        pytest.raises(SessionFileError, match="heads"),
    ):
        session.restore(saved)


def test_judged_heads_add_up() -> None:
    head = classify_heads.Judged(0, 0, 0.25, 0.5, 0, 0, 0)
    assert head.cost == 0.75
    assert replace(head, kept=True).cost == 0.75


@pytest.mark.slow
def test_the_lookup_heads_of_a_real_model_do_not_stream() -> None:
    """Of SmolLM2-135M: those whose loss costs lookups, found by ablation apart from this code."""
    verdict = classify(open_file(real_model("smollm2-135m")), None, 0, steps)
    streaming = {(h.layer, h.head) for h in verdict.heads[: verdict.streaming]}
    assert not streaming & {(18, 2), (7, 2), (23, 0), (17, 0), (17, 1)}
    assert len(streaming) >= 10
