"""What `edgert eval attention` found, as tables, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgert.bench import plots
from edgert.bench.attention_quality import FULL, Lookups, Quality, Text
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from edgert.errors import UsageError

ALL = "all"
WIDTH = 100  # columns where there is no terminal


def print_tables(qualities: Sequence[Quality]) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH
    if qualities[0].texts:
        console.print(_texts(qualities))
    if qualities[0].lookups:
        console.print(_lookups(qualities))


def to_dict(qualities: Sequence[Quality]) -> list[dict[str, Any]]:
    """A row for full attention (budget 0) and one for each budget."""
    return [
        {
            "attention": "sparse" if q.budget else "full",
            "budget": q.budget,
            "kv_bytes_per_step": q.kv_bytes,
            "text": {source: _text_fields(text) for source, text in _with_all(q.texts, q.text)},
            "lookups": {kind: vars(counts) for kind, counts in _with_all(q.lookups, q.lookup)},
        }
        for q in qualities
    ]


def write_png(qualities: Sequence[Quality], path: Path) -> None:
    """KL and lookups against the keys and values a step reads. Raises UsageError for a place that cannot be written."""
    figure = plots.figures().Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    sparse = sorted(qualities[1:], key=lambda q: q.kv_bytes)
    for source in [*sparse[0].texts, ALL] if sparse[0].texts else []:
        values = [(q.texts.get(source) or q.text) for q in sparse]
        left.errorbar(
            [q.kv_bytes / 1e6 for q in sparse],
            [text.kl for text in values],
            yerr=[text.kl_error for text in values],
            marker="o",
            capsize=3,
            label=source,
        )
    for kind in [*sparse[0].lookups, ALL] if sparse[0].lookups else []:
        counts = [(q.lookups.get(kind) or q.lookup) for q in [*sparse, qualities[0]]]
        places = [q.kv_bytes / 1e6 for q in [*sparse, qualities[0]]]
        (line,) = right.plot(places[:-1], [100 * c.right / c.asked for c in counts[:-1]], marker="o", label=kind)
        full = 100 * counts[-1].right / counts[-1].asked
        right.axhline(full, color=line.get_color(), linestyle=":", linewidth=1)
    left.set_yscale("log")
    left.set_title("KL to full attention, nats", fontsize=9)
    right.set_title("lookups answered, % (dotted: full attention)", fontsize=9)
    for axis in (left, right):
        axis.set_xlabel("keys, values and index read a step, MB; above: budget", fontsize=8)
        above = axis.secondary_xaxis("top")
        above.set_xticks([q.kv_bytes / 1e6 for q in sparse], [str(q.budget) for q in sparse])
        for ticks in (axis, above):
            ticks.tick_params(labelsize=8)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        axis.spines["right"].set_visible(False)
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise UsageError(f"--plot: cannot write {path}: {error.strerror}") from error


def _with_all(parts: dict[str, Any], whole: Any) -> list[tuple[str, Any]]:
    return [*parts.items(), (ALL, whole)] if parts else []


def _text_fields(text: Text) -> dict[str, float]:
    return {
        "positions": text.positions,
        "kl": text.kl,
        "kl_error": text.kl_error,
        "agreement": text.agreement,
        "perplexity": text.perplexity,
        "perplexity_ratio": text.perplexity_ratio,
    }


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    return table


def _name(quality: Quality) -> str:
    return "full" if quality.budget == FULL else f"sparse {quality.budget}"


def _texts(qualities: Sequence[Quality]) -> Table:
    table = _table(
        "Text, against full attention",
        ("attention", "KV a step", "text", "positions", "KL, nats", "top-1", "perplexity", "change"),
    )
    for quality in qualities:
        first = [_name(quality), f"{quality.kv_bytes / 1e6:.1f} MB"]
        for source, text in _with_all(quality.texts, quality.text):
            cells = ["", "", ""]
            if quality.budget != FULL:
                change = f"{100 * (text.perplexity_ratio - 1):+.2f} %"
                cells = [f"{text.kl:.4f} ± {text.kl_error:.4f}", f"{text.agreement:.2%}", change]
            table.add_row(*first, source, str(text.positions), *cells[:2], f"{text.perplexity:.3f}", cells[2])
            first = ["", ""]
        table.add_section()
    return table


def _lookups(qualities: Sequence[Quality]) -> Table:
    kinds = [kind for kind, _ in _with_all(qualities[0].lookups, None)]
    table = _table("Lookups answered", ("attention", *kinds, "right only in full", "only here"))
    for quality in qualities:
        counts: list[Lookups] = [c for _, c in _with_all(quality.lookups, quality.lookup)]
        cells = [f"{c.right} of {c.asked}" for c in counts]
        paired = ("", "") if quality.budget == FULL else (str(counts[-1].lost), str(counts[-1].gained))
        table.add_row(_name(quality), *cells, *paired)
    return table
