"""`edgert eval attention`: its sums, its lookups, and what it says of models."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from cli_process import edgert as command
from conftest import real_model
from edgert.bench.attention_quality import TIMED, AttentionQuality, Progress, Text
from edgert.bench.eval_texts import Document, make_documents
from edgert.bench.lookups import Question, make_lookups
from tiny_models import prompt, tiny

from edgert import _native
from edgert.errors import UsageError
from edgert.model import load
from edgert.tier import Tier
from edgert.tokenizer import Tokenizer

CONTEXT = 1024
NAMES = ("llama", "gemma3", "lfm2")  # everything is seen; windows between; convolutions between


def quiet(what: str, total: int) -> Progress[[int], None]:
    return lambda n: None


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_sums_of_positions() -> None:
    full, other = np.log(np.float32([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]])), np.float32([[0, 0, 0], [9, 9, 9]])
    text = Text()
    text.add(full, other, [1, 0])
    text.add(full[:1], full[:1] + 3, [0])
    first, second = math.log(3) - 1.5 * math.log(2), math.log(3) + 0.8 * math.log(0.8) + 0.2 * math.log(0.1)
    assert text.kl == pytest.approx((first + second) / 3, rel=1e-5)
    assert text.agreement == 1  # of equal logits the first
    assert text.perplexity == pytest.approx(math.exp((2 * math.log(3) + math.log(2)) / 3), rel=1e-5)
    ratio = math.exp((2 * math.log(3) - math.log(4) + math.log(0.8)) / 3)
    assert text.perplexity_ratio == pytest.approx(ratio, rel=1e-5)
    joined = text.join(text)
    assert (joined.positions, joined.kl) == (6, pytest.approx(text.kl))
    assert joined.kl_error == pytest.approx(text.kl_error * math.sqrt(1 / 3), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_text_is_scored_as_steps_give_it(name: str) -> None:
    """Against a plain loop of steps: with windows and convolutions, in passes and in turns."""
    made, positions, budget = tiny(name), TIMED + 70, 30
    tokens = prompt(made, 700)
    file = _native.GgufFile(str(made.path))
    core = _native.Model(file, made.spec.as_dict(), 2)
    quality = AttentionQuality(core, Tokenizer.from_gguf(file.metadata), CONTEXT, "f16", [budget, 1000])
    quality.score(Document("prose", tokens), positions, quiet)
    rows = []
    for chosen in (0, budget):
        cache = _native.Cache(core, CONTEXT, "f16", chosen)
        ids, start = np.array(tokens, np.int32), len(tokens) - positions - 1
        core.forward(cache, ids[:start], full=True)
        rows.append([core.forward(cache, ids[i : i + 1]) for i in range(start, len(ids) - 1)])
    full, sparse = (log_softmax(np.array(r)) for r in rows)
    first, found, everything = quality.qualities
    assert (first.text.positions, first.text.kl, first.text.agreement) == (positions, 0, 1)
    at = np.arange(positions), tokens[-positions:]
    assert first.text.perplexity == pytest.approx(np.exp(-full[at].mean()), rel=1e-4)
    assert found.text.perplexity == pytest.approx(np.exp(-sparse[at].mean()), rel=1e-4)
    kl = (np.exp(full) * (full - sparse)).sum(-1).mean()
    assert found.text.kl == pytest.approx(kl, rel=1e-2)
    assert found.text.agreement == (full.argmax(-1) == sparse.argmax(-1)).mean()
    assert everything.text.kl < kl / 4
    assert [len(q.seconds) for q in quality.qualities] == [TIMED] * 3


def test_what_comes_from_the_disk_is_counted(tmp_path: Path) -> None:
    made, positions = tiny("llama"), TIMED + 40
    file = _native.GgufFile(str(made.path))
    core = _native.Model(file, made.spec.as_dict(), 2)
    tokenizer = Tokenizer.from_gguf(file.metadata)
    document = Document("prose", prompt(made, 1900))
    quality = AttentionQuality(core, tokenizer, 2048, "f16", [64], Tier(75, str(tmp_path)))
    quality.score(document, positions, quiet)
    full, sparse = quality.qualities
    assert (full.disk_steps, full.hidden) == (0, None)
    assert sparse.disk_steps == positions - TIMED and sparse.disk_bytes > 0
    assert sparse.kv_bytes["disk"] == round(sparse.disk_bytes / sparse.disk_steps)
    assert sparse.hidden is not None and sparse.hidden <= 1


def test_an_answer_is_a_whole_word_at_once_or_in_a_chat_anywhere() -> None:
    question, chat = Question([], "48213", 9), Question([], "48213", 9, free=True)
    for reply in ("48213", " 48213. And", "\n48213"):
        assert question.answered(reply) and chat.answered(reply)
    for reply in ("482130", "48213.5", "48213,000", "148213", "4821", "x48213"):
        assert not question.answered(reply) and not chat.answered(reply)
    assert chat.answered("It is 48213, I think") and not question.answered("It is 48213")


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_lookups_ask_for_what_was_read(name: str) -> None:
    with load(real_model(name), engine="native", context=2048) as model:
        tokenizer = model.tokenizer
        series = make_lookups(tokenizer, 2000, 100)
        assert [one.tokens for one in make_lookups(tokenizer, 2000, 100)] == [one.tokens for one in series]
        assert [(s.kind, sum(len(t.questions) for t in s.stops)) for s in series] == [
            ("passkey", 40),
            ("strings", 40),
            ("chat", 20),
        ]
        for one in series:
            assert len(one.stops) == 4 and one.stops[-1].length == len(one.tokens) > 1600
            for stop in one.stops:
                read = tokenizer.decode(one.tokens[: stop.length])
                for question in stop.questions:
                    assert len(one.tokens) + len(question.tokens) + question.room <= 2000
                    assert read.count(question.answer) == 1
                    assert question.answer not in tokenizer.decode(question.tokens)
                    told = question.answer + "." if one.kind != "strings" else question.answer
                    assert question.answered(told)
            distractors = len(re.findall(r"\b\d{5}\b", tokenizer.decode(one.tokens)))
            assert distractors >= (60 if one.kind == "strings" else 20)


def test_documents_are_of_both_kinds_or_of_the_file(tmp_path: Path) -> None:
    with load(tiny("llama").path, engine="native") as model:
        found = make_documents(model.tokenizer, 4000)
        assert [d.source for d in found] == ["prose", "prose", "code", "code"]
        assert all(len(d.tokens) == 4000 for d in found)
        assert len({tuple(d.tokens) for d in found}) == 4
        file = tmp_path / "text"
        file.write_text("The river counts the days. " * 60, encoding="utf-8")
        assert [d.source for d in make_documents(model.tokenizer, 10_000, file)] == ["file"]
        file.write_text("short", encoding="utf-8")
        with pytest.raises(UsageError, match="give at least"):
            make_documents(model.tokenizer, 10_000, file)
        file.write_bytes(b"\xff\xfe")
        with pytest.raises(UsageError, match="cannot read"):
            make_documents(model.tokenizer, 10_000, file)


def test_the_command_writes_tables_json_and_a_plot(tmp_path: Path) -> None:
    """Of a real model, which agrees with itself when nearly everything is chosen, and less with few."""
    pytest.importorskip("matplotlib")
    text, table, plot = (tmp_path / name for name in ("text", "out.md", "out.png"))
    text.write_text(
        (Path(__file__).parent.parent / "docs" / "kernel-log.md").read_text(encoding="utf-8")[:6000]
    )
    path = real_model("smollm2-135m")
    options = ["--context", CONTEXT, "--budgets", "32,700", "--positions", "40", "--lookups", "10"]
    done = command("eval", "attention", path, *options, "-f", text, "--json", "-o", table, "--plot", plot)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["context"], found["kv"]) == (CONTEXT, "f16")
    assert [row["budget"] for row in found["rows"]] == [0, 32, 700]
    full, few, most = found["rows"]
    assert few["text"]["all"]["positions"] == 40 and set(few["text"]) == {"file", "all"}
    assert few["text"]["all"]["kl"] > 3 * most["text"]["all"]["kl"]
    assert most["text"]["all"]["kl"] < 0.01
    assert few["kv_bytes_per_step"]["memory"] < full["kv_bytes_per_step"]["memory"]
    assert few["lookups"]["all"]["asked"] == 10 and few["step_seconds"] > 0
    assert full["lookups"]["all"]["right"] >= 5
    assert abs(most["lookups"]["all"]["right"] - full["lookups"]["all"]["right"]) <= 1
    tables = table.read_text(encoding="utf-8")
    assert "| sparse 32 |" in tables and "Lookups answered" in tables
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budgets", "0"], "--budgets are numbers"),
        (["--budgets", "a,1"], "--budgets are numbers"),
        (["--context", "100"], "--context must be at least"),
        (["--positions", "0", "--lookups", "0"], "one of them at least 1"),
        (["--positions", "9999", "--context", "1024", "--lookups", "0"], "half of a document is only read"),
        (["--file", "/nowhere/text"], "cannot read the text"),
        (["--plot", "plot.svg"], "--plot writes PNG"),
        (["-o", "/nowhere/table.md"], "there is no directory"),
        (["--kv", "f32"], "kv"),
    ],
)
def test_wrong_options_are_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgert.cli import main

    assert main(["eval", "attention", str(real_model("smollm2-135m")), *options]) == 2
    found = capsys.readouterr()
    assert message in found.err and found.out == ""
