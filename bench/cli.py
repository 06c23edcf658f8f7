"""`edgert bench`: speed, memory and agreement of a model's heads, beside other engines'; and
`edgert bench compare`, which says what changed between two such runs. Diagnostics go to stderr."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgert.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="name, path of a .gguf file, or hf:owner/repo/file.gguf; or `compare`"
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="after `compare`: two results, A and B")
    parser.add_argument("-p", "--n-prompt", default="512", metavar="N,…", help="prompts to read; 0: none")
    parser.add_argument("-n", "--n-gen", default="128", metavar="N,…", help="tokens to generate; 0: none")
    parser.add_argument("-d", "--n-depth", default="0", metavar="N,…", help="tokens already in the context")
    parser.add_argument("-t", "--threads", metavar="N,…", help="default: one a core")
    parser.add_argument(
        "--head", metavar="NAME,…", help="dense, flash, exact; default: all that the model has"
    )
    parser.add_argument(
        "--kv", default="f16", metavar="TYPE,…", help="of the keys and values, f16 or q8; default: f16"
    )
    parser.add_argument(
        "--attention", default="full", metavar="NAME,…", help="full, sparse, exact; default: full"
    )
    parser.add_argument(
        "--heads",
        default="none",
        metavar="NAME,…",
        help="with sparse attention, which heads stream: sidecar, FILE.tsv or none; default: none",
    )
    parser.add_argument(
        "--peer",
        action="append",
        metavar="NAME,…",
        help="engines to compare with: llamacpp, onnx=DIR (an export, its heads), transformers[=DIR], "
        "onnxruntime-genai=DIR",
    )
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "-o", "--output", default="md", metavar="FORMAT", help="md (default), csv, json, jsonl, html"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw speed and memory")


def main(args: argparse.Namespace) -> int:
    if args.model == "compare":
        return _compare(args)
    if args.files:
        raise UsageError(f"one model at a time: {args.files[0]!r} is one too many")
    # The packages of the harness are imported here, so that --help stays quick.
    from edgert.bench import plots
    from edgert.bench.context import context
    from edgert.bench.int8_head import with_int8_head
    from edgert.bench.request import FORMATS, known, make_request
    from edgert.bench.suite import measure

    from edgert.cli.progress import Bar
    from edgert.locate import model_path

    known("-o", args.output, FORMATS)
    if args.output == "html":
        plots.figures()
    if args.plot:
        plots.check_png(args.plot)
    model = Path(model_path(args.model, Bar))
    rows: list[dict[str, Any]] = []
    try:
        with with_int8_head(make_request(args, model)) as request:
            for row in measure(request, context(model)):
                rows.append(row)
                if args.output == "jsonl":
                    print(json.dumps(row), flush=True)
    finally:  # an error or Ctrl-C loses nothing that was measured
        if rows:
            _print(rows, args.output)
            if args.plot:
                plots.write_png(rows, args.plot)
    return 0


def _print(rows: Sequence[dict[str, Any]], output: str) -> None:
    from edgert.bench import page, table

    if output == "csv":
        print(table.to_csv(rows), end="", flush=True)
    elif output != "jsonl":  # whose rows were printed one by one
        make = {"md": table.markdown, "json": table.to_json, "html": page.page}[output]
        print(make(rows), flush=True)


def _compare(args: argparse.Namespace) -> int:
    from edgert.bench.compare_runs import compare
    from edgert.bench.request import known

    if len(args.files) != 2:
        raise UsageError(f"compare takes two results, A and B: {len(args.files)} given")
    known("-o", args.output, ("md", "json"))
    a, b = map(Path, args.files)
    print(compare(a, b, args.output))
    return 0
