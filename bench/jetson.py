"""A run in the fields of NVIDIA's own Jetson benchmark, so that both can be compared.

The fields are those of the JSON contract of `jetson-llm-benchmark` in github.com/NVIDIA/skills (2026): one
object a run, `config` and `metrics` as its script for llama.cpp has them; the names of boards are those of
its `detect_jetson.sh`. It runs one request at a time, as `edgert bench` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
LINES = {"thor": "thor", "nano": "orin-nano", "nx": "orin-nx", "agx": "orin-agx"}
SIZES = {"thor": (128, 64), "orin-agx": (64, 32), "orin-nx": (16, 8), "orin-nano": (8, 4)}  # GiB
MODULES = {"thor-128gb": "thor-t5000", "thor-64gb": "thor-t4000"}


def is_jetson(machine: Row) -> bool:
    """``machine`` as :func:`edgert.bench.context.machine` gives it."""
    return machine["l4t"] is not None or "jetson" in (machine["board"] or "").lower()


def board_fields(board: str | None, memory: int) -> dict[str, str]:
    """``board`` is the device tree's model, ``memory`` bytes in all; part of it is not the system's, so
    the module is the largest that has no more than a quarter more."""
    words = re.findall(r"[a-z]+", (board or "").lower())
    sku = next((line for word, line in LINES.items() if word in words), "unknown")
    sizes = [size for size in SIZES.get(sku, ()) if memory >= size * 2**30 * 0.8]
    variant = f"{sku}-{sizes[0]}gb" if sizes else sku
    return {
        "sku": sku,
        "generation": sku.partition("-")[0],
        "product_line": "thor-agx" if sku == "thor" else sku,
        "variant": MODULES.get(variant, variant),
    }


def records(rows: Iterable[Row]) -> list[Row]:
    """One object for each pair of a prompt and a generation at the same depth in the same setting. Beside
    NVIDIA's fields stands ``edgert``, with both rows whole."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["label"], row["threads"], row["n_depth"]), []).append(row)
    return [
        _record(prompt, generation)
        for group in groups.values()
        for prompt in group
        for generation in group
        if prompt["n_prompt"] and generation["n_gen"]
    ]


def _record(prompt: Row, generation: Row) -> Row:
    milliseconds = 1000 / generation["median_ts"]
    return {
        "skill": "jetson-llm-benchmark",
        "runtime": prompt["label"],
        "model": prompt["model"],
        **board_fields(prompt["board"], prompt["memory"]),
        "l4t": prompt["l4t"] or "unknown",
        "container": "",
        "config": {"n_prompt": prompt["n_prompt"], "n_gen": generation["n_gen"], "n_gpu_layers": 0},
        "metrics": {
            "ttft_ms_p50": prompt["time_to_first_token"] * 1000,
            # Of a request as a whole, as NVIDIA's scripts take them where tokens are not timed singly.
            "itl_ms_p50": milliseconds,
            "tpot_ms_p50": milliseconds,
            "throughput_tok_s": generation["median_ts"],
        },
        "warnings": [*_power(prompt), *_told((prompt, generation))],
        "edgert": [prompt, generation],
    }


def _power(row: Row) -> list[str]:
    mode = row["power_mode"]
    if mode and mode.startswith("MAXN"):
        return []
    return [f"nvpmodel is {mode or 'unknown'}; MAXN preferred for comparable results"]


def _told(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(f"{row['test']}: {warning}" for row in rows for warning in row["warnings"]))
