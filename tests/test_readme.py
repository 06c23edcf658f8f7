"""What the README says can be typed, can be typed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import real_model
from edgert.bench.readme_table import BEGIN, END, insert, table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


# What takes minutes with a real model; what is typed is the same with a tiny one in its place.
HEAVY = ("export", "eval", "bench")
# test_packaging types it in an environment of its own.
ELSEWHERE = ("doctor",)


def cache_with(model: Path, directory: Path) -> dict[str, str]:
    """The environment with a cache that has ``model`` under the name of the README's, and with this
    interpreter's commands first in PATH."""
    (directory / "models").mkdir(parents=True)
    (directory / "models" / real_model("smollm2-135m").name).symlink_to(model)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "EDGERT_CACHE": str(directory), "PATH": path}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return cache_with(real_model("smollm2-135m"), tmp_path / "cache")


@pytest.fixture
def tiny_environment(tmp_path: Path) -> dict[str, str]:
    from tiny_models import tiny  # torch is slow to import

    return cache_with(tiny("llama", "Q4_0").path, tmp_path / "tiny")


def command_lines() -> list[str]:
    lines = [line for block in blocks("console") for line in block.splitlines() if line.startswith("edgert ")]
    assert {verb(line) for line in lines} >= {"run", "chat", "pull", "info", *HEAVY, *ELSEWHERE}
    return lines


def verb(line: str) -> str:
    return line.split()[1]


def run(command: list[str], cwd: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment, input="Hello.\n", capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def test_python_example_runs(environment: dict[str, str], tmp_path: Path) -> None:
    (code,) = blocks("python")
    out = run([sys.executable, "-c", code], tmp_path, environment)
    assert "Paris" in out.splitlines()[0]
    assert (tmp_path / "colour.session").stat().st_size > 0


@pytest.mark.alone
def test_command_line_examples_run(
    environment: dict[str, str], tiny_environment: dict[str, str], tmp_path: Path
) -> None:
    for line in command_lines():
        if verb(line) not in ELSEWHERE:
            used = tiny_environment if verb(line) in HEAVY else environment
            assert run(shlex.split(line, comments=True), tmp_path, used).strip(), line


@pytest.mark.slow
def test_command_line_examples_run_on_the_real_model(environment: dict[str, str], tmp_path: Path) -> None:
    for line in command_lines():
        assert run(shlex.split(line, comments=True), tmp_path, environment).strip(), line


def test_make_targets_exist() -> None:
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {
        target
        for doc in DOCS  # only what stands in code: prose has the verb too
        for target in re.findall(r"(?:`|^)make ([a-z][a-z-]*)", doc.read_text(), re.MULTILINE)
    }
    assert {"demo", "test"} <= named <= set(rules)


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.name)
def test_links_and_paths_exist(doc: Path) -> None:
    text = doc.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (doc.parent / link).exists(), link
    folders = "edgert|native|models|platforms|bench|export|tests|docs|cmake|fuzz"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        assert list(ROOT.glob(path)), path


def test_table_is_that_of_the_results() -> None:
    results = sorted((ROOT / "bench/results").glob("*.json"))
    made = [insert(README, table(json.loads(path.read_text()))) for path in results]
    assert README in (made or [insert(README, "").replace(f"{BEGIN}\n\n{END}", f"{BEGIN}\n{END}")])


def test_table_shows_medians_and_the_better_setting() -> None:
    row = {
        "what": "decode",
        "tokens": 2048,
        "unit": "tok/s",
        "ours": [80.0, 100.0, 90.0],
        "peers": {"llama.cpp": [30.0, 31.0, 32.0], "llama.cpp, flash attention": [44.0, 45.0, 46.0]},
        "peer": "llama.cpp, flash attention",
        "ratios": [1.8, 2.0, 2.2],
        "shares": [0.7, 0.8, 0.9],
    }
    start = {**row, "what": "start", "tokens": 20, "unit": "s", "shares": []}
    text = table({"machine": {"cpu": "Some CPU", "cores": 2}, "models": {"tiny": {"rows": [row, start]}}})
    assert "| tiny | decode at 2,048 | 90 tok/s | 45 tok/s | 2.00 | 80% |" in text.splitlines()
    assert text.splitlines()[-1].endswith("| 90.00 s | 45.00 s | 2.00 |  |")


def test_table_needs_both_markers() -> None:
    assert insert(f"a {BEGIN} old {END} b", "new") == f"a {BEGIN}\nnew\n{END} b"
    with pytest.raises(ValueError, match="put them back"):
        insert(f"a {BEGIN} b", "new")
