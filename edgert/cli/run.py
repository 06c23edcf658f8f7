"""`edgert run`: the answer to one prompt on stdout, everything else on stderr."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.cli.options import (
    add_generation_arguments,
    add_model_arguments,
    first_messages,
    generation_options,
    load_model,
)
from edgert.errors import UsageError

if TYPE_CHECKING:
    from edgert.generate import Reply, Stream
    from edgert.model import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the prompt; without it, stdin is read")
    parser.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a file (-: stdin)")
    add_generation_arguments(parser)
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without chat template"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: the N likeliest at each token"
    )


def main(args: argparse.Namespace) -> int:
    options = generation_options(args)
    if args.logprobs is not None:
        if not args.json:
            raise UsageError("--logprobs goes into the JSON output; add --json")
        options["logprobs"] = args.logprobs
    if args.raw and args.system is not None:
        raise UsageError("--system needs the chat template that --raw leaves out; drop one of the two")
    prompt = read_prompt(args)
    with load_model(args) as model:
        stream = _start(model, args, prompt, options)
        return _print_json(model, stream) if args.json else _print_text(model, stream)


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt from the argument, ``--file`` or stdin. Raises UsageError."""
    if args.prompt is not None and args.file is not None:
        raise UsageError("PROMPT and --file were both given; drop one of the two")
    if args.prompt is not None:
        text: str = args.prompt
    elif args.file not in (None, "-"):
        try:
            text = Path(args.file).read_text(encoding="utf-8")
        except OSError as e:
            raise UsageError(f"cannot read the prompt from {args.file}: {e.strerror}") from e
        except UnicodeDecodeError as e:
            raise UsageError(f"{args.file} is not UTF-8 text; convert it first") from e
    else:
        if args.file is None and sys.stdin.isatty():
            raise UsageError(
                'no prompt; try `edgert run MODEL "Why is the sky blue?"`, or `edgert chat MODEL`'
            )
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as e:
            raise UsageError("stdin is not UTF-8 text; convert it first") from e
    if not text.strip():
        raise UsageError("the prompt is empty")
    return text


def _start(model: Model, args: argparse.Namespace, prompt: str, options: dict[str, Any]) -> Stream:
    if args.raw:
        return model.stream(prompt, **options)
    if model.tokenizer.has_chat_template:
        messages = [*first_messages(args.system), {"role": "user", "content": prompt}]
        return model.chat_stream(messages, **options)
    if args.system is not None:
        raise UsageError(f"{args.model} has no chat template (it is a base model); drop --system")
    return model.stream(prompt, **options)


def _print_text(model: Model, stream: Stream) -> int:
    out = sys.stdout
    interrupted = False
    try:
        for piece in stream:
            out.write(piece.text)
            out.flush()
    except KeyboardInterrupt:
        interrupted = True
    reply = stream.reply
    if not reply.text.endswith("\n"):
        out.write("\n")
        out.flush()
    if interrupted:
        raise KeyboardInterrupt
    from edgert.cli.speed import speed_line, speed_report  # after the text: nobody waits for it

    print(speed_line(speed_report(model, reply.stats)), file=sys.stderr)
    return 0


def _print_json(model: Model, stream: Stream) -> int:
    import json

    from edgert.cli.speed import speed_report

    for _ in stream:
        pass
    reply = stream.reply
    result: dict[str, Any] = {
        "text": reply.text,
        "tokens": list(reply.tokens),
        "finish_reason": reply.finish_reason,
        "stop_string": reply.stop_string,
        "stats": speed_report(model, reply.stats),
    }
    if reply.logprobs is not None:
        result["logprobs"] = _logprobs(model, reply)
    print(json.dumps(result, ensure_ascii=False))
    return 0


def _logprobs(model: Model, reply: Reply) -> list[dict[str, Any]]:
    def named(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token,
            "text": model.tokenizer.decode([token], skip_special=False),
            "logprob": logprob,
        }

    return [
        {**named(token, own), "top": [named(t, p) for t, p in best]}
        for token, (own, best) in zip(reply.tokens, reply.logprobs or (), strict=True)
    ]
