"""Rows as text: a Markdown table, CSV, JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
# Heading -> what stands in its cell. A column that is empty in every row is left out.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "engine": lambda r: str(r["label"]),
    "threads": lambda r: str(r["threads"]),
    "test": lambda r: str(r["test"]),
    "tok/s": lambda r: f"{r['median_ts']:.1f}",
    "± sd": lambda r: _number(r["stddev_ts"], 1),
    "mean": lambda r: f"{r['avg_ts']:.1f}",
    "p5 – p95": lambda r: f"{r['p5_ts']:.1f} – {r['p95_ts']:.1f}",
    "× edgert dense": lambda r: _number(r["times_dense"], 2),
    "× peer": lambda r: _number(r["times_peer"], 2),
    "first token": lambda r: _number(r["time_to_first_token"], 1, 1e3, " ms"),
    "peak memory": lambda r: _number(r["peak_memory"], 0, 1e-6, " MB"),
    "read a token": lambda r: _number(r["bytes_per_token"], 1, 1e-6, " MB"),
    "read rate": lambda r: _number(r["read_bytes_per_second"], 1, 1e-9, " GB/s"),
    "of the bandwidth": lambda r: _number(r["share_of_machine"], 0, 100, " %"),
    "same token": lambda r: _agreement(r),
    "energy a token": lambda r: _number(r["energy_per_token"], 3, 1, " J"),
}


def cells(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Heading -> a cell a row, without the columns that are empty."""
    columns = {name: [cell(row) for row in rows] for name, cell in COLUMNS.items()}
    return {name: column for name, column in columns.items() if any(column)}


def markdown(rows: Sequence[Row]) -> str:
    """The table, a line on what was measured where, and a line for every warning."""
    columns = cells(rows)
    lines = ["| " + " | ".join(columns) + " |"]
    lines.append("|" + "|".join("---" if name in ("engine", "test") else "---:" for name in columns) + "|")
    lines += ["| " + " | ".join(line) + " |" for line in zip(*columns.values(), strict=True)]
    return "\n".join([*lines, "", *notes(rows)])


def notes(rows: Sequence[Row]) -> list[str]:
    """What the reader of a table must know of the run, and its warnings."""
    first = rows[0]
    rates = [r["machine_bytes_per_second"] for r in rows if r["machine_bytes_per_second"]]
    power = ", ".join(
        f"{what} {first[key]}"
        for what, key in (("board", "board"), ("power mode", "power_mode"), ("governor", "governor"))
        if first[key]
    )
    return [
        f"{first['model']} (SHA-256 {first['model_sha256'][:12]}…), edgert {first['edgert']} build "
        f"{first['edgert_build']} ({first['edgert_isa']}), {first['date']}.",
        f"{first['cpu']}, {first['cores']} cores, {first['memory'] / 2**30:.0f} GiB, {first['kernel']}"
        + (f", {power}" if power else "")
        + (f"; it read {min(rates) / 1e9:.1f} to {max(rates) / 1e9:.1f} GB/s." if rates else "."),
        *(f"**Warning:** {warning}." for warning in warnings(rows)),
    ]


def warnings(rows: Sequence[Row]) -> list[str]:
    """Every warning once, with the test it belongs to."""
    named = (f"{r['test']}, {r['threads']} threads: {warning}" for r in rows for warning in r["warnings"])
    return list(dict.fromkeys(named))


def to_json(rows: Sequence[Row]) -> str:
    return json.dumps(list(rows), indent=1)


def to_csv(rows: Sequence[Row]) -> str:
    """One column a field, in the order of the rows' fields; lists and mappings as JSON."""
    fields = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, fields, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()})
    return out.getvalue()


def _number(value: float | None, digits: int, factor: float = 1, unit: str = "") -> str:
    return "" if value is None else f"{value * factor:.{digits}f}{unit}"


def _agreement(row: Row) -> str:
    if row["agreement"] is None:
        return ""
    return f"{row['same']}/{row['compared']} as {row['reference']}"
