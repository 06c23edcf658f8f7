"""`edgert pull`: fetch a model into the cache."""

from __future__ import annotations

import argparse

from edgert.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a known name, or hf:owner/repo/file.gguf")
    parser.add_argument("--list", action="store_true", help="show the models known by name")


def main(args: argparse.Namespace) -> int:
    from edgert import hub
    from edgert.cli.progress import Bar

    if args.list:
        if args.model is not None:
            raise UsageError("--list takes no model name")
        return _list()
    if args.model is None:
        raise UsageError("no model named; `edgert pull --list` shows those known")
    print(hub.pull(args.model, Bar()))
    return 0


def _list() -> int:
    from edgert import hub
    from edgert.download import size_text
    from edgert.models.catalogue import CATALOGUE

    width = max(len(e.name) for e in CATALOGUE)
    for entry in CATALOGUE:
        here = hub.cached_path(entry.name)
        size = size_text(here.stat().st_size if here.exists() else entry.nbytes) if entry.nbytes else ""
        state = "in the cache" if here.exists() else ""
        print(f"{entry.name:<{width}}  {entry.title:<34}  {entry.licence:<27}  {size:>8}  {state}".rstrip())
    return 0
