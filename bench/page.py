"""A run as one HTML page that needs nothing else: table, plots, context, samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from edgert.bench import plots
from edgert.bench.table import cells, warnings

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c }
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e2e8f0; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
svg { max-width: 100%; height: auto }
.warning { background: #fffbeb; border-left: 4px solid #d69e2e; padding: .4rem .8rem }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; font-size: 13px }
dd { margin: 0; overflow-wrap: anywhere }
pre { font-size: 11px; overflow-x: auto }
"""
# Fields of a row that say under what conditions it was measured, in the order of the page.
CONTEXT = (
    "date", "model", "model_sha256", "model_bytes", "edgert", "edgert_build", "edgert_isa", "cpu", "arch",
    "cores", "usable_processors", "memory", "kernel", "governor", "max_clock", "memory_clock", "on_battery",
    "board", "l4t", "power_mode", "temperature_before", "temperature_after", "clock_before", "clock_after",
    "energy_source", "python",
)  # fmt: skip


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Raises EngineError without matplotlib."""
    table = cells(rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in table)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>"
        for line in zip(*table.values(), strict=True)
    )
    title = f"edgert bench: {escape(rows[0]['model'])}"
    facts = "".join(
        f"<dt>{name}</dt><dd>{escape(_plain(rows[0][name]))}</dd>" for name in CONTEXT if rows[0].get(name)
    )
    told = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in warnings(rows))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{told}
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
<h2>Speed and memory</h2>
{plots.svg(rows)}
<h2>Conditions</h2>
<dl>{facts}</dl>
<details><summary>All samples, as <code>-o json</code> has them</summary>
<pre>{escape(json.dumps(list(rows), indent=1))}</pre></details>
</body>
</html>"""


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {of}" for name, of in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
