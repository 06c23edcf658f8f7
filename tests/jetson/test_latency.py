"""Latency on a Jetson: `pytest -m jetson tests/jetson` on a board; skipped elsewhere.

The suite is that of `edgert bench`; EDGERT_JETSON_JSON names a file for its results in the fields of
NVIDIA's benchmark (see `bench/jetson.py` for where they come from).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import real_model
from edgert.bench.context import machine
from edgert.bench.jetson import is_jetson, records

from edgert.cli import main

MACHINE = machine()
pytestmark = [
    pytest.mark.jetson,
    pytest.mark.skipif(
        not is_jetson(MACHINE),
        reason=f"needs a Jetson: no L4T release, and the board is {MACHINE['board'] or 'unknown'}",
    ),
]


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_latency(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], report: Callable[..., None]
) -> None:
    assert main(["bench", str(real_model(name)), "-p", "512", "-n", "128", "-d", "0,2048", "-o", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    found = records(rows)
    assert {(r["config"]["n_prompt"], r["config"]["n_gen"]) for r in found} == {(512, 128)}
    for record in found:
        assert record["generation"] in ("orin", "thor") and record["l4t"] != "unknown"
        metrics = record["metrics"]
        assert metrics["ttft_ms_p50"] > 0 and metrics["tpot_ms_p50"] > 0
        report(f"{record['variant']}, {record['runtime']}: {metrics}, {record['warnings']}")
    for row in rows:
        assert row["power_mode"] and row["temperature_before"] and row["clock_before"]
        assert row["peak_memory"] > row["model_bytes"] * 0.5
        if row["head"] == "exact" and row["n_gen"]:
            assert row["same"] == row["compared"]
    path = Path(os.environ.get("EDGERT_JETSON_JSON") or tmp_path / "jetson.json")
    before = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*before, *found], indent=1))
