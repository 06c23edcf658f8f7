"""Classes of KV heads: what of the past each keeps and reads under sparse attention.

A pattern file is what DuoAttention calls ``full_attention_heads.tsv``: one row a layer, one number a KV head,
tabs between. Below one half a head streams: it keeps and reads the first 16 tokens and a window of the latest
ones. From one half to 1 it keeps everything, and a step reads what its index chooses; above 1 (an addition of
edgert) a step reads all of it. Numbers of layers that have a window or are convolutions mean nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .errors import UsageError
from .locate import find_sidecar

if TYPE_CHECKING:
    from .models import ModelSpec

INDEXED, FULL, STREAMING = range(3)  # HeadClass in native/kv.h
NAMES = ("indexed", "full", "streaming")
SINKS = 16  # first tokens that streaming heads keep: a page
WINDOW = 512  # and the latest ones, unless a sidecar says otherwise
KEEPS = 0.5  # of a pattern file
LARGEST = 1 << 20  # bytes of a pattern file


class HeadClasses(NamedTuple):
    """``window``: latest tokens that streaming heads read. ``classes``: by layer and KV head, an empty row
    for a layer that does not see everything; without rows all heads are indexed."""

    window: int
    classes: list[list[int]]

    def count(self, kind: int) -> int:
        return sum(row.count(kind) for row in self.classes)

    @property
    def digest(self) -> str:
        """Another one for other classes."""
        return hashlib.sha256(repr(tuple(self)).encode()).hexdigest()[:16]


ALL_INDEXED = HeadClasses(0, [])


def seeing_all(spec: ModelSpec) -> list[int]:
    """The layers whose attention sees every position."""
    return [i for i, layer in enumerate(spec.layers) if layer.kind == "attention" and not layer.window]


def check_heads(heads: str | PathLike[str], attention: str) -> None:
    """Raises UsageError for classes where they are of no use."""
    if attention != "sparse" and heads != "none":
        raise UsageError(
            f"classes of heads are for sparse attention: with attention={attention!r} every head keeps every "
            "token; drop heads"
        )


def choose_heads(
    heads: str | PathLike[str], path: str | PathLike[str], spec: ModelSpec, attention: str
) -> HeadClasses:
    """The classes that ``heads`` means for the model at ``path``: "none", those of its "sidecar", or a
    pattern file. Raises UsageError, and ModelFileError for a damaged sidecar."""
    check_heads(heads, attention)
    if heads == "none":
        return ALL_INDEXED
    if heads != "sidecar":
        return classes_of(read_pattern(Path(heads), spec), spec)
    found = find_sidecar(Path(path))
    if found is not None:
        from .sidecar import Sidecar

        classes = Sidecar(found, Path(path)).heads(spec)
        if classes is not None:
            return classes
    raise UsageError(
        f"{path} has no classes of heads in a sidecar: make them with `edgert heads {path}`, give a "
        "pattern file, or use heads='none'"
    )


def classes_of(pattern: Sequence[Sequence[float]], spec: ModelSpec, window: int = WINDOW) -> HeadClasses:
    """The classes that a pattern's numbers mean."""

    def kind(value: float) -> int:
        return STREAMING if value < KEEPS else FULL if value > 1 else INDEXED

    full = set(seeing_all(spec))
    rows = [
        [kind(value) for value in row[: layer.n_kv_heads]] if i in full else []
        for i, (row, layer) in enumerate(zip(pattern, spec.layers, strict=True))
    ]
    return HeadClasses(window, rows)


def read_pattern(path: Path, spec: ModelSpec) -> list[list[float]]:
    """The numbers of a pattern file, by layer and KV head. Raises UsageError when it cannot be read or is not
    of this model's shape."""
    try:
        if path.stat().st_size > LARGEST:
            raise UsageError(f"{path} is too large for a pattern of heads")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the pattern of heads {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = [float(word) for word in line.split()]
        except ValueError:
            raise UsageError(f"{path}: line {number}: expected numbers with tabs between") from None
        if not all(math.isfinite(value) and value >= 0 for value in row):
            raise UsageError(f"{path}: line {number}: expected numbers from 0 on")
        rows.append(row)
    columns = max((layer.n_kv_heads for layer in spec.layers), default=0)
    found = {len(row) for row in rows}
    if len(rows) != spec.n_layers or found != {columns}:
        has = f"{len(rows)} rows of " + " or ".join(map(str, sorted(found) or [0]))
        raise UsageError(
            f"{path}: expected {spec.n_layers} rows (layers) of {columns} numbers (KV heads), found {has}: "
            "it is of another model"
        )
    return rows


def pattern_text(pattern: Sequence[Sequence[float]]) -> str:
    """A pattern file."""
    return "".join("\t".join(f"{value:.6f}" for value in row) + "\n" for row in pattern)
