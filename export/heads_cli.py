"""`edgert heads`: what each KV head of a model keeps under sparse attention, for its sidecar. The report goes
to stdout, progress to stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.cli.figures import check_png
from edgert.cli.options import add_model_arguments
from edgert.cli.progress import Bar, Steps
from edgert.errors import EngineError, UsageError
from edgert.head_classes import INDEXED, NAMES, STREAMING, WINDOW, classes_of, pattern_text, read_pattern
from edgert.locate import model_path, sidecar_path
from edgert.whole_file import write_whole

if TYPE_CHECKING:
    from edgert.export.classify_heads import Verdict
    from edgert.export.gguf_writer import Value
    from edgert.models import ModelSpec

    from edgert import _native


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--stream",
        type=float,
        metavar="SHARE",
        help="share of the heads to stream, from 0 to 1; default: as many as cost little",
    )
    parser.add_argument(
        "--pattern",
        type=Path,
        metavar="FILE.tsv",
        help="take this pattern (DuoAttention's full_attention_heads.tsv) instead of measuring",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.tsv", help="write the pattern there too")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw what was measured as heat maps")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    from edgert import _native
    from edgert.engines import native_spec

    _check(args)
    model = Path(model_path(args.model, Bar))
    file = _native.GgufFile(str(model))
    spec = native_spec(file, file.metadata)
    columns = max(layer.n_kv_heads for layer in spec.layers)
    found: dict[str, Any]
    if args.pattern:
        pattern = _streamed(read_pattern(args.pattern, spec), spec, args.stream)
        found = {"pattern": args.pattern.name}
        rows = []
    else:
        verdict = _measure(file, args)
        pattern = verdict.pattern(spec.n_layers, columns)
        found, rows = verdict.quality(), _rows(verdict)
        if args.plot:
            from edgert.export.head_plot import write_png

            write_png(verdict, args.plot)
    classes = classes_of(pattern, spec)
    target = sidecar_path(model)
    _write(target, model, classes.classes, columns, found)
    if args.output:
        try:
            write_whole(args.output, [pattern_text(pattern).encode()])
        except OSError as error:
            raise UsageError(f"-o: cannot write {args.output}: {error.strerror}") from error
    counts = {name: classes.count(kind) for kind, name in enumerate(NAMES)}
    if args.json:
        print(json.dumps({"path": str(target), "window": WINDOW, **counts, **found, "ranking": rows}))
    else:
        _print(target, counts, found, rows)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.stream is not None and not 0 <= args.stream <= 1:
        raise UsageError(f"--stream is a share from 0 to 1, not {args.stream}")
    if args.seed < 0:
        raise UsageError(f"--seed must not be negative: {args.seed}")
    if args.plot and args.pattern:
        raise UsageError("--plot draws what was measured, and with --pattern nothing is: drop one of them")
    if args.output and not args.output.parent.is_dir():
        raise UsageError(f"-o: there is no directory {args.output.parent}")
    if args.plot:
        check_png(args.plot)


def _measure(file: _native.GgufFile, args: argparse.Namespace) -> Verdict:
    try:
        from edgert.export.classify_heads import classify
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise EngineError("classifying heads needs torch: pip install 'edgert[export]'") from error
    return classify(file, args.stream, args.seed, Steps())


def _streamed(pattern: list[list[float]], spec: ModelSpec, share: float | None) -> list[list[float]]:
    """The pattern, or with a ``share`` one in which that share of the heads, the lowest of it, stream."""
    if share is None:
        return pattern
    classes = classes_of(pattern, spec).classes
    places = sorted((pattern[i][h], i, h) for i, row in enumerate(classes) for h in range(len(row)))
    chosen = {(i, h) for _, i, h in places[: round(share * len(places))]}
    return [
        [0.0 if (i, h) in chosen else max(value, 0.5) for h, value in enumerate(row)]
        for i, row in enumerate(pattern)
    ]


def _write(target: Path, model: Path, classes: list[list[int]], columns: int, found: dict[str, Any]) -> None:
    import numpy as np
    from edgert.export.sidecar_writer import write_part

    flat = [kind for row in classes for kind in row + [INDEXED] * (columns - len(row))]
    metadata: dict[str, Value] = {
        "edgert.heads.window": WINDOW,
        "edgert.heads.classes": np.array(flat, np.int32),
        "edgert.heads.quality": json.dumps(found),
    }
    write_part(target, model, "heads", metadata)


def _rows(verdict: Verdict) -> list[dict[str, Any]]:
    return [
        {"class": NAMES[STREAMING if n < verdict.streaming else INDEXED], **asdict(head)}
        for n, head in enumerate(verdict.heads)
    ]


def _print(
    target: Path, counts: dict[str, int], found: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> None:
    if rows:
        print("head   class      KL text  KL answers  induction   echo  needle  (cheapest to stream first)")
    for row in rows:
        print(
            f"{row['layer']}.{row['head']:<4} {row['class']:<10} {row['text']:.5f}     {row['answers']:.5f}"
            f"      {row['induction']:.3f}  {row['echo']:.3f}   {row['needle']:.3f}"
            + (" kept" if row["kept"] else "")
        )
    print(f"{target}: " + ", ".join(f"{count} {name} heads" for name, count in counts.items() if count))
    if "kl_text" in found:
        print(
            f"together the streaming heads cost {found['kl_text']:.4f} nats of KL on held-out text and "
            f"{found['kl_answers']:.4f} on answers, of which {found['right']} of {found['asked']} are right "
            f"(full attention: {found['right_full']})"
        )
    print("--attention sparse --heads sidecar uses them", file=sys.stderr)
