"""The `edgert` command. A verb is a module with ``add_arguments(parser)`` and ``main(args) -> int``, of this
package or of one that builds on it; only the one that is asked for is imported.

Exit codes: 0 done, 1 failure, 2 wrong use, 130 Ctrl-C, 141 the reader of our output went away.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from edgert.errors import EdgertError, UsageError

VERBS = {  # verb -> what it does; its module is edgert.cli.<verb> unless MODULES has another
    "run": "answer one prompt",
    "chat": "talk with a model",
    "pull": "fetch a model into the cache, or list those known by name",
    "export": "make a model's sidecar, a GGUF of a Hugging Face directory, or a directory for ONNX Runtime",
    "heads": "find out which attention heads need the whole past, for sparse attention",
    "bench": "measure a model's speed and memory, beside other engines",
    "eval": "measure what a FlashHead or sparse attention loses against the whole of it",
    "plan": "say what a run will cost in memory and time, and whether it fits",
    "info": "say what a model file is",
    "doctor": "say what this machine can do and what limits it",
}


MODULES = {
    "export": "edgert.export.cli",
    "heads": "edgert.export.heads_cli",
    "bench": "edgert.bench.cli",
    "eval": "edgert.bench.eval",
}


class Parser(argparse.ArgumentParser):
    """Reports mistakes as UsageError, in one line, and takes no abbreviated options."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


class _Version(argparse.Action):
    """--version; reading the installed package's metadata is left until it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import edgert

        print(f"edgert {edgert.__version__}")
        parser.exit()


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="edgert", description="Runs language models on small machines.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    asked = next((a for a in argv if not a.startswith("-")), None)
    for name, text in VERBS.items():
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == asked:
            sub.add_argument(
                "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )
            _module(name).add_arguments(sub)
    args, rest = parser.parse_known_args(argv)
    if args.verb is None:
        parser.error("a verb is missing")
    if rest:  # before Python 3.13 a positional argument that may be left out is none after an option
        at = argv.index(args.verb)
        parser.parse_args(argv[:at])
        known = argparse.Namespace(verb=args.verb, debug=args.debug)
        return verbs.choices[args.verb].parse_intermixed_args(argv[at + 1 :], known)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (None: that of the process) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # replaced by something without an encoding
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        args = _parse(words)
        code: int = _module(args.verb).main(args)
        sys.stdout.flush()
        return code
    except SystemExit as e:  # --help and --version
        return e.code if isinstance(e.code, int) else 0
    except BrokenPipeError:
        # Python flushes stdout once more on its way out; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\nedgert: interrupted", file=sys.stderr)
        return 130
    except Exception as e:
        if debug:
            import traceback

            traceback.print_exc()
        print(f"edgert: error: {_one_line(e)}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1


def _module(verb: str) -> Any:
    return import_module(MODULES.get(verb, f"edgert.cli.{verb}"))


def _one_line(e: Exception) -> str:
    text = " ".join(str(e).split())
    if isinstance(e, EdgertError):
        return text
    if isinstance(e, OSError) and e.strerror:
        return f"{e.strerror}: {e.filename}" if e.filename else e.strerror
    if isinstance(e, MemoryError):
        return "out of memory; use a smaller model or --context, or close other programs"
    return f"{type(e).__name__}: {text}; this is a fault of edgert, --debug shows where"
