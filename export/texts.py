"""The text that heads are fitted to and measured on: ``calibration/*.txt``, one domain a file, and
files of the user's.

Three paragraphs of every four are for fitting, the fourth is held out. ``chat.txt`` has conversations
whose turns begin with "User: " and "Assistant: "; they go through the model's chat template if it has
one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgert.errors import TokenizerError
from edgert.tokenizer import Tokenizer

from .errors import ExportError

FOLDER = Path(__file__).with_name("calibration")
SEQUENCE = 512  # tokens that are run as one text
MAIN = ("prose", "code", "chat")  # held to the agreement asked for; the other files are languages
USER = "user"
_PROMPT = 24  # tokens of a text that a generation continues
_LONGEST = 2000  # characters of a paragraph; longer ones of the user's are cut
_ROLES = {"User": "user", "Assistant": "assistant"}

Tokens = list[int]


@dataclass
class Part:
    """Texts, and beginnings for the model to continue, as token ids."""

    sequences: list[Tokens] = field(default_factory=list)
    prompts: list[Tokens] = field(default_factory=list)


@dataclass
class Domain:
    name: str
    fit: Part
    held: Part


def load_domains(tokenizer: Tokenizer, files: Sequence[Path] = ()) -> list[Domain]:
    """Every packaged domain, prose, code and chat first, then "user" if there are ``files``. Raises
    ExportError for a file that is missing, no UTF-8, or too short."""
    names = sorted(path.stem for path in FOLDER.glob("*.txt"))
    names.sort(key=lambda name: MAIN.index(name) if name in MAIN else len(MAIN))
    domains = [_domain(tokenizer, name, (FOLDER / f"{name}.txt").read_text("utf-8")) for name in names]
    if files:
        text = "\n\n".join(_read(path) for path in files)
        domains.append(_domain(tokenizer, USER, text))
        if not domains[-1].held.sequences:
            raise ExportError(
                f"{', '.join(map(str, files))}: too short to be calibration text: it must have at least "
                "4 paragraphs; give more text, or leave --calibration out"
            )
    return domains


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ExportError(
            f"{path}: calibration text must be UTF-8, byte {error.start} is not; convert the file"
        ) from error
    except OSError as error:
        raise ExportError(
            f"{path}: cannot read the calibration text: {error.strerror}; check --calibration"
        ) from error


def _domain(tokenizer: Tokenizer, name: str, text: str) -> Domain:
    paragraphs = [p for p in re.split(r"\n(?:[ \t\r]*\n)+", text.strip("\n")) if p.strip()]
    if name == "chat":
        paragraphs = _conversations(paragraphs)
    pieces = [piece for p in paragraphs for piece in _cut(p)]
    parts = Part(), Part()
    for held, part in enumerate(parts):
        mine = [p for i, p in enumerate(pieces) if (i % 4 == 3) == bool(held)]
        if name == "chat":
            _add_chat(tokenizer, part, mine)
        else:
            _add_text(tokenizer, part, mine)
    return Domain(name, *parts)


def _cut(paragraph: str) -> list[str]:
    """``paragraph``, in pieces at ends of lines or words when it is long."""
    pieces = []
    while len(paragraph) > _LONGEST:
        at = max(paragraph.rfind(mark, _LONGEST // 2, _LONGEST) for mark in "\n ")
        at = at if at > 0 else _LONGEST
        pieces.append(paragraph[:at])
        paragraph = paragraph[at:].lstrip("\n")
    return [*pieces, paragraph]


def _add_text(tokenizer: Tokenizer, part: Part, paragraphs: Sequence[str]) -> None:
    group: list[str] = []
    size = 0
    for i, paragraph in enumerate(paragraphs):
        group.append(paragraph)
        size += len(tokenizer.encode(paragraph, add_special=False))
        if size >= SEQUENCE or i + 1 == len(paragraphs):
            part.sequences.append(tokenizer.encode("\n\n".join(group)))
            group, size = [], 0
    part.prompts = [tokenizer.encode(p)[:_PROMPT] for p in paragraphs]


def _conversations(paragraphs: Sequence[str]) -> list[str]:
    """Paragraphs of chat, those of one conversation joined."""
    joined: list[str] = []
    for paragraph in paragraphs:
        if paragraph.startswith("User: ") or not joined:
            joined.append(paragraph)
        else:
            joined[-1] += "\n\n" + paragraph
    return joined


def _add_chat(tokenizer: Tokenizer, part: Part, conversations: Sequence[str]) -> None:
    for text in conversations:
        turns = re.split(r"^(User|Assistant): ", text, flags=re.MULTILINE)[1:]
        messages = [
            {"role": _ROLES[role], "content": content.strip()}
            for role, content in zip(turns[::2], turns[1::2], strict=True)
        ]
        try:
            part.sequences.append(tokenizer.apply_chat_template(messages, add_generation_prompt=False))
            part.prompts.append(tokenizer.apply_chat_template(messages[:1]))
        except TokenizerError:  # no template, or one that wants other roles
            part.sequences.append(tokenizer.encode(text))
            first = text.find("\nAssistant: ")
            part.prompts.append(tokenizer.encode(text if first < 0 else text[:first] + "\nAssistant:"))
