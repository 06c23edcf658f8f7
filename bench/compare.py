"""edgert against llama.cpp on this machine: ``python -m edgert.bench.compare``."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgert.bench import report
from edgert.bench.measure import DECODE_STEPS, LONG, Comparison, Row, say
from edgert.bench.processes import peak_memory, time_start
from edgert.bench.quiet import load_average
from edgert.bench.settings import Setting
from edgert.bench.text import prose
from edgert.platforms.detect import detect

from edgert import _native, hub
from edgert.download import file_sha256
from edgert.errors import EdgertError, EngineError, UsageError
from edgert.tokenizer import Tokenizer

MODELS = ("smollm2-135m", "gemma-3-270m")
# Tokens in the context of a decode step and of a prefill; a model with a vocabulary as large as
# Gemma's shows in two of them what there is to see.
LENGTHS: dict[str, tuple[int, ...]] = {"gemma-3-270m": (128, 2048)}
DEFAULT_LENGTHS = (128, 2048, 8000)
START_TOKENS = 20
PEAK_TOKENS = 2048
LEAST_AGREEMENT = 0.8  # below it the engines do not compute the same thing, and speed means nothing


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m edgert.bench.compare", description=__doc__)
    parser.add_argument("--model", action="append", help="name or file; may be repeated (default: both)")
    parser.add_argument("--quick", action="store_true", help="short contexts, two turns, no result files")
    parser.add_argument("-r", "--repetitions", type=int, default=5, help="turns of each engine (default: 5)")
    parser.add_argument("--only", choices=("decode", "prefill", "start"), help="these rows alone")
    parser.add_argument("--threads", type=int, default=2, help="of both engines (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="default: bench/results")
    args = parser.parse_args(argv)
    if args.repetitions < 1 or args.threads < 1:
        parser.error("-r and --threads must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        for name in args.model or MODELS:
            section, title = measure(name, args), Path(name).name
            print("\n".join(report.render_section(title, section)))
            if not args.quick:
                table = report.write(args.out, machine(), title, section, args.only)
                say(f"written: {table}")
    except EdgertError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    path = hub.resolve(name)
    file = _native.GgufFile(str(path))
    tokenizer = Tokenizer.from_gguf(file.metadata)
    repetitions = 2 if args.quick else args.repetitions
    lengths = LENGTHS.get(name, DEFAULT_LENGTHS)
    if args.quick:
        lengths = (128, 512)
    longest = max(lengths)
    ids = tokenizer.encode(prose(longest + DECODE_STEPS))[: longest + DECODE_STEPS]
    section: dict[str, Any] = {"rows": [], "bandwidth": [], "load_average": load_average()}
    rows: list[Row] = []

    say(f"{name}: {path}")
    if args.only in (None, "start"):
        prompt = text_of(tokenizer, START_TOKENS)
        rows.append(time_start(path, prompt, START_TOKENS, args.threads, repetitions))
    if args.only is None:
        tokens = ids[: min(PEAK_TOKENS, longest)]
        section["peak_tokens"] = len(tokens)
        engines = {
            "edgert": Setting("edgert", str(path)),
            "llama.cpp": Setting("llamacpp", str(path), options={"flash_attn": True}),
        }
        section["peak_memory"] = {
            name: peak_memory(setting, args.threads, tokens) for name, setting in engines.items()
        }
    comparison = Comparison(path, args.threads, ids, longest)
    try:
        section["about"] = about(path, comparison, args.threads)
        answers = comparison.answers()
        section["answers"] = asdict(answers)
        if answers.same < LEAST_AGREEMENT * answers.total:
            raise EngineError(
                f"{name}: only {answers.same} of {answers.total} likeliest tokens are llama.cpp's; "
                "expected nearly all. Run tests/real before timing anything"
            )
        for length in lengths:
            if args.only in (None, "prefill"):
                turns = min(repetitions, 2 if length >= LONG else 3 if length > 1000 else repetitions)
                rows.append(comparison.prefill(length, turns))
            if args.only in (None, "decode"):
                rows.append(comparison.decode(length, repetitions))
    finally:
        comparison.close()
    order = {"decode": 0, "prefill": 1, "start": 2}
    rows.sort(key=lambda row: (order[row.what], row.tokens))
    section["rows"] = [report.row_record(row) for row in rows]
    section["bandwidth"] = [b for row in rows for b in row.bandwidth]
    section["load_average"] = max(section["load_average"], load_average())
    return section


def text_of(tokenizer: Tokenizer, tokens: int) -> str:
    """The beginning of a text that is ``tokens`` long."""
    words = prose(8 * tokens, seed=2).split(" ")
    for n in range(1, len(words)):
        text = " ".join(words[:n])
        if len(tokenizer.encode(text)) >= tokens:
            return text
    raise AssertionError("a word is at least one token")


def about(path: Path, comparison: Comparison, threads: int) -> dict[str, Any]:
    ours, peer = comparison.ours.engine.describe(), comparison.peers[0].engine.describe()
    return {
        "file": path.name,
        "nbytes": path.stat().st_size,
        "sha256": file_sha256(path),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "threads": threads,
        "edgert": version("edgert"),
        "isa": ours["isa"],
        "llama_cpp": peer["version"],
        "llama_cpp_isa": peer["isa"],
        "python": platform.python_version(),
    }


def machine() -> dict[str, Any]:
    found = detect()
    return {
        "cpu": found.cpu.model,
        "cores": found.cpu.cores,
        "features": list(found.cpu.features),
        "memory": found.memory.total,
        "system": found.system,
    }


if __name__ == "__main__":
    sys.exit(main())
