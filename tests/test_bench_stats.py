"""Percentiles, ratios with their intervals, and the comparison of two runs, on samples made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgert.bench.compare_runs import compare, pair, read, warnings
from edgert.bench.stats import LEAST_SAMPLES, ratio, summarise

from edgert.errors import UsageError


def test_summary_interpolates() -> None:
    s = summarise([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (s.median, s.mean) == (3.0, 3.0)
    assert (s.p5, s.p95) == pytest.approx((1.2, 4.8))
    assert s.deviation == pytest.approx(2.5**0.5)
    assert summarise([7.0]).deviation is None and summarise([7.0]).p5 == 7.0
    with pytest.raises(ValueError, match="no samples"):
        summarise([])


def test_a_verdict_needs_samples_that_lie_apart() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(100, 3, 8).tolist()
    assert ratio([x * 1.3 for x in base], base).verdict == "faster"
    assert ratio([x * 0.7 for x in base], base).verdict == "slower"
    assert ratio(rng.normal(100, 3, 8).tolist(), base).verdict == "no difference shown"
    r = ratio([x * 1.3 for x in base], base)
    assert r.low is not None and r.high is not None and r.low < r.value < r.high
    assert r.value == pytest.approx(1.3) and ratio([x * 1.3 for x in base], base) == r, "the seed is fixed"
    few = ratio([200.0] * (LEAST_SAMPLES - 1), base)
    assert few.low is None and few.verdict.startswith("no difference shown (fewer than")


def test_two_runs_of_the_same_seldom_differ() -> None:
    rng = np.random.default_rng(5)
    verdicts = [ratio(*rng.normal(100, 5, (2, 10)).tolist(), seed=i).verdict for i in range(60)]
    assert sum(v != "no difference shown" for v in verdicts) <= 8, "about one in twenty"


def row(test: str = "tg128", rates: tuple[float, ...] = (99.0, 100.0, 101.0, 100.0), **more: Any) -> Any:
    return {
        "test": test,
        "label": "edgert dense Q8_0",
        "engine": "edgert",
        "head": "dense",
        "variant": "Q8_0",
        "kv": "f16",
        "threads": 2,
        "samples_ts": list(rates),
        "model_sha256": "aa",
        "cpu": "Some CPU",
        "warnings": [],
        **more,
    }


def written(path: Path, rows: list[Any], lines: bool = False) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows))
    return path


def test_sparse_attention_is_no_pair_of_full_attention(tmp_path: Path) -> None:
    a = written(tmp_path / "a.json", [row()])  # of a version that knew full attention alone
    b = written(tmp_path / "b.json", [row(attention="sparse", rates=(150.0, 151.0)), row(attention="full")])
    lines = compare(a, b, "md").splitlines()
    assert "| 1.000 |" in lines[2] and not any("150" in line for line in lines[:3])


def test_compare_says_what_changed(tmp_path: Path) -> None:
    a = written(tmp_path / "a.json", [row(), row("pp512"), row("tg64")])
    b = written(tmp_path / "b.jsonl", [row("pp512"), row(rates=(150.0, 151.0, 149.0, 150.0))], lines=True)
    text = compare(a, b, "md")
    lines = text.splitlines()
    assert lines[2].startswith("| edgert dense Q8_0 | 2 | tg128 | 100.0 | 150.0 | 1.500 | 1.4")
    assert lines[2].endswith("| faster |")
    assert "| pp512 | 100.0 | 100.0 | 1.000 |" in text and "no difference shown" in lines[3]
    assert "Only in A: edgert dense Q8_0, tg64, 2 threads." in text and "Warning" not in text
    found = json.loads(compare(a, b, "json"))
    assert [r["verdict"] for r in found["rows"]] == ["faster", "no difference shown"]


def test_compare_warns_of_other_conditions(tmp_path: Path) -> None:
    a = [row(governor="performance"), row("pp512")]
    b = [
        row(threads=1, governor="powersave", model_sha256="bb", cpu="Another"),
        row("pp512", warnings=["the machine was not quiet"]),
    ]
    pairs, only_a, only_b = pair(a, b)
    assert len(pairs) == 2 and not only_a and not only_b, "other threads alone do not keep rows apart"
    told = list(warnings(pairs))
    assert "another model file: aa in A, bb in B" in told
    assert "another processor: Some CPU in A, Another in B" in told
    assert "another governor: performance in A, powersave in B" in told
    assert "edgert dense Q8_0, tg128: 2 threads in A, 1 in B" in told
    assert "edgert dense Q8_0, pp512 of B: the machine was not quiet" in told
    text = compare(written(tmp_path / "a.json", a), written(tmp_path / "b.json", b), "md")
    assert text.count("**Warning:**") == len(told) and "| 2 → 1 |" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("[]", "has no rows"),
        ("not json", "is not what"),
        ("[1]", "a row without engine"),
        ('[{"test": "tg128"}]', "a row without engine"),
        (json.dumps([row(rates=())]), "a row without samples_ts"),
        (json.dumps([{**row(), "samples_ts": [0.0, "x"]}]), "a row without samples_ts"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        read(path)


def test_files_without_anything_in_common_are_refused(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a.json", [row()]), written(tmp_path / "b.json", [row("pp512")])
    with pytest.raises(UsageError, match="in common"):
        compare(a, b, "md")
    with pytest.raises(UsageError, match="cannot read"):
        read(tmp_path / "nowhere.json")
    (tmp_path / "c.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="no text"):
        read(tmp_path / "c.json")
