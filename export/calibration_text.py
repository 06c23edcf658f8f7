"""The text a head is calibrated with and measured on: by domain, one part to fit and one held out.

The domains are the files of ``calibration/``: prose, code, chat and one for each of many languages, all
written for this project. A head that never saw a language misses far more of its tokens, so a user
whose text is of another kind adds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from edgert.errors import UsageError
from edgert.tokenizer import Tokenizer

TEXTS = Path(__file__).parent / "calibration"
HOLD_OUT = 4  # every fourth paragraph is held out


@dataclass(frozen=True)
class Domain:
    """Token ids of the pieces to fit with and of those held out. Each piece is one sequence."""

    name: str
    fit: list[list[int]]
    held: list[list[int]]


def load_domains(tokenizer: Tokenizer, more: Sequence[Path] = ()) -> list[Domain]:
    """The project's domains in the order of their names, then "user" for the files of ``more``. Raises
    UsageError for a file that cannot be read."""
    domains = [_domain(path.stem, _read(path), tokenizer) for path in sorted(TEXTS.glob("*.txt"))]
    if more:
        domains.append(_domain("user", "\n\n".join(_read(path) for path in more), tokenizer))
    return domains


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the calibration text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: convert it first") from error


def _domain(name: str, text: str, tokenizer: Tokenizer) -> Domain:
    paragraphs = [p for p in text.split("\n\n") if p.strip()]
    pieces = _turns(paragraphs, tokenizer) if name == "chat" else [tokenizer.encode(p) for p in paragraphs]
    pieces = [p for p in pieces if len(p) > 1]
    if len(pieces) < 2:
        raise UsageError(f"the calibration text {name!r} has fewer than two paragraphs: give more text")
    held = pieces[HOLD_OUT - 1 :: HOLD_OUT] or pieces[-1:]
    fit = [p for i, p in enumerate(pieces) if i % HOLD_OUT != HOLD_OUT - 1][: len(pieces) - len(held)]
    return Domain(name, fit, held)


def _turns(paragraphs: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """A question and its answer each, in the model's chat template where it has one."""
    pieces = []
    for user, assistant in pairwise(paragraphs):
        if not (user.startswith("User: ") and assistant.startswith("Assistant: ")):
            continue
        question, answer = user.removeprefix("User: "), assistant.removeprefix("Assistant: ")
        if tokenizer.has_chat_template:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            pieces.append(tokenizer.apply_chat_template(messages, add_generation_prompt=False))
        else:
            pieces.append(tokenizer.encode(f"{user}\n\n{assistant}"))
    return pieces
