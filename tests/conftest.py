"""What every test may use."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgert.models.catalogue import find

from edgert import hub


def pytest_configure(config: pytest.Config) -> None:
    """Workers of pytest-xdist share the processors out: threads that meet thousands of times in a test would
    wait at each meeting for another worker to leave a processor."""
    worker: dict[str, Any] | None = getattr(config, "workerinput", None)
    if worker is not None:
        processors = sorted(os.sched_getaffinity(0))
        own = processors[int(worker["workerid"].removeprefix("gw")) :: worker["workercount"]]
        os.sched_setaffinity(0, own or processors)


def real_model(name: str) -> Path:
    """The file of a catalogue model: from the directory EDGERT_MODELS, else from edgert's cache, fetched
    into it when it is not there yet. Call it as a helper or take the fixture of the same name. What is
    returned is a link without neighbours: a sidecar beside the model must not decide what a test sees."""
    entry = find(name)
    assert entry is not None, f"{name} is not in the catalogue"
    directory = os.environ.get("EDGERT_MODELS")
    if directory:
        path = Path(directory) / entry.file
        if path.exists():
            return _alone(path)
    return _alone(hub.resolve(name))


_LINKS = tempfile.TemporaryDirectory(prefix="edgert-models-")


@functools.cache
def _alone(path: Path) -> Path:
    link = Path(_LINKS.name) / path.name
    link.symlink_to(path.absolute())
    return link


@pytest.fixture(scope="session", name="real_model")
def _real_model() -> Callable[[str], Path]:
    return real_model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as transformers saves it, not to be changed."""
    from hf_files import save  # torch is slow to import, and most tests have no use for it

    return save("llama", tmp_path_factory.mktemp("saved"))


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A directory to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


_REPORT = pytest.StashKey[list[str]]()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions on ONNX Runtime with passes and windows of a few tokens: tiny models are made for 256
    positions."""
    from edgert.engines import onnx, onnx_caches  # not every test has use for them

    monkeypatch.setattr(onnx, "CHUNK", 8)
    monkeypatch.setattr(onnx, "SCORED", 5)
    monkeypatch.setattr(onnx_caches, "SPARE", 3)


@pytest.fixture
def report(pytestconfig: pytest.Config) -> Callable[..., None]:
    """Takes lines to print at the end of the run: figures that a reader wants from a passing test."""
    lines = pytestconfig.stash.setdefault(_REPORT, [])
    return lambda *new: lines.extend(new)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(_REPORT, []):
        terminalreporter.section("measured")
        terminalreporter.write("\n".join(lines) + "\n")
