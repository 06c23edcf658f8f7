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
    parser.add_argument("--kv", default="f16", metavar="TYPE,…", help="of the keys and values; default: f16")
    parser.add_argument("--peer", action="append", metavar="NAME,…", help="engines to compare with: llamacpp")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "-o", "--output", default="md", metavar="FORMAT", help="md (default), csv, json, jsonl"
    )


def main(args: argparse.Namespace) -> int:
    if args.files:
        raise UsageError(f"one model at a time: {args.files[0]!r} is one too many")
    # The packages of the harness are imported here, so that --help stays quick.
    from edgert.bench.context import context
    from edgert.bench.request import FORMATS, known, make_request
    from edgert.bench.suite import measure

    from edgert.cli.progress import Bar
    from edgert.locate import model_path

    known("-o", args.output, FORMATS)
    model = Path(model_path(args.model, Bar))
    request = make_request(args, model)
    rows: list[dict[str, Any]] = []
    try:
        for row in measure(request, context(model)):
            rows.append(row)
            if args.output == "jsonl":
                print(json.dumps(row), flush=True)
    finally:  # an error or Ctrl-C loses nothing that was measured
        if rows and args.output != "jsonl":
            _print(rows, args.output)
    return 0


def _print(rows: Sequence[dict[str, Any]], output: str) -> None:
    from edgert.bench import table

    make = {"md": table.markdown, "csv": table.to_csv, "json": table.to_json}[output]
    print(make(rows), end="" if output == "csv" else "\n", flush=True)
