"""Options that `run` and `chat` share, and the model they load."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any

from edgert.attention import DEFAULT_BUDGET
from edgert.errors import UsageError

if TYPE_CHECKING:
    from edgert.download import Reporter
    from edgert.model import Model

MAX_TOKENS = 512


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="name, path of a .gguf file or of an ONNX export, or hf:owner/repo/file.gguf",
    )


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("loading")
    load.add_argument("--threads", type=int, default=0, metavar="N", help="default: one a core")
    load.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="longest prompt and answer together, in tokens; default: what the model was made for",
    )
    load.add_argument(
        "--engine",
        default="auto",
        metavar="NAME",
        help="auto (default): native for what it knows, onnx for an ONNX export; native, llamacpp or onnx",
    )
    load.add_argument(
        "--provider",
        default="cpu",
        metavar="NAME",
        help="what ONNX Runtime computes on: cpu (default), cuda or tensorrt",
    )
    load.add_argument(
        "--head",
        default="auto",
        metavar="NAME",
        help="auto (default): flash if the model has a sidecar; dense, flash, or exact, "
        "which drafts with flash and gives dense's tokens",
    )
    load.add_argument(
        "--probes", type=int, default=0, metavar="N", help="clusters flash scores; default: the sidecar's"
    )
    load.add_argument(
        "--kv",
        default="f16",
        metavar="TYPE",
        help="type of the keys and values kept: f16 (default), or q8, which halves their memory",
    )

    add_attention(load)
    add_memory(load)

    make = parser.add_argument_group("generation")
    make.add_argument("--system", metavar="TEXT", help="system message that precedes the conversation")
    make.add_argument(
        "--max-tokens", type=int, default=MAX_TOKENS, metavar="N", help=f"default: {MAX_TOKENS}"
    )
    make.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default): always the likeliest token"
    )
    make.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens")
    make.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from this share of probability"
    )
    make.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="drop tokens below this share of the likeliest one",
    )
    make.add_argument("--repeat-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less")
    make.add_argument("--presence-penalty", type=float, default=0.0, metavar="X")
    make.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X")
    make.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    make.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )


def add_memory(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="the most to take, as 512MiB: with sparse or exact attention keys and values that do not fit go "
        "to the disk; default: what is there",
    )
    parser.add_argument(
        "--page-directory", metavar="DIR", help="where they go; default: a directory in edgert's cache"
    )
    parser.add_argument(
        "--page-limit", metavar="SIZE", help="the most they may take there; default: as much as it takes"
    )


def memory_options(args: argparse.Namespace) -> dict[str, Any]:
    """The words of :func:`add_memory` as arguments of :func:`edgert.load`. Raises UsageError."""
    return {
        "memory": None if args.memory is None else parse_size(args.memory),
        "page_directory": args.page_directory,
        "page_limit": None if args.page_limit is None else parse_size(args.page_limit),
    }


def add_attention(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--attention",
        default="full",
        metavar="NAME",
        help="full (default); sparse: a step reads only the past tokens that matter most; or exact, which "
        "drafts with sparse and gives the tokens of full",
    )
    parser.add_argument(
        "--budget",
        type=int,
        default=0,
        metavar="N",
        help="tokens that sparse attention chooses for each KV head; of an ONNX export all that a step sees; "
        f"default: {DEFAULT_BUDGET}",
    )
    add_heads(parser)


def add_heads(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--heads",
        default="none",
        metavar="FILE",
        help="what each KV head keeps under sparse attention: none (default): all choose what they read; "
        "sidecar: as `edgert heads` found; or a pattern file (.tsv)",
    )


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of a request. Raises UsageError, before any model is loaded."""
    from edgert.sampling import make_options

    options = {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repeat_penalty,
        "presence_penalty": args.presence_penalty,
        "frequency_penalty": args.frequency_penalty,
        "seed": args.seed,
        "stop": args.stop,
    }
    make_options(options, vocab_size=2**31)
    if args.context is not None and args.context < 2:
        raise UsageError(f"--context must be at least 2 tokens, not {args.context}")
    return options


_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kMGT", 1)
    for suffix, base in (("B", 1000), ("iB", 1024), ("", 1000))
}


def parse_size(text: str) -> int:
    """Bytes of a size such as 4GiB, 800MB or 1.5G (SI: 1 GB = 10**9, IEC: 1 GiB = 2**30)."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if not match or match[2].lower() not in units or not float(match[1]):
        raise UsageError(f"{text!r} is no size: give a number above 0 with B, kB, MB, GB, KiB, MiB or GiB")
    return int(float(match[1]) * units[match[2].lower()])


def load_model(args: argparse.Namespace) -> Model:
    """Find, fetch if need be, and load the model that ``args`` names."""
    from edgert.locate import model_path, onnx_export
    from edgert.model import load

    path = onnx_export(args.model) or model_path(args.model, _bar)
    terminal = sys.stderr.isatty()
    if terminal:
        print(f"loading {args.model} …", end="", file=sys.stderr, flush=True)
    try:
        model = load(
            path,
            engine=args.engine,
            provider=args.provider,
            threads=args.threads,
            context=args.context,
            kv=args.kv,
            head=args.head,
            probes=args.probes,
            attention=args.attention,
            budget=args.budget,
            heads=args.heads,
            **memory_options(args),
        )
    finally:
        if terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if args.context is None and model.context < model.trained_context and model.engine.name != "onnx":
        print(
            f"edgert: memory allows a context of {model.context} tokens; the model was made for "
            f"{model.trained_context} (see `edgert plan {args.model}`)",
            file=sys.stderr,
        )
    if args.head == "auto" and model.head == "flash":
        print(f"edgert: {model.head_note()}; --head exact gives them all", file=sys.stderr)
    return model


def _bar() -> Reporter:
    from edgert.cli.progress import Bar

    return Bar()


def first_messages(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]
