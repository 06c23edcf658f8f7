"""What every test may use: the real model files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

MODEL_FILES = {
    "smollm2-135m": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "gemma-3-270m": "gemma-3-270m-q4_k_m.gguf",
}


def real_model(name: str) -> Path:
    """The file of a catalogue model: from the directory EDGERT_MODELS names, else from the cache of
    `edgert pull`. Skips the test when it is in neither; tests download nothing."""
    directory = os.environ.get("EDGERT_MODELS")
    if directory is None:
        from edgert import hub

        directory = str(hub.cache_dir())
    found = sorted(Path(directory).rglob(MODEL_FILES[name]))
    if not found:
        pytest.skip(f"{MODEL_FILES[name]} is not in {directory}; get it with: edgert pull {name}")
    return found[0]
