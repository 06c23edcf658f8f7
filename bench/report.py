"""The result files: one JSON object a machine, and the table that is made from it."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgert.bench.measure import Row
from edgert.bench.quiet import DISTURBED


def row_record(row: Row) -> dict[str, Any]:
    """The samples and what the table says of them."""
    return {
        **asdict(row),
        "peer": row.peer,
        "ratios": row.ratios,
        "shares": row.shares,
    }


def write(
    directory: Path, machine: dict[str, Any], model: str, section: dict[str, Any], only: str | None = None
) -> Path:
    """Put ``section`` in the place of the model's older one, or with ``only`` its rows of that kind in the
    place of the older ones; returns the path of the table. Each kind of row is one alternating run."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{machine['cpu']} {machine['cores']} cores".lower()).strip("-")
    directory.mkdir(parents=True, exist_ok=True)
    source, table = directory / f"{name}.json", directory / f"{name}.md"
    results = json.loads(source.read_text()) if source.exists() else {"models": {}}
    results["machine"] = machine
    older = results["models"].get(model)
    if only and older:
        kept = [row for row in older["rows"] if row["what"] != only]
        order = {row["what"]: i for i, row in reversed(list(enumerate(older["rows"])))}
        rows = sorted([*kept, *section["rows"]], key=lambda row: order.get(row["what"], len(order)))
        section = {**older, "rows": rows}
    results["models"][model] = section
    source.write_text(json.dumps(results, indent=1) + "\n")
    table.write_text(render(results))
    return table


def render(results: dict[str, Any]) -> str:
    machine = results["machine"]
    lines = [
        f"# edgert and llama.cpp on {machine['cpu']}",
        "",
        f"{machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB, {machine['system']}. Made by "
        "`python -m edgert.bench.compare`: both engines in one run, in turns; the same file, the same "
        "token ids, the same number of threads. Medians, with the least and the greatest sample in "
        "brackets; ratios are taken turn by turn.",
    ]
    for name, section in sorted(results["models"].items()):
        lines += ["", *render_section(name, section)]
    return "\n".join(lines) + "\n"


def render_section(name: str, section: dict[str, Any]) -> list[str]:
    about = section["about"]
    lines = [
        f"## {name}",
        "",
        f"`{about['file']}`, {about['nbytes'] / 1e6:.1f} MB, SHA-256 `{about['sha256']}`. {about['date']}, "
        f"{about['threads']} threads. edgert {about['edgert']} ({about['isa']}); llama-cpp-python "
        f"{about['llama_cpp']} ({about['llama_cpp_isa']}).",
    ]
    if section["bandwidth"]:
        rates = spread([b / 1e9 for b in section["bandwidth"]], 1)
        lines.append(f"Read bandwidth, measured between the turns of decoding: {rates} GB/s.")
    if "answers" in section:
        a = section["answers"]
        lines.append(
            f"Answers: greedy continuations agree for the first {a['common']} of {a['total']} tokens; along "
            f"llama.cpp's continuation {a['same']} of {a['total']} likeliest tokens are the same."
        )
    if "peak_memory" in section:
        peak = ", ".join(f"{who} {size / 1e6:.0f} MB" for who, size in section["peak_memory"].items())
        lines.append(f"Peak resident memory with {section['peak_tokens']} tokens: {peak}.")
    lines += warnings(section)
    lines += [
        "",
        "| | tokens | edgert | llama.cpp, its better setting | times faster | read a step | read rate "
        "| of the bandwidth | same top token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [render_row(row) for row in section["rows"]]
    return lines


def render_row(row: dict[str, Any]) -> str:
    digits, unit = (3, " s") if row["unit"] == "s" else (1, "")
    peer = row["peers"][row["peer"]]
    setting = row["peer"].removeprefix("llama.cpp, ").removeprefix("llama.cpp")
    cells = [
        {"decode": "decode at", "prefill": "prefill of", "start": "start, prompt of"}[row["what"]],
        f"{row['tokens']:,}",
        spread(row["ours"], digits) + unit,
        spread(peer, digits) + unit + (f", {setting}" if setting else ""),
        spread(row["ratios"], 2),
        f"{row['step_bytes'] / 1e6:.1f} MB" if row["step_bytes"] else "",
        f"{statistics.median(row['ours']) * row['step_bytes'] / 1e9:.1f} GB/s" if row["step_bytes"] else "",
        f"{statistics.median(row['shares']):.0%}" if row["shares"] else "",
        f"{row['same']}/{row['compared']}",
    ]
    return "| " + " | ".join(cells) + " |"


def warnings(section: dict[str, Any]) -> list[str]:
    """A sentence for every row during which others used the machine."""
    disturbed = [row for row in section["rows"] if row["others"] > DISTURBED]
    if not disturbed:
        return []
    rows = ", ".join(f"{row['what']} {row['tokens']} ({row['others']:.0%})" for row in disturbed)
    return [
        "",
        f"**The machine was not quiet** (load average {section['load_average']:.1f}): other processes took "
        f"this share of the processors during {rows}. Do not quote these figures; run it again.",
    ]


def spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
