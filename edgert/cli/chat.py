"""`edgert chat`: a conversation in the terminal. Ctrl-C stops the answer, Ctrl-D leaves."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.cli.options import (
    add_generation_arguments,
    add_model_arguments,
    first_messages,
    generation_options,
    load_model,
)
from edgert.errors import EdgertError, UsageError

if TYPE_CHECKING:
    from edgert.generate import Stats, Stream
    from edgert.model import Model

HISTORY_LINES = 1000
COMMANDS = """\
/help         this list
/clear        forget the conversation
/save FILE    write the conversation to FILE
/load FILE    go on with a conversation that /save wrote
/stats        speed and memory of the last answer
Ctrl-C stops an answer, Ctrl-D leaves."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_generation_arguments(parser)


def main(args: argparse.Namespace) -> int:
    options = generation_options(args)
    with load_model(args) as model:
        if not model.tokenizer.has_chat_template:
            raise UsageError(
                f"{args.model} has no chat template (it is a base model); "
                f'let it continue a text with `edgert run {args.model} "..."`'
            )
        terminal = sys.stdin.isatty()
        with _line_editing() if terminal else contextlib.nullcontext():
            if terminal:
                print(f"{args.model}: /help lists commands, Ctrl-D leaves", file=sys.stderr)
            Chat(model, args.system, options).loop(">>> " if terminal else "")
    return 0


class Chat:
    """The conversation so far and the session whose cache holds it."""

    def __init__(self, model: Model, system: str | None, options: dict[str, Any]) -> None:
        self.model, self.options = model, options
        self.opening = first_messages(system)
        self.messages = list(self.opening)
        self.session = model.session()
        self.stats: Stats | None = None

    def loop(self, prompt: str) -> None:
        """Read lines and answer them until the input ends."""
        with self.session:
            while True:
                try:
                    line = input(prompt).strip()
                    if line.startswith("/"):
                        self.command(line)
                    elif line:
                        self.answer(line)
                except EOFError:
                    if prompt:
                        print()
                    return
                except KeyboardInterrupt:
                    print("\n(Ctrl-D leaves)" if prompt else "", file=sys.stderr)
                except EdgertError as e:
                    print(f"edgert: error: {' '.join(str(e).split())}", file=sys.stderr)

    def answer(self, text: str) -> None:
        """One turn. A stopped answer stays in the conversation as far as it came."""
        turn = {"role": "user", "content": text}
        stream = self.session.chat_stream([*self.messages, turn], **self.options)
        with _ctrl_c_cancels(stream):
            for piece in stream:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
        print(flush=True)
        reply = stream.reply
        self.stats = reply.stats
        if reply.text:
            self.messages += [turn, {"role": "assistant", "content": reply.text}]
        if reply.finish_reason == "length":
            print("(stopped: --max-tokens or the context is used up)", file=sys.stderr)

    def command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/save", "/load"):
            if not rest:
                raise UsageError(f"{name} needs a file name")
            if name == "/save":
                save(Path(rest).expanduser(), self.messages)
            else:
                self.messages = load(Path(rest).expanduser())
            print(f"({len(self.messages)} messages)", file=sys.stderr)
        elif name == "/clear":
            self.messages = list(self.opening)
        elif name == "/stats":
            if self.stats is None:
                raise UsageError("/stats tells about the last answer, and there is none yet")
            from edgert.cli.speed import speed_line, speed_report

            print(speed_line(speed_report(self.model, self.stats)), file=sys.stderr)
        elif name == "/help":
            print(COMMANDS, file=sys.stderr)
        else:
            raise UsageError(f"there is no {name}; /help lists the commands")


def save(path: Path, messages: list[dict[str, str]]) -> None:
    """Write ``messages`` as JSON, whole or not at all. Raises EdgertError."""
    from edgert.whole_file import write_whole

    try:
        write_whole(path, [json.dumps({"messages": messages}, ensure_ascii=False, indent=1).encode()])
    except OSError as e:
        raise EdgertError(f"cannot write {path}: {e.strerror}") from e


def load(path: Path) -> list[dict[str, str]]:
    """The messages :func:`save` wrote. Raises UsageError."""
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
        return [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
    except OSError as e:
        raise UsageError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{path} is not a conversation that /save wrote") from e


@contextlib.contextmanager
def _ctrl_c_cancels(stream: Stream) -> Iterator[None]:
    """Ctrl-C ends ``stream`` before its next token instead of raising somewhere inside it."""
    before = signal.signal(signal.SIGINT, lambda *_: stream.cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Arrow keys, and a history kept from one chat to the next, readable by its owner alone."""
    try:
        import readline
    except ImportError:  # some Pythons are built without it
        yield
        return
    from edgert.locate import cache_dir

    path = cache_dir() / "chat_history"
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)
