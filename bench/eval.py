"""`edgert eval head` and `edgert eval attention`: approximations, measured against what they stand for."""

from __future__ import annotations

import argparse

from edgert.bench import eval_attention, eval_head

WHAT = {
    "head": (eval_head, "measure how often a FlashHead gives the dense head's tokens"),
    "attention": (eval_attention, "measure what sparse attention loses against full attention"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", title="what is measured", required=True)
    for name, (module, text) in WHAT.items():
        kind = kinds.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        kind.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        module.add_arguments(kind)


def main(args: argparse.Namespace) -> int:
    code: int = WHAT[args.what][0].main(args)
    return code
