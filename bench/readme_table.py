"""Writes the newest results between the markers of README.md: ``python -m edgert.bench.readme_table``."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
WHAT = {"decode": "decode at", "prefill": "prefill of", "start": "start to first token, prompt of"}


def table(results: dict[str, Any]) -> str:
    """A short form of the table that ``edgert.bench.compare`` writes: medians only."""
    machine, models = results["machine"], results["models"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores. Medians; `bench/results` has all the samples.",
        "",
        "| model | tokens | edgert | llama.cpp | times faster | of the read bandwidth |",
        "|---|---|---|---|---|---|",
    ]
    for name, section in sorted(models.items()):
        for row in section["rows"]:
            unit, digits = ("s", 2) if row["unit"] == "s" else ("tok/s", 0)
            ours, peer = (statistics.median(v) for v in (row["ours"], row["peers"][row["peer"]]))
            share = f"{statistics.median(row['shares']):.0%}" if row["shares"] else ""
            lines.append(
                f"| {name} | {WHAT[row['what']]} {row['tokens']:,} | {ours:.{digits}f} {unit} "
                f"| {peer:.{digits}f} {unit} | {statistics.median(row['ratios']):.2f} | {share} |"
            )
    return "\n".join(lines)


def insert(readme: str, text: str) -> str:
    """``readme`` with ``text`` between the markers, which it must have once each."""
    head, found, rest = readme.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"expected the lines {BEGIN} and {END}, found only a part of them; put them back")
    return f"{head}{BEGIN}\n{text}\n{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, nargs="?", help="default: the newest of bench/results/*.json")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    args = parser.parse_args()
    found = sorted(Path("bench/results").glob("*.json"), key=lambda path: path.stat().st_mtime)
    source = args.result or (found[-1] if found else None)
    if source is None:
        parser.error("no results in bench/results: run `make bench` first")
    args.readme.write_text(insert(args.readme.read_text(), table(json.loads(source.read_text()))))


if __name__ == "__main__":
    main()
