"""`edgert plan`: what a run will cost in memory and time, and what to change when it does not fit."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from edgert.cli.options import add_attention, parse_size

if TYPE_CHECKING:
    from edgert.plan_time import Step
    from edgert.planner import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="name, path of a .gguf file, hf:owner/repo/file.gguf, or directory of an ONNX export",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="prompt and answer together, in tokens; default: what the model was made for",
    )
    parser.add_argument(
        "--platform", metavar="NAME", help="a board, or the path of a platform file; default: this machine"
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="what the process may take, as 4GiB or 800MB; with sparse or exact attention keys and values "
        "that do not fit go to the disk; default: what is there",
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: one a core")
    parser.add_argument("--kv", default="f16", metavar="TYPE", help="type of the keys and values kept")
    parser.add_argument(
        "--head", default="auto", metavar="NAME", help="auto (default), dense, flash or exact"
    )
    parser.add_argument("--probes", type=int, default=0, metavar="N", help="clusters flash scores")
    add_attention(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """0 when the run fits, 1 when it does not."""
    from edgert.planner import plan

    made = plan(
        args.model,
        context=args.context,
        platform=args.platform,
        memory=None if args.memory is None else parse_size(args.memory),
        threads=args.threads,
        kv=args.kv,
        head=args.head,
        probes=args.probes,
        attention=args.attention,
        budget=args.budget,
        heads=args.heads,
    )
    if args.json:
        import json

        print(json.dumps(made.as_dict(), indent=2))
    else:
        _print(made)
    return 0 if made.fits else 1


def _print(made: Plan) -> None:
    from edgert.download import size_text

    name = "".join(c if c.isprintable() else "\ufffd" for c in made.model)
    print(
        f"{name}: {made.context} tokens of context, {made.kv} keys and values, {made.head} head, "
        + _attention(made)
        + f"{made.threads} thread{'s' if made.threads > 1 else ''}"
    )
    print(f"on {made.platform}\n")
    width = max(len(part.name) for part in made.memory) + 2

    def row(label: str, size: str, note: str = "") -> None:
        print(f"  {label:<{width}}{size:>10}  {note}".rstrip())

    print("memory")
    for part in made.memory:
        row(part.name, size_text(part.bytes), part.note)
    row("total", size_text(made.needed), f"of {size_text(max(made.available, 0))} that {made.limit} leaves")
    if made.max_context:
        what = " (what it was made for)" if made.max_context == made.trained_context else ""
        print(f"  the longest context that fits is {made.max_context} tokens{what}")
    else:
        print("  no context fits")
    _print_regimes(made)
    _print_time(f"a token at {made.context} tokens of context", made.decode, 1)
    _print_time(f"a prompt of {made.context} tokens", made.prefill, made.context)
    if not made.fits:
        print("\nit does not fit; what would help:")
        for remedy in made.remedies:
            print(f"  - {remedy.text}" + ("" if remedy.enough else ", which is not enough alone"))


def _attention(made: Plan) -> str:
    if made.attention == "exact":
        return f"exact attention, drafts read {made.chosen} tokens, "
    return f"sparse attention to {made.chosen} tokens, " if made.chosen else ""


def _print_regimes(made: Plan) -> None:
    if not made.regimes:
        return
    from edgert.download import size_text

    print("\nas the sequence grows")
    for regime in made.regimes:
        where = (
            f"{regime.slots} pages of 16 in memory, the others on the disk"
            if regime.slots
            else "all in memory"
        )
        disk = f", {size_text(regime.disk_bytes)} of it from the disk" if regime.slots else ""
        more = f" (--context {regime.context})" if regime.context > made.context else ""
        print(
            f"  up to {regime.end:>7} tokens  {where}: {_time(regime.seconds)} a token there, "
            f"{1 / regime.seconds:.0f} tok/s{disk}{more}"
        )
    if (end := made.regimes[-1].end) < made.trained_context:
        print(f"  from  {end + 1:>7} tokens  refused")


def _print_time(what: str, steps: tuple[Step, ...], tokens: int) -> None:
    from edgert.download import size_text

    total = sum(step.seconds for step in steps)
    print(f"\n{what}: {_time(total)}, {tokens / total:.0f} tok/s")
    for step in steps:
        read = f"reads {size_text(step.bytes)}, " if step.bytes else ""
        limit = "" if step.limit == "fixed" else f"{read}waits for {step.limit}"
        print(f"  {step.name:<12}{_time(step.seconds):>10}  {step.seconds / total:>4.0%}  {limit}".rstrip())


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.2f} ms"
