"""`edgert export`: its quantisers and its file writer against the `gguf` package, its clusters and routers on
data with a structure, and the whole of it on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
from cli_process import start
from conftest import real_model
from edgert.export.calibration_text import TEXTS, load_domains
from edgert.export.clusters import Metric, bisect, fit_routers
from edgert.export.flash_head import Request, export_flash_head
from edgert.export.gguf_writer import OutputError, Tensor, write_gguf
from edgert.export.head_quality import MISSED, Ranking, find_truth
from edgert.export.quantise import dequantise, q4_0, q4_0_for, q8_0, remedies
from tiny_models import tiny

import edgert
from edgert import _native
from edgert.errors import UsageError
from edgert.locate import sidecar_path
from edgert.sidecar import Sidecar
from edgert.tokenizer import Tokenizer


def nothing(_: int) -> None: ...


def steps(_: str, __: int) -> Any:
    return nothing


def matrix(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


@pytest.mark.parametrize(("quantise", "name"), [(q4_0, "Q4_0"), (q8_0, "Q8_0")])
def test_quantised_rows_are_gguf_and_near(quantise: Any, name: str) -> None:
    x, kind = matrix(40, 96), gguf.GGMLQuantizationType[name]
    x[3] = 0
    codes = quantise(x)
    ours = dequantise(codes, name, 96)
    theirs = gguf.quants.dequantize(codes, kind)
    np.testing.assert_array_equal(ours, theirs)
    # As near as what the package itself makes of the rows, or nearer.
    reference = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    assert np.square(ours - x).sum() <= np.square(reference - x).sum() * 1.0001


def test_rounding_for_a_moment_serves_the_products() -> None:
    rng = np.random.default_rng(1)
    inputs = matrix(2000, 64, 2) @ (rng.standard_normal((64, 64)) * np.geomspace(3, 0.05, 64)).astype(
        np.float32
    )
    x = matrix(200, 64, 3)
    moment = inputs.T @ inputs / len(inputs)

    def error(codes: np.ndarray) -> float:
        return float(np.square(inputs @ (dequantise(codes, "Q4_0", 64) - x).T).mean())

    assert error(q4_0_for(x, remedies(moment))) < 0.6 * error(q4_0(x))


def test_a_written_file_reads_back(tmp_path: Path) -> None:
    path, x = tmp_path / "out.gguf", matrix(3, 64)
    ids = np.arange(-1, 9, dtype=np.int32)
    tensors = [
        Tensor("a", "Q8_0", x.shape, q8_0(x)),
        Tensor("b", "F32", (5,), np.arange(5, dtype=np.float32).view(np.uint8)),
    ]
    write_gguf(path, {"text": "ä", "small": 7, "large": 2**40, "ids": ids}, tensors)
    file = _native.GgufFile(str(path))
    assert {k: file.metadata[k] for k in ("text", "small", "large")} == {
        "text": "ä",
        "small": 7,
        "large": 2**40,
    }
    assert list(file.metadata["ids"]) == ids.tolist()
    np.testing.assert_array_equal(file.dequantize("a"), dequantise(q8_0(x), "Q8_0", 64))
    np.testing.assert_array_equal(file.dequantize("b"), np.arange(5))
    reader = gguf.GGUFReader(path)
    assert [t.name for t in reader.tensors] == ["a", "b"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.gguf"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"No space left.*--output"):
        write_gguf(path, {}, [])
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(path, {}, [])
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def grouped(vocab: int, dim: int, groups: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A head whose rows come in groups, and states near its rows."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((groups, dim)).astype(np.float32)
    rows = centres[rng.integers(groups, size=vocab)] + 0.4 * matrix(vocab, dim, seed + 1)
    states = rows[rng.integers(vocab, size=1500)] + 0.5 * matrix(1500, dim, seed + 2)
    return rows.astype(np.float32), states.astype(np.float32)


@pytest.mark.parametrize("vocab", [512, 515, 1000, 17])
def test_clusters_are_of_one_size_and_hold_every_token_once(vocab: int) -> None:
    points = matrix(vocab, 24)
    tokens = bisect(points, np.random.default_rng(0), nothing)
    assert len(tokens) == -(-vocab // 16) * 16
    assert sorted(tokens[tokens >= 0].tolist()) == list(range(vocab))
    assert (tokens[: vocab - vocab % 16] >= 0).all()  # padding is in the last cluster
    np.testing.assert_array_equal(tokens, bisect(points, np.random.default_rng(0), nothing))


def test_fitted_routers_find_more_than_means_and_clusters_more_than_chance() -> None:
    rows, states = grouped(1003, 48, 30)
    fit, held = states[:1000], states[1000:]
    metric = Metric(rows, fit)
    tokens = bisect(metric.points(rows, 40), np.random.default_rng(0), nothing)
    truth = find_truth(rows, tokens, {"one": held[:200], "two": held[200:]}, nothing)
    logits = held @ rows.T
    where = np.empty(len(rows), int)
    where[tokens[tokens >= 0]] = np.flatnonzero(tokens >= 0) // 16
    np.testing.assert_array_equal(truth.top[:, 0], where[logits.argmax(1)])
    np.testing.assert_allclose(truth.maxima.max(1), logits.max(1), rtol=1e-5)
    np.testing.assert_allclose(truth.mass.sum(1), 1, rtol=1e-4)

    means = np.stack([rows[c[c >= 0]].mean(0) for c in tokens.reshape(-1, 16)])
    (routers, bias), _ = fit_routers(rows, fit, tokens, (1, 2), 1e-3, nothing)
    by_fit = Ranking(truth, held @ routers.T + bias, None, 1)
    by_mean = Ranking(truth, held @ means.T, None, 1)
    agreement = [r.quality([(4, 0)])["all"]["4"]["agreement"] for r in (by_fit, by_mean)]
    assert agreement[0] > agreement[1] > 4 * 4 / len(means)
    # The number of clusters asked for a target reaches it in every domain, and one fewer does not.
    probes = by_fit.needed(by_fit.ranks(0), {}, 0.97)
    assert probes
    quality = by_fit.quality([(probes, 0), (probes - 1, 0)])
    assert all(quality[name][str(probes)]["agreement"] >= 0.97 for name in ("one", "two"))
    assert any(quality[name][str(probes - 1)]["agreement"] < 0.97 for name in ("one", "two"))
    everything = by_fit.quality([(len(means), 0)])["all"][str(len(means))]
    assert everything["agreement"] == 1 and everything["regret"] == 0
    assert everything["mass"] == pytest.approx(1, abs=1e-3)


def test_two_stages_rank_by_the_second_what_the_first_leaves() -> None:
    rows, states = grouped(1003, 48, 30)
    tokens = bisect(Metric(rows, states).points(rows, 40), np.random.default_rng(0), nothing)
    truth = find_truth(rows, tokens, {"all of it": states[:300]}, nothing)
    rng = np.random.default_rng(1)
    units = truth.maxima + rng.standard_normal(truth.maxima.shape).astype(np.float32)
    clusters = np.stack([truth.maxima[:, at : at + 2].max(1) for at in range(0, truth.maxima.shape[1], 2)], 1)
    clusters += 2 * rng.standard_normal(clusters.shape).astype(np.float32)
    both = Ranking(truth, clusters, units, 2)
    ranks = both.ranks(5)
    for i, own in enumerate(truth.top[:, 0]):
        probed = np.argsort(-clusters[i])[:5]
        members = [u for c in probed for u in (2 * c, 2 * c + 1) if u < units.shape[1]]
        expected = sum(units[i, u] > units[i, own] for u in members) if own in members else MISSED
        assert ranks[i] == expected
    quality = both.quality([(5, 3)])["all of it"]["5"]
    assert quality["agreement"] == pytest.approx((ranks < 3).mean(), abs=1e-6)
    assert both.needed(ranks, {}, 1.0) is None or (ranks != MISSED).all()


def test_low_rank_rows_approximate_the_logits() -> None:
    rows, states = grouped(400, 64, 12)
    metric = Metric(rows, states)
    exact = states @ (rows - rows.mean(0)).T
    errors = []
    for rank in (32, 64):
        low, projection = metric.low_rank(rows, rank)
        scores = (states @ projection.T) @ low.T
        errors.append(float(np.square(scores - exact).mean() / np.square(exact).mean()))
    assert errors[0] > errors[1] and errors[1] < 1e-6 and errors[0] < 0.2


def test_every_domain_has_text_to_fit_and_text_held_out() -> None:
    file = _native.GgufFile(str(tiny("llama", "Q4_0").path))
    domains = load_domains(Tokenizer.from_gguf(file.metadata))
    names = [d.name for d in domains]
    assert names == sorted(p.stem for p in TEXTS.glob("*.txt")) and len(names) >= 15
    assert {"prose", "code", "chat"} < set(names)
    for domain in domains:
        assert domain.fit and domain.held
        assert not {tuple(p) for p in domain.fit} & {tuple(p) for p in domain.held}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, and few states, so that an export takes a second."""
    monkeypatch.setattr("edgert.export.flash_head.FIT_MAIN", 60)
    monkeypatch.setattr("edgert.export.flash_head.FIT_OTHER", 30)
    monkeypatch.setattr("edgert.export.flash_head.HELD_MAIN", 30)
    monkeypatch.setattr("edgert.export.flash_head.HELD_OTHER", 10)
    monkeypatch.setattr("edgert.export.flash_head.OWN_FIT", 3)
    monkeypatch.setattr("edgert.export.flash_head.OWN_HELD", 2)
    copy = tmp_path / "model.gguf"
    shutil.copy(tiny("llama", "Q4_0").path, copy)
    return copy


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"cluster_size": 48},
        {"rank": 32},
        {"rank": 32, "cluster_size": 32},
        {"probes": 3, "cluster_size": 16},
    ],
)
def test_an_export_is_found_and_used(base: Path, more: dict[str, Any]) -> None:
    lines: list[str] = []
    done = export_flash_head(base, Request(agreement=0.9, **more), None, lines.append, steps)
    assert done.path == sidecar_path(base) and len(lines) == len(done.tried) + 1 >= 2
    sidecar = Sidecar(done.path, base)
    assert sidecar.quality == json.loads(json.dumps(done.quality))
    assert done.quality["probes"] == (sidecar.probes or sidecar.keep)
    assert sidecar.probes == more.get("probes", sidecar.probes)
    assert sidecar.cluster_size == more.get("cluster_size", sidecar.cluster_size)
    assert "rank" not in more or "lowrank" in sidecar.recipe
    with (
        edgert.load(base) as flash,
        edgert.load(base, head="exact") as exact,
        edgert.load(base, head="dense") as d,
    ):
        assert flash.head == "flash" and "sidecar" not in flash.head_note()
        prompt = [3, 1, 4, 1, 5, 9, 2, 6]
        assert exact.generate(prompt, max_tokens=30).tokens == d.generate(prompt, max_tokens=30).tokens
        assert len(flash.generate(prompt, max_tokens=5).tokens) >= 1


def test_the_same_seed_gives_the_same_file(base: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "one.gguf", tmp_path / "two.gguf"]
    for path in paths:
        export_flash_head(base, Request(agreement=0.9, cluster_size=16, seed=5), path, str, steps)
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(agreement=1.5), "between 0 and 1"),
        (Request(cluster_size=24), "multiple of 16"),
        (Request(rank=20), "multiple of 32"),
        (Request(probes=0), "at least 1"),
        (Request(calibration=[Path("nowhere.txt")]), "nowhere.txt"),
    ],
)
def test_wrong_requests_say_what_to_change(base: Path, request_: Request, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export_flash_head(base, request_, None, str, steps)
    assert not sidecar_path(base).exists()
    with pytest.raises(UsageError, match="no such directory"):
        export_flash_head(base, Request(), base.parent / "no" / "x.gguf", str, steps)


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C while the model reads the calibration text, which takes ten seconds."""
    model = tmp_path / "model.gguf"
    model.symlink_to(real_model("smollm2-135m"))
    process = start("export", model, "--flash-head")
    while process.poll() is None and sum(psutil.Process(process.pid).cpu_times()[:2]) < 3:
        time.sleep(0.05)  # starting takes less than a second
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors and "Traceback" not in errors
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
