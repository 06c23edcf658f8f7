"""What `edgert eval attention` found, as Markdown, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgert.bench import plots
from edgert.bench.attention_quality import FULL, TIMED, Quality, Text

from edgert.errors import UsageError

ALL = "all"


def markdown(facts: dict[str, Any], qualities: Sequence[Quality]) -> str:
    """``facts``: bench/context.py's, ``context``, ``kv`` and ``threads``."""
    lines = [
        "# Sparse attention against full attention",
        "",
        f"`edgert eval attention`: {facts['model']} (SHA-256 {facts['model_sha256'][:12]}…), "
        f"{facts['context']:,} tokens, {facts['kv']} keys and values"
        + (f", {facts['pages_in_memory']:,} pages of 16 tokens in memory" if facts["pages_in_memory"] else "")
        + "".join(f", {count} {name} heads" for name, count in (facts.get("heads") or {}).items())
        + f". {facts['cpu']}, "
        f"{facts['threads']} threads, edgert "
        f"{facts['edgert']} build {facts['edgert_build']} ({facts['edgert_isa']}), {facts['date']}.",
    ]
    if qualities[0].texts:
        lines += ["", *_texts(qualities)]
    if qualities[0].lookups:
        lines += ["", *_lookups(qualities)]
    return "\n".join(lines) + "\n"


def to_dict(qualities: Sequence[Quality]) -> list[dict[str, Any]]:
    """A row for full attention (budget 0) and one for each budget."""
    return [
        {
            "attention": "sparse" if q.budget else "full",
            "budget": q.budget,
            "kv_bytes_per_step": q.kv_bytes,
            "disk_time_hidden": q.hidden,
            "step_seconds": q.step_seconds,
            "text": {source: _text_fields(text) for source, text in _with_all(q.texts, q.text)},
            "lookups": {kind: vars(counts) for kind, counts in _with_all(q.lookups, q.lookup)},
        }
        for q in qualities
    ]


def write_png(qualities: Sequence[Quality], path: Path) -> None:
    """KL and lookups against what a step reads. Raises UsageError for a place that cannot be written."""
    figure = plots.figures().Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    full, *sparse = qualities
    places = [_megabytes(q) for q in sparse]
    for source, _ in _with_all(full.texts, full.text):
        values = [q.texts.get(source) or q.text for q in sparse]
        kl, error = [text.kl for text in values], [text.kl_error for text in values]
        left.errorbar(places, kl, yerr=error, marker="o", capsize=3, label=source)
    for kind, counts in _with_all(full.lookups, full.lookup):
        right_answers = [100 * (q.lookups.get(kind) or q.lookup).right / counts.asked for q in sparse]
        (line,) = right.plot(places, right_answers, marker="o", label=kind)
        right.axhline(100 * counts.right / counts.asked, color=line.get_color(), linestyle=":", linewidth=1)
    left.set_yscale("log")
    left.set_title("KL to full attention, nats", fontsize=9)
    right.set_title("lookups answered, % (dotted: full attention)", fontsize=9)
    full_time = f", full attention {_milliseconds(full)}" if full.seconds else ""
    for axis in (left, right):
        axis.set_xlabel(
            f"keys, values and index read a step, MB (full attention {_megabytes(full):.1f});\n"
            f"above: budget and time of a step{full_time}",
            fontsize=8,
        )
        above = axis.secondary_xaxis("top")
        above.set_xticks(places, [f"{q.budget}\n{_milliseconds(q)}" for q in sparse])
        for ticks in (axis, above):
            ticks.tick_params(which="both", labelsize=8)
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


def _megabytes(quality: Quality) -> float:
    return quality.kv_bytes["memory"] / 1e6


def _milliseconds(quality: Quality) -> str:
    return "" if quality.step_seconds is None else f"{1e3 * quality.step_seconds:.2f} ms"


def _disk(quality: Quality, disk: bool) -> list[str]:
    """What a step reads of the disk, and how much of the time that takes is hidden."""
    if not disk:
        return []
    if quality.hidden is None:
        return ["", ""]
    return [f"{quality.kv_bytes['disk'] / 1e6:.2f} MB", f"{quality.hidden:.0%}"]


def _name(quality: Quality) -> str:
    return "full" if quality.budget == FULL else f"sparse {quality.budget}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _texts(qualities: Sequence[Quality]) -> list[str]:
    first = qualities[0]
    disk = any("disk" in quality.kv_bytes for quality in qualities)
    rows = []
    for quality in qualities:
        time, full_time = quality.step_seconds, first.step_seconds
        faster = f"{full_time / time:.2f}" if time and full_time else ""
        beside = [f"{_megabytes(quality):.1f} MB", *_disk(quality, disk), _milliseconds(quality), faster]
        for source, text in _with_all(quality.texts, quality.text):
            kl = agreement = change = ""
            if quality.budget != FULL:
                kl, agreement = f"{text.kl:.4f} ± {text.kl_error:.4f}", f"{text.agreement:.1%}"
                change = f"{text.perplexity_ratio - 1:+.2%}"
            found = [f"{text.positions:,}", kl, agreement, f"{text.perplexity:.3f}", change]
            rows.append([_name(quality), *beside, source, *found])
    return [
        f"What a step reads is of the whole context; its time is the median of steps that took turns, the "
        f"last {TIMED} of each document. KL is of full attention's probabilities from those here, in nats, "
        "with its standard error.",
        "",
        *_table(
            [
                *("attention", "KV a step", *(("from disk", "hidden") if disk else ())),
                *("a step", "times faster", "text", "positions", "KL"),
                *("same likeliest token", "perplexity", "change"),
            ],
            rows,
        ),
    ]


def _lookups(qualities: Sequence[Quality]) -> list[str]:
    kinds = [kind for kind, _ in _with_all(qualities[0].lookups, None)]
    rows = []
    for quality in qualities:
        cells = [f"{c.right} of {c.asked}" for _, c in _with_all(quality.lookups, quality.lookup)]
        whole = quality.lookup
        paired = ["", ""] if quality.budget == FULL else [str(whole.lost), str(whole.gained)]
        rows.append([_name(quality), *cells, *paired])
    return [
        "Lookups answered, with the question stepped through; of all, those that only one of full attention "
        "and this budget answered.",
        "",
        *_table(["attention", *kinds, "only full", "only here"], rows),
    ]
