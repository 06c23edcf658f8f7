"""`edgert export`: makes a model's sidecar. Its figures go to stderr, its result to stdout."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from edgert.cli.options import add_model_arguments
from edgert.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--flash-head", action="store_true", help="cluster the vocabulary head (FlashHead) into the sidecar"
    )
    parser.add_argument(
        "--agreement",
        type=float,
        default=0.995,
        metavar="A",
        help="share of the dense head's tokens to reach on prose, code and chat; default: 0.995",
    )
    parser.add_argument(
        "--calibration", type=Path, nargs="+", default=[], metavar="FILE", help="text of yours to add"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: beside the model")
    parser.add_argument("--cluster-size", type=int, metavar="N", help="tokens a cluster; default: searched")
    parser.add_argument("--probes", type=int, metavar="N", help="clusters scored; default: what reaches A")
    parser.add_argument("--rank", type=int, metavar="N", help="score low-rank rows of this width instead")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")


def main(args: argparse.Namespace) -> int:
    if not args.flash_head:
        raise UsageError("nothing to export; add --flash-head")
    if args.seed < 0:
        raise UsageError(f"--seed must not be negative: {args.seed}")
    from edgert.export.flash_head import Request, export_flash_head

    from edgert.cli.progress import Bar
    from edgert.locate import model_path

    request = Request(args.agreement, args.calibration, args.cluster_size, args.probes, args.rank, args.seed)
    path = model_path(args.model, Bar)
    done = export_flash_head(path, request, args.output, lambda line: print(line, file=sys.stderr), _Steps())
    quality = done.quality
    if args.json:
        import json

        print(json.dumps({"path": str(done.path), **quality}))
    else:
        print(
            f"{done.path}: {quality['bytes_per_token'] / 1e6:.1f} MB a token instead of "
            f"{quality['dense_bytes_per_token'] / 1e6:.1f}, {quality['agreement']:.2%} of dense's tokens"
        )
    return 0


class _Steps:
    """A line on stderr for each step of the work, with its percentage on a terminal."""

    def __call__(self, what: str, total: int) -> Callable[[int], None]:
        began, done, shown = time.monotonic(), 0, 0.0
        terminal = sys.stderr.isatty()

        def progress(n: int) -> None:
            nonlocal done, shown
            done += n
            now = time.monotonic()
            whole = done >= total
            if terminal and (whole or now - shown > 0.1):
                shown = now
                end = "\n" if whole else ""
                print(
                    f"\r\x1b[Kedgert: {what}: {min(1, done / total):.0%}, {now - began:.0f} s",
                    end=end,
                    file=sys.stderr,
                    flush=True,
                )
            elif whole and not terminal:
                print(f"edgert: {what}: {now - began:.1f} s", file=sys.stderr)

        return progress
