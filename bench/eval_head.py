"""`edgert eval head`: a model's FlashHead against its dense head, on text."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from edgert.bench.text import prose

from edgert import _native
from edgert.cli.options import add_model_arguments
from edgert.engines.native import NativeEngine
from edgert.errors import UsageError
from edgert.model import Model, load

Row = npt.NDArray[np.float32]

TOP = 10
PIECE = 256  # tokens of one sequence
FREE_TOKENS, FREE_PREFIX = 128, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("-f", "--file", type=Path, metavar="FILE", help="your text; default: prose made up")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="of the text; default: 2048")
    parser.add_argument("--sequences", type=int, default=16, metavar="N", help="running free; default: 16")
    parser.add_argument("--probes", type=int, default=0, metavar="N", help="default: the sidecar's")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: one a core")
    parser.add_argument("--kv", default="f16", metavar="TYPE", help="f16 (default) or q8")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    if args.tokens < 2 or args.sequences < 1:
        raise UsageError("--tokens must be at least 2 and --sequences at least 1")
    try:
        text = args.file.read_text(encoding="utf-8") if args.file else prose(args.tokens)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the text {args.file}: {error}") from error
    with load(args.model, head="flash", probes=args.probes, threads=args.threads, kv=args.kv) as model:
        report = evaluate(model, text, args.tokens, args.sequences)
    print(json.dumps(report, indent=1) if args.json else _text(report))
    return 0


def evaluate(model: Model, text: str, tokens: int, sequences: int) -> dict[str, Any]:
    """``model`` is loaded with head "flash". The report's keys are those of :func:`_text`'s lines."""
    ids = model.tokenizer.encode(text)[:tokens]
    if len(ids) < FREE_PREFIX + 2:
        raise UsageError(f"the text has {len(ids)} tokens: give at least {FREE_PREFIX + 2}")
    engine = model.engine
    assert isinstance(engine, NativeEngine)
    report: dict[str, Any] = {
        "model": model.path,
        "head": model.head_note(),
        **_along(engine, ids),
        **_free(model, ids, sequences),
    }
    described = engine.describe()
    body = described["body_bytes_per_step"]
    report["head_bytes"] = described["flash_bytes_per_step"] - body
    report["dense_head_bytes"] = described["weight_bytes_per_step"] - body
    return report


def _along(engine: NativeEngine, ids: list[int]) -> dict[str, Any]:
    """Both heads on every position of the text."""
    model = engine._model
    same: list[bool] = []
    recall, mass, regret = [], [], []
    dense_loss = flash_loss = 0.0
    fallbacks = scored = 0
    for at in range(0, len(ids), PIECE):
        piece = ids[at : at + PIECE]
        cache = _native.Cache(model, len(piece), engine.kv)
        states = model.hidden(cache, np.asarray(piece, np.int32))
        for i, state in enumerate(states):
            dense: Row = model.dense(state[None])[0]
            flash: Row = np.full(len(dense), -np.inf, np.float32)
            sieved, logits = model.flash(state, engine.probes, engine.keep, [])
            flash[sieved] = logits
            top = int(dense.argmax())
            same.append(int(flash.argmax()) == top)
            best = np.argpartition(dense, -TOP)[-TOP:]
            recall.append(float(np.isfinite(flash[best]).mean()))
            known = np.isfinite(flash)
            weights = np.exp(dense.astype(np.float64) - dense[top])
            mass.append(float(weights[known].sum() / weights.sum()))
            regret.append(float(dense[top] - flash.max()))
            if i + 1 < len(piece):
                target, total = piece[i + 1], math.log(weights.sum()) + float(dense[top])
                dense_loss += total - float(dense[target])
                scored += 1
                # A token that was not scored is looked up in the dense head.
                fallbacks += not known[target]
                flash_total = math.log(weights[known].sum()) + float(dense[top]) if known[target] else total
                flash_loss += flash_total - float(dense[target])
    return {
        "positions": len(same),
        "agreement": float(np.mean(same)),
        "recall_top10": float(np.mean(recall)),
        "mass": float(np.mean(mass)),
        "regret_nats": float(np.mean(regret)),
        "perplexity_dense": math.exp(dense_loss / max(scored, 1)),
        "perplexity_flash": math.exp(flash_loss / max(scored, 1)),
        "fallbacks": fallbacks / max(scored, 1),
    }


def _free(model: Model, ids: list[int], sequences: int) -> dict[str, Any]:
    """Greedy continuations of the text's beginnings, each head on its own."""
    lengths = []
    step = max(1, (len(ids) - FREE_PREFIX) // sequences)
    for at in range(0, len(ids) - FREE_PREFIX + 1, step)[:sequences]:
        prompt = ids[at : at + FREE_PREFIX]
        replies = []
        for head in ("dense", "flash"):
            model.head = head
            replies.append(model.generate(prompt, max_tokens=FREE_TOKENS).tokens)
        a, b = replies
        common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        lengths.append((common, a == b))
    return {
        "sequences": len(lengths),
        "identical": sum(same for _, same in lengths) / len(lengths),
        "common_prefix": float(np.mean([n for n, _ in lengths])),
    }


def _text(r: dict[str, Any]) -> str:
    return "\n".join(
        (
            f"model       {r['model']}",
            f"head        {r['head']}",
            f"bytes       {r['head_bytes'] / 1e6:.1f} MB a token, dense {r['dense_head_bytes'] / 1e6:.1f} MB",
            f"agreement   {r['agreement']:.2%} of {r['positions']} positions have the dense head's token",
            f"recall      {r['recall_top10']:.2%} of the ten likeliest tokens are scored",
            f"mass        {r['mass']:.3%} of the probability is scored",
            f"regret      {r['regret_nats']:.5f} nats between the two choices on average",
            f"free        {r['identical']:.0%} of {r['sequences']} continuations of {FREE_TOKENS} tokens "
            f"are the same; the first {r['common_prefix']:.0f} tokens on average",
            f"perplexity  dense {r['perplexity_dense']:.3f}, flash {r['perplexity_flash']:.3f} with the "
            f"dense head for the {r['fallbacks']:.2%} of tokens that were not scored",
        )
    )
