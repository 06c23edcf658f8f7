"""`edgert bench` on tiny models: what its rows hold, how it prints them, what it refuses, Ctrl-C."""

from __future__ import annotations

import csv
import io
import json
import shutil
import signal
import sys
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from cli_process import edgert, start
from edgert.bench import plots, table
from edgert.bench.page import page
from edgert.bench.request import HEADS
from edgert.export.gguf_writer import write_gguf
from flash_files import parts
from onnx_directories import exported
from tiny_models import tiny

from edgert.cli import main
from edgert.errors import EngineError, UsageError
from edgert.locate import sidecar_path

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.alone

REPETITIONS = 4
LABELS = [
    "edgert dense Q4_0",
    "edgert dense Q8_0 (baseline)",
    "edgert flash",
    "edgert exact",
    "llama.cpp fa on",
    "llama.cpp fa off",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head that is not int8, and a sidecar."""
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    shutil.copy(tiny("llama", "Q4_0").path, path)
    write_gguf(sidecar_path(path), *parts(path))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an int8 head and no sidecar."""
    path = tmp_path_factory.mktemp("plain") / "plain.gguf"
    shutil.copy(tiny("llama", "Q8_0").path, path)
    return path


@pytest.fixture(scope="module")
def rows(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    cache = str(tmp_path_factory.mktemp("cache"))
    small = ("-p", 8, "-n", 12, "-d", 4, "-t", 2, "-r", REPETITIONS)
    done = edgert("bench", model, *small, "--peer", "llamacpp", "-o", "json", EDGERT_CACHE=cache)
    assert done.returncode == 0, done.stderr
    assert "checking the answers of edgert dense Q4_0" in done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert list(Path(cache).iterdir()) == [Path(cache) / "sha256.json"], "the baseline's copy is gone"
    return found


def test_an_export_takes_turns_with_the_native_engine(plain: Path) -> None:
    peer = f"onnx={exported('llama', 'int4', 'lowrank')}"
    small = ("-p", 8, "-n", 12, "-t", 2, "-r", REPETITIONS, "--peer", peer, "-o", "json")
    done = edgert("bench", plain, *small)
    assert done.returncode == 0, done.stderr
    rows = {row["label"]: row for row in json.loads(done.stdout) if row["n_gen"]}
    assert list(rows) == ["edgert dense Q8_0", *(f"edgert onnx {h} int4 kv f32" for h in HEADS)]
    for row in list(rows.values())[1:]:
        assert row["median_ts"] > 0 and row["bytes_per_token"] > 0 and row["times_dense"] > 0
        assert row["engine_version"] == version("onnxruntime")
    assert rows["edgert onnx dense int4 kv f32"]["reference"] == "edgert dense Q8_0"
    done = edgert("bench", plain, *small, "--head", "dense")
    assert {row["head"] for row in json.loads(done.stdout)} == {"dense"}


def test_modes_of_attention(model: Path) -> None:
    small = ("-p", 0, "-n", 12, "-d", 4, "-t", 2, "-r", REPETITIONS, "--head", "dense,exact")
    done = edgert("bench", model, *small, "--attention", "full,sparse,exact", "-o", "json")
    assert done.returncode == 0, done.stderr
    rows = {row["label"]: row for row in json.loads(done.stdout)}
    dense = rows["edgert dense Q4_0"]
    assert dense["attention"] == "full" and dense["times_dense"] is None
    sparse = rows["edgert dense Q4_0 sparse attention"]
    assert sparse["attention"] == "sparse" and sparse["times_dense"] > 0 and sparse["agreement"] is None
    for head in ("dense Q4_0", "exact"):
        exact = rows[f"edgert {head} exact attention"]
        assert exact["same"] == exact["compared"] == 12
        assert exact["bytes_per_token"] > sparse["bytes_per_token"] / 2


def test_rows_of_every_head_and_peer(rows: list[dict[str, Any]]) -> None:
    assert [(r["test"], r["label"]) for r in rows] == [
        *(("pp8 @ d4", label) for label in LABELS),
        *(("tg12 @ d4", label) for label in LABELS),
    ]
    for row in rows:
        assert len(row["samples_ts"]) == REPETITIONS and len(row["warmups_ts"]) >= 2
        assert 0 < row["p5_ts"] <= row["median_ts"] <= row["p95_ts"] and row["stddev_ts"] > 0
        assert min(row["samples_ts"]) <= row["avg_ts"] <= max(row["samples_ts"])
        assert 0 < row["time_to_first_token"] < 5 and 10e6 < row["peak_memory"] < 2e9
        assert row["threads"] == 2 and row["n_depth"] == 4 and row["kv"] == "f16"
        assert (row["times_dense"] is None) == (row["label"] == LABELS[0])
    for test in {row["test"] for row in rows}:
        (peer,) = (r for r in rows if r["test"] == test and r["times_peer"] is None)
        peers = [r["median_ts"] for r in rows if r["test"] == test and r["engine"] == "llamacpp"]
        assert peer["median_ts"] == max(peers), "the ratios are to its better setting"


def test_rows_hold_what_a_figure_depends_on(rows: list[dict[str, Any]], model: Path) -> None:
    for row in rows:
        assert row["model"] == model.name and row["model_bytes"] == model.stat().st_size
        for field in ("model_sha256", "edgert", "edgert_build", "edgert_isa", "cpu", "kernel", "date"):
            assert isinstance(row[field], str) and row[field], field
        for field in ("governor", "power_mode", "temperature_before", "clock_after", "energy_per_token"):
            assert field in row
        assert row["engine_version"] and row["isa"] and 0 <= row["others"] <= 1
    assert len({row["model_sha256"] for row in rows}) == 1


def test_reading_is_set_beside_the_machine(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["n_prompt"]:
            assert row["bytes_per_token"] is None and row["share_of_machine"] is None
            continue
        reached = row["bytes_per_token"] * row["median_ts"]
        assert row["read_bytes_per_second"] == pytest.approx(reached)
        assert row["share_of_machine"] == pytest.approx(reached / row["machine_bytes_per_second"])
    read = {r["label"]: r["bytes_per_token"] for r in rows if r["n_gen"]}
    assert read[LABELS[1]] > read[LABELS[0]], "an int8 head is larger than one of 4 bits"


def test_answers_are_compared(rows: list[dict[str, Any]]) -> None:
    told = {r["label"]: (r["reference"], r["same"], r["compared"]) for r in rows if r["n_gen"]}
    assert told["edgert exact"] == ("edgert dense Q4_0", 12, 12)
    for label, (reference, same, compared) in told.items():
        assert reference == (LABELS[4] if label == LABELS[0] else LABELS[0])
        # The sidecar of this test is of random routers.
        assert 0 < same <= compared and (same > 0.8 * compared or label == "edgert flash")
    flash = told["edgert flash"]
    assert flash[1] < flash[2]


def test_markdown_and_csv_show_the_rows(rows: list[dict[str, Any]]) -> None:
    lines = table.markdown(rows).splitlines()
    width = lines[0].count("|")
    assert all(line.count("|") == width for line in lines[: len(rows) + 2])
    assert "| tok/s |" in lines[0] and "energy" not in lines[0], "nothing measured, no column"
    assert "| edgert exact | 2 | tg12 @ d4 |" in "\n".join(lines)
    assert rows[0]["model_sha256"][:12] in lines[len(rows) + 3]
    disturbed = [{**rows[0], "warnings": ["the machine was not quiet"], "energy_per_token": 0.25}]
    assert "**Warning:** pp8 @ d4, 2 threads: the machine was not quiet." in table.markdown(disturbed)
    assert "0.250 J" in table.markdown(disturbed)

    read = list(csv.DictReader(io.StringIO(table.to_csv(rows))))
    assert len(read) == len(rows) and read[0]["test"] == "pp8 @ d4"
    assert json.loads(read[0]["samples_ts"]) == rows[0]["samples_ts"] and read[0]["same"].isdigit()


class Checker(HTMLParser):
    """Every element is closed, in order, and nothing is fetched."""

    VOID = ("meta", "br", "img", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("#", "data:")), value

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag


def test_the_page_is_whole_and_stands_alone(rows: list[dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    rows = [{**row, "model": "<b>&.gguf"} for row in rows]
    checker = Checker()
    text = page(rows)
    checker.feed(text)
    checker.close()
    assert checker.open == [] and {"table", "svg", "style"} <= set(checker.seen)
    assert "script" not in checker.seen and "<b>" not in text and "url(http" not in text
    assert checker.seen.count("tr") == len(rows) + 1
    assert page(rows) == text, "the same rows give the same page"


def test_a_plot_is_written(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    plots.check_png(path)
    assert not path.exists(), "looking leaves nothing behind"
    plots.write_png(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"ends in \.png"):
        plots.check_png(tmp_path / "plot.pdf")
    with pytest.raises(UsageError, match="cannot write"):
        plots.check_png(tmp_path / "no" / "plot.png")


def test_plots_name_what_is_missing(monkeypatch: pytest.MonkeyPatch, plain: Path, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EngineError, match=r"pip install 'edgert\[bench\]'"):
        plots.figures()
    assert main(["bench", str(plain), "-o", "html"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "matplotlib" in captured.err


def test_jsonl_and_compare(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", str(plain), "-p", "0", "-n", "4", "-t", "1", "-r", "1", "-o", "jsonl"]
    assert main(command) == 0
    (line,) = capsys.readouterr().out.splitlines()
    row = json.loads(line)
    assert (row["label"], row["test"], row["stddev_ts"]) == ("edgert dense Q8_0", "tg4", None)
    assert row["times_peer"] is None and row["reference"] is None, "nothing to compare with"
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    assert main(["bench", "compare", str(path), str(path)]) == 0
    assert "| 1.000 |  | no difference shown (fewer than 4 samples) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head", "flahs"], "did you mean flash?"),
        (["--head", "flash"], "edgert export"),
        (["--peer", "llama.cpp"], "did you mean llamacpp?"),
        (["--peer", "llamacpp=/tmp"], "drop =/tmp"),
        (["--peer", "onnx"], "onnx=DIR"),
        (["--peer", "transformers=/nowhere"], "there is no directory '/nowhere'"),
        (["-o", "htm"], "did you mean html?"),
        (["--kv", "f17"], "did you mean f16?"),
        (["-p", "12,x"], "found 'x'"),
        (["-n", "-4"], "found '-4'"),
        (["-d", "1,,2"], "an element is missing"),
        (["-t", "0"], "found '0'"),
        (["-t", "99999"], "numbers of 1 to 1024"),
        (["-r", "0"], "-r must be 1 to 1000"),
        (["-r", "many"], "invalid int value"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-d", "200", "-n", "100"], "the model was made for 256"),
        (["--plot", "plot.pdf"], "ends in .png"),
    ],
)
def test_wrong_use_exits_with_2(
    plain: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    defaults = ["-p", "4", "-n", "4"]
    assert main(["bench", str(plain), *defaults, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [["compare"], ["compare", "a.json"], ["compare", "a", "b", "-o", "csv"]]
)
def test_a_wrong_number_of_files_exits_with_2(arguments: list[str]) -> None:
    assert main(["bench", *arguments]) == 2


@pytest.mark.parametrize(
    ("peer", "package"),
    [
        ("llamacpp", "llama-cpp-python"),
        ("transformers", "transformers"),
        ("onnxruntime-genai=.", "onnxruntime-genai"),
        ("onnx=.", "onnxruntime"),
    ],
)
def test_a_peer_that_is_not_there_is_named(
    plain: Path, peer: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgert.bench.request.find_spec", lambda name: None)
    assert main(["bench", str(plain), "-p", "4", "-n", "4", "--peer", peer]) == 1
    assert f"pip install {package}" in capsys.readouterr().err


def test_settings_that_do_not_fit_in_memory_are_refused(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgert.bench.suite.detect", lambda: SimpleNamespace(available_memory=1000))
    assert main(["bench", str(plain), "-p", "4", "-n", "0"]) == 1
    assert "measure fewer heads or peers at once" in capsys.readouterr().err


def test_a_worker_that_fails_is_reported_with_its_reason(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGERT_ISA", "nonsense")
    assert main(["bench", str(plain), "-p", "4", "-n", "0"]) == 1
    assert "EDGERT_ISA" in capsys.readouterr().err


def test_more_threads_than_cores_are_allowed_and_said(
    plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = (psutil.cpu_count(logical=True) or 1) + 1
    assert main(["bench", str(plain), "-p", "4", "-n", "0", "-r", "1", "-t", str(threads)]) == 0
    assert f"{threads} threads on " in capsys.readouterr().out


def test_ctrl_c_keeps_the_rows_measured(plain: Path) -> None:
    process = start("bench", plain, "-p", 4, "-n", 200, "-t", 1, "-r", 100)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("tg200, turn 1"):
            break
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.splitlines()[-1] == "edgert: interrupted"
    assert "| edgert dense Q8_0 | 1 | pp4 |" in output and "| tg200 |" not in output
    assert workers and not any(worker.is_running() for worker in workers)
