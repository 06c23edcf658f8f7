"""The table of published speeds: its data, its split, and that it is what the script writes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from edgert.bench.published import (
    BITS,
    RULES,
    TARGET,
    choose,
    fit,
    load,
    median_error,
    spec_of,
    table,
    tensor_type,
    tensors,
)

TABLE = Path(__file__).parent.parent / "bench/results/published.md"
ROWS, DATA = load()
FITTING = [row for row in ROWS if row.fits]
JUDGING = [row for row in ROWS if not row.fits]


def test_every_figure_has_a_source() -> None:
    entries = [*DATA["rows"], *DATA["models"].values(), *DATA["devices"].values()]
    assert all(entry["source"].strip() for entry in entries)
    assert all(gone["rows"] and gone["why"] for gone in DATA["left_out"])


def test_rows_and_shapes_are_whole() -> None:
    assert len(ROWS) == len(DATA["rows"])
    for row in ROWS:
        assert row.runtime in {
            f"{name} {where}" for name in ("llama.cpp", "Ollama", "MLC") for where in ("CPU", "GPU")
        }
        assert row.speed > 0 and row.bytes > 0 and 0 < row.sustained <= row.peak
    assert {row.model for row in ROWS} == set(DATA["models"])
    assert set(DATA["devices"]) <= {raw["device"] for raw in DATA["rows"]}
    keys = {"layers", "dim", "ffn", "heads", "kv_heads", "head_dim", "vocab", "tied"}
    for model in DATA["models"].values():
        assert set(model["shape"]) == keys
        assert model["shape"]["heads"] % model["shape"]["kv_heads"] == 0


# What llama-bench says of such files ("size"), in MiB, or (3B, to the byte) wget.
@pytest.mark.parametrize(
    ("model", "quant", "size"),
    [
        ("Llama 3.2 3B", "Q4_K_M", 2019377696 / 2**20),
        ("TinyLlama 1.1B", "Q4_K_M", 636.18),
        ("Qwen2.5-Coder 1.5B", "IQ4_NL", 892.20),
    ],
)
def test_mixtures_have_the_size_of_real_files(model: str, quant: str, size: float) -> None:
    total = sum(tensor.nbytes for tensor in tensors(spec_of(model, DATA["models"][model]), quant)) / 2**20
    assert total == pytest.approx(size, rel=0.005)


def test_rows_that_are_no_whole_blocks_fall_back() -> None:
    small = spec_of("small", DATA["models"]["Qwen2.5 0.5B"])
    assert tensor_type("blk.5.attn_q.weight", (896, 896), small, "Q4_K_M") == "Q5_0"
    assert tensor_type("token_embd.weight", (151936, 896), small, "Q4_K_M") == "Q8_0"
    assert tensor_type("blk.5.ffn_norm.weight", (896,), small, "Q4_K_M") == "F32"
    assert {
        tensor_type(n, s, small, q) for q in ("Q4_0", "IQ4_NL") for n, s in small.tensor_shapes().items()
    } <= set(BITS)


def test_every_second_row_of_a_runtime_fits() -> None:
    seen: Counter[str] = Counter()
    for row in ROWS:
        assert row.fits == (seen[row.runtime] % 2 == 0)
        seen[row.runtime] += 1
    assert load()[0] == ROWS


def test_a_perfect_world_is_fitted_without_error() -> None:
    rule = "the peak"
    rows = [replace(row, speed=0.5 * RULES[rule](row) / row.bytes) for row in ROWS]
    found = fit(rows, rule, 0.0)
    assert list(found.efficiency.values()) == pytest.approx([0.5] * len(found.efficiency))
    assert all(math.isclose(1 / found.seconds(row), row.speed) for row in rows)
    assert (choose(rows).rule, choose(rows).fixed) == (rule, 0.0)


def test_the_judging_half_has_no_say() -> None:
    changed = [row if row.fits else replace(row, speed=row.speed * 3) for row in ROWS]
    assert choose([row for row in changed if row.fits]) == choose(FITTING)


def test_the_target_is_met() -> None:
    assert median_error(choose(FITTING), JUDGING) < TARGET


def test_the_committed_table_is_what_the_script_writes() -> None:
    assert TABLE.read_text() == table(ROWS, DATA), (
        "python -m edgert.bench.published -o bench/results/published.md"
    )
