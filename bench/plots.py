"""Plots of a run."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from edgert.cli.figures import check_png, figures
from edgert.errors import UsageError

__all__ = ["check_png", "figures", "svg", "write_png"]

Row = dict[str, Any]
COLOURS = {
    "edgert": "#2b6cb0",
    "onnx": "#2c7a7b",
    "llamacpp": "#c05621",
    "transformers": "#718096",
    "onnxruntime-genai": "#97266d",
}


def write_png(rows: Sequence[Row], path: Path) -> None:
    """Raises UsageError for a place that cannot be written."""
    try:
        _figure(rows).savefig(path, format="png", dpi=150)
    except OSError as error:
        raise UsageError(f"--plot: cannot write {path}: {error.strerror}") from error


def svg(rows: Sequence[Row]) -> str:
    """The same as an ``svg`` element to stand in a page."""
    out = io.StringIO()
    # A fixed salt and no date: the same rows give the same page.
    with import_module("matplotlib").rc_context({"svg.hashsalt": "edgert", "svg.fonttype": "none"}):
        _figure(rows).savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL).strip()


def _figure(rows: Sequence[Row]) -> Any:
    """A line of plots for each test and number of threads: speed with the 5th to 95th percentile, memory."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["test"], row["threads"]), []).append(row)
    height = sum(0.8 + 0.32 * len(group) for group in groups.values())
    figure = figures().Figure(figsize=(11, height + 0.4), layout="constrained")
    axes = figure.subplots(
        len(groups), 2, squeeze=False, height_ratios=[0.8 + 0.32 * len(g) for g in groups.values()]
    )
    for (left, right), ((test, threads), group) in zip(axes, groups.items(), strict=True):
        labels = [row["label"] for row in group]
        colours = [COLOURS.get(row["engine"], "#4a5568") for row in group]
        middle = [row["median_ts"] for row in group]
        below = [row["median_ts"] - row["p5_ts"] for row in group]
        above = [row["p95_ts"] - row["median_ts"] for row in group]
        left.barh(labels, middle, xerr=[below, above], color=colours, ecolor="#1a202c", capsize=3)
        left.set_title(f"{test}, {threads} threads: tok/s, 5th to 95th percentile", fontsize=9)
        right.barh(labels, [row["peak_memory"] / 1e6 for row in group], color=colours)
        right.set_title("peak resident memory, MB", fontsize=9)
        right.set_yticklabels([])
        for axis in (left, right):
            axis.invert_yaxis()
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    return figure
