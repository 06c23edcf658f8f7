"""`edgert eval attention`: sparse attention against full attention of the same model, on long text and
lookups.

Prompts are read in full by either, so what is measured are steps: a document is read up to its last
positions, which are then stepped through; a lookup's document is read, its question is stepped through and
answered greedily. That is harder than use, where a question is a prompt and so read in full. The time of a
step is with the dense head.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from edgert.bench import attention_report, plots
from edgert.bench.attention_quality import AttentionQuality, Quality
from edgert.bench.context import context as facts_of
from edgert.bench.eval_texts import make_documents
from edgert.bench.lookups import make_lookups

from edgert import _native
from edgert.attention import LARGEST_BUDGET
from edgert.cli.options import add_heads, add_memory, add_model_arguments, memory_options
from edgert.cli.progress import Steps
from edgert.engines.native import NativeEngine
from edgert.errors import UsageError
from edgert.head_classes import ALL_INDEXED
from edgert.model import Model, load
from edgert.whole_file import write_whole

CONTEXT, SHORTEST = 8000, 1024
BUDGETS = "256,512,1024,2048"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help=f"tokens of the longest sequence; default: {CONTEXT}, or what the model was made for",
    )
    parser.add_argument(
        "--budgets",
        default=BUDGETS,
        metavar="N,…",
        help=f"tokens chosen for each KV head; default: {BUDGETS}",
    )
    parser.add_argument(
        "-f", "--file", type=Path, metavar="FILE", help="your text; default: Python's manual and its library"
    )
    parser.add_argument(
        "--positions", type=int, default=2000, metavar="N", help="of the text to score; default: 2000"
    )
    parser.add_argument("--lookups", type=int, default=100, metavar="N", help="questions; default: 100")
    parser.add_argument("--kv", default="f16", metavar="TYPE", help="f16 (default) or q8")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: one a core")
    add_heads(parser)
    add_memory(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw quality against bytes read")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE.md", help="write the tables there; default: stdout"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    budgets = _budgets(args.budgets)
    if args.positions < 0 or args.lookups < 0 or not args.positions + args.lookups:
        raise UsageError("--positions and --lookups must not be negative, and one of them at least 1")
    if args.context is not None and args.context < SHORTEST:
        raise UsageError(f"--context must be at least {SHORTEST} tokens, not {args.context}")
    if args.plot:
        plots.check_png(args.plot)
    if args.output and not args.output.parent.is_dir():
        raise UsageError(f"-o: there is no directory {args.output.parent}")
    with load(
        args.model,
        engine="native",
        head="dense",
        threads=args.threads,
        kv=args.kv,
        context=args.context,
        attention="sparse",
        budget=max(budgets),
        heads=args.heads,
        **memory_options(args),
    ) as model:
        context = min(args.context or CONTEXT, model.context)
        threads = model.engine.describe()["threads"]
        facts = {**facts_of(Path(model.path)), "context": context, "kv": model.kv, "threads": threads}
        facts["pages_in_memory"] = model.engine.describe().get("pages_in_memory", 0)
        facts["heads"] = model.engine.describe().get("heads")
        qualities = evaluate(model, context, budgets, args.positions, args.lookups, args.file)
    if args.plot:
        attention_report.write_png(qualities, args.plot)
    text = attention_report.markdown(facts, qualities)
    if args.output:
        try:
            write_whole(args.output, [text.encode()])
        except OSError as error:
            raise UsageError(f"-o: cannot write {args.output}: {error.strerror}") from error
    if args.json:
        print(json.dumps({**facts, "rows": attention_report.to_dict(qualities)}, indent=1))
    elif not args.output:
        print(text, end="")
    return 0


def evaluate(
    model: Model,
    context: int,
    budgets: Sequence[int],
    positions: int,
    lookups: int,
    file: Path | None = None,
) -> list[Quality]:
    """Full attention and each budget on sequences of at most ``context`` tokens: at least ``positions`` of
    text (of ``file`` if given) and ``lookups`` questions. ``model`` is loaded with the native engine; its
    head is not used. Raises UsageError for text that cannot be read or is too short."""
    engine = model.engine
    assert isinstance(engine, NativeEngine)
    work = AttentionQuality(
        engine._model, model.tokenizer, context, model.kv, budgets, engine.tier, engine.heads
    )
    sizes = _native.Sizes(_native.GgufFile(model.path), engine.spec.as_dict(), 1)
    for quality in work.qualities:
        heads = engine.heads if quality.budget else ALL_INDEXED
        quality.kv_bytes["memory"] = sizes.kv_step(context, context - 1, model.kv, quality.budget, heads)
    steps = Steps()
    if positions:
        documents = make_documents(model.tokenizer, context, file)
        each = math.ceil(positions / len(documents))
        shortest = min(len(document.tokens) for document in documents)
        if each > shortest // 2:
            raise UsageError(
                f"--positions {positions} are {each} of each document, the shortest of which has {shortest} "
                "tokens, and half of a document is only read: give more text or ask for fewer"
            )
        for document in documents:
            work.score(document, each, steps)
    for series in make_lookups(model.tokenizer, context, lookups) if lookups else []:
        work.ask(series, steps)
    return work.qualities


def _budgets(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and 0 < int(word) <= LARGEST_BUDGET for word in words):
        raise UsageError(
            f"--budgets are numbers from 1 to {LARGEST_BUDGET} with commas between, not {text!r}"
        )
    return sorted({int(word) for word in words})
