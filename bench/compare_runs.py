"""`edgert bench compare A B`: how much faster B is than A, where the samples can tell."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from edgert.bench.stats import Ratio, ratio

from edgert.errors import UsageError

Row = dict[str, Any]
# What makes two rows the same measurement.
KEY = ("test", "engine", "head", "variant", "kv", "threads")
# What else must agree for a difference to be that of the programs. Their own versions may well differ.
CONDITIONS = {
    "model_sha256": "another model file",
    "cpu": "another processor",
    "cores": "another number of cores",
    "memory": "another size of memory",
    "board": "another board",
    "power_mode": "another power mode",
    "governor": "another governor",
    "max_clock": "another limit of the clock",
    "memory_clock": "another limit of the memory's clock",
    "on_battery": "another power supply (battery or mains)",
    "kernel": "another kernel",
    "isa": "another instruction set",
    "engine_version": "another version of the engine",
}
NEEDED = {*KEY, "samples_ts", "label"}


@dataclass(frozen=True)
class Pair:
    """A measurement that both files have; ``b``'s rates over ``a``'s."""

    a: Row
    b: Row
    ratio: Ratio


def read(path: Path) -> list[Row]:
    """The rows that `-o json` or `-o jsonl` wrote. Raises UsageError for anything else."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text") from error
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else list(map(json.loads, text.splitlines()))
    except ValueError as error:
        raise UsageError(f"{path} is not what `edgert bench -o json` wrote: {error}") from error
    if not rows:
        raise UsageError(f"{path} has no rows")
    for row in rows:
        missing = NEEDED - row.keys() if isinstance(row, dict) else NEEDED
        if missing or not _rates(row["samples_ts"]):
            what = sorted(missing)[0] if missing else "samples_ts"
            raise UsageError(f"{path} is not what `edgert bench -o json` wrote: a row without {what}")
    return list(rows)


def _rates(samples: Any) -> bool:
    return (
        isinstance(samples, list) and bool(samples) and all(isinstance(s, float) and s > 0 for s in samples)
    )


def pair(a: Sequence[Row], b: Sequence[Row]) -> tuple[list[Pair], list[Row], list[Row]]:
    """Rows of the same measurement, and those that only one side has. What is left over after that is
    paired without regard to threads, so that two runs with other threads can be compared at all."""
    pairs: list[Pair] = []
    left, right = list(a), list(b)
    for key in (KEY, KEY[:-1]):
        for row in list(left):
            match = next((r for r in right if _attention(r) == _attention(row) and _same(key, r, row)), None)
            if match is not None:
                left.remove(row)
                right.remove(match)
                pairs.append(Pair(row, match, ratio(match["samples_ts"], row["samples_ts"])))
    return pairs, left, right


def _same(key: Sequence[str], a: Row, b: Row) -> bool:
    return all(a[k] == b[k] for k in key)


def _attention(row: Row) -> Any:
    return row.get("attention", "full")  # rows written before there was another say nothing


def warnings(pairs: Sequence[Pair]) -> Iterator[str]:
    """What besides the programs may explain a difference, each once."""
    for field, what in CONDITIONS.items():
        for p in pairs:
            before, after = ("unknown" if row.get(field) is None else row[field] for row in (p.a, p.b))
            if before != after:
                yield f"{what}: {before} in A, {after} in B"
    for p in pairs:
        if p.a["threads"] != p.b["threads"]:
            yield f"{_name(p.a)}: {p.a['threads']} threads in A, {p.b['threads']} in B"
        for side, row in (("A", p.a), ("B", p.b)):
            yield from (f"{_name(row)} of {side}: {warning}" for warning in row.get("warnings", ()))


def compare(a: Path, b: Path, output: str) -> str:
    """The comparison as text, in Markdown or JSON. Raises UsageError."""
    pairs, only_a, only_b = pair(read(a), read(b))
    if not pairs:
        raise UsageError(f"{a} and {b} have no test, engine and head in common")
    told = list(dict.fromkeys(warnings(pairs)))
    if output == "json":
        return json.dumps({"rows": [_record(p) for p in pairs], "warnings": told}, indent=1)
    lines = [
        "| engine | threads | test | A tok/s | B tok/s | B / A | 95 % interval | B is |",
        "|---|---:|---|---:|---:|---:|---:|---|",
        *map(_line, pairs),
        "",
    ]
    for side, rows in (("A", only_a), ("B", only_b)):
        lines += [f"Only in {side}: {_name(row)}, {row['threads']} threads." for row in rows]
    lines += [f"**Warning:** {warning}." for warning in told]
    return "\n".join(lines).rstrip()


def _record(p: Pair) -> Row:
    return {
        **{k: p.b[k] for k in KEY},
        "attention": _attention(p.b),
        **asdict(p.ratio),
        "verdict": p.ratio.verdict,
    }


def _line(p: Pair) -> str:
    r, before, after = p.ratio, p.a["threads"], p.b["threads"]
    cells = [
        p.b["label"],
        str(after) if before == after else f"{before} → {after}",
        p.b["test"],
        *(f"{median(row['samples_ts']):.1f}" for row in (p.a, p.b)),
        f"{r.value:.3f}",
        "" if r.low is None or r.high is None else f"{r.low:.3f} – {r.high:.3f}",
        r.verdict,
    ]
    return "| " + " | ".join(cells) + " |"


def _name(row: Row) -> str:
    return f"{row['label']}, {row['test']}"
