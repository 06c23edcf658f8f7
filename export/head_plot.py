"""What was measured of KV heads as heat maps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from edgert.cli.figures import figures
from edgert.errors import UsageError

if TYPE_CHECKING:
    from edgert.export.classify_heads import Verdict

LEAST = 1e-6  # nats: what is less is drawn alike


def write_png(verdict: Verdict, path: Path) -> None:
    """A map for each measure, layers across and KV heads down; streaming heads have a dot. Raises UsageError
    for a place that cannot be written."""
    layers = sorted({head.layer for head in verdict.heads})
    columns = max(head.head for head in verdict.heads) + 1
    maps = {
        "log10 KL of text": [math.log10(max(h.text, LEAST)) for h in verdict.heads],
        "log10 KL of answers": [math.log10(max(h.answers, LEAST)) for h in verdict.heads],
        "induction": [h.induction for h in verdict.heads],
        "echo": [h.echo for h in verdict.heads],
        "needle": [h.needle for h in verdict.heads],
    }
    width, height = 2 + 0.28 * len(layers), 0.9 + 0.28 * columns
    figure = figures().Figure(figsize=(max(width, 6), len(maps) * height), layout="constrained")
    for axis, (title, values) in zip(
        figure.subplots(len(maps), 1, squeeze=False)[:, 0], maps.items(), strict=True
    ):
        grid = [[math.nan] * len(layers) for _ in range(columns)]
        for head, value in zip(verdict.heads, values, strict=True):
            grid[head.head][layers.index(head.layer)] = value
        image = axis.imshow(grid, aspect="auto", cmap="viridis")
        figure.colorbar(image, ax=axis)
        streaming = verdict.heads[: verdict.streaming]
        axis.plot([layers.index(h.layer) for h in streaming], [h.head for h in streaming], "w.", markersize=4)
        axis.set_title(f"{title} (dot: streaming)", fontsize=9)
        axis.set_xticks(range(len(layers)), layers)
        axis.set_yticks(range(columns))
        axis.tick_params(labelsize=7)
    figure.axes[len(maps) - 1].set_xlabel("layer", fontsize=8)
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise UsageError(f"--plot: cannot write {path}: {error.strerror}") from error
