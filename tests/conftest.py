"""What every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from edgert.models.catalogue import find

from edgert import hub


def real_model(name: str) -> Path:
    """The file of a catalogue model: from the directory EDGERT_MODELS, else from edgert's cache, fetched
    into it when it is not there yet. Call it as a helper or take the fixture of the same name."""
    entry = find(name)
    assert entry is not None, f"{name} is not in the catalogue"
    directory = os.environ.get("EDGERT_MODELS")
    if directory:
        path = Path(directory) / entry.file
        if path.exists():
            return path
    return hub.resolve(name)


@pytest.fixture(scope="session", name="real_model")
def _real_model() -> Callable[[str], Path]:
    return real_model


_REPORT = pytest.StashKey[list[str]]()


@pytest.fixture
def report(pytestconfig: pytest.Config) -> Callable[..., None]:
    """Takes lines to print at the end of the run: figures that a reader wants from a passing test."""
    lines = pytestconfig.stash.setdefault(_REPORT, [])
    return lambda *new: lines.extend(new)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(_REPORT, []):
        terminalreporter.section("measured")
        terminalreporter.write("\n".join(lines) + "\n")
