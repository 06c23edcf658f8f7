"""The text that `edgert eval attention` scores, long enough for documents of thousands of tokens.

It comes with every Python and is no part of the calibration text (``export/calibration``), on which heads are
made: prose is the English of the language reference (``pydoc_data``), without its grammar, lists and
examples; code is the standard library's own modules. Other versions of Python have slightly other text.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from edgert.errors import UsageError
from edgert.tokenizer import Tokenizer

DOCUMENTS = 2  # of each source
PARAGRAPH = 200  # characters; what is shorter are mostly headings and lists
MODULE = range(4_000, 40_000)  # bytes: no single module fills a document
LONGEST = 400_000  # characters of a source that are looked at
SHORTEST = 256  # tokens


@dataclass(frozen=True)
class Document:
    """Tokens of one sequence; the last of them are scored."""

    source: str
    tokens: list[int]


def make_documents(tokenizer: Tokenizer, length: int, file: Path | None = None) -> list[Document]:
    """At most DOCUMENTS a source, of ``length`` tokens or, where there is less text, one that is shorter: of
    prose and code, or of the text in ``file``. Raises UsageError for text that cannot be read or is too
    short."""
    sources = {"file": _read(file)} if file else {"prose": _prose(), "code": _code()}
    documents = []
    for source, text in sources.items():
        ids = tokenizer.encode(text[: LONGEST + 8 * DOCUMENTS * length])
        if len(ids) < SHORTEST:
            raise UsageError(f"the text has {len(ids)} tokens: give at least {SHORTEST}")
        whole = range(length, min(len(ids), DOCUMENTS * length) + 1, length)
        documents += [Document(source, ids[end - length : end]) for end in whole or [len(ids)]]
    return documents


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the text {file}: {error}") from error


def _prose() -> str:
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise UsageError("this Python comes without pydoc_data, the default prose: give --file") from error
    paragraphs = [
        " ".join(p.split("\n")) for name in sorted(topics) for p in topics[name].split("\n\n") if _is_prose(p)
    ]
    return "\n\n".join(dict.fromkeys(paragraphs))  # topics repeat some


def _is_prose(paragraph: str) -> bool:
    lines = paragraph.strip("\n").split("\n")
    return (
        len(paragraph) >= PARAGRAPH
        and not any(line.startswith((" ", "*", "-", "[")) for line in lines)
        and "::=" not in paragraph
    )


def _code() -> str:
    return "\n\n".join(_modules())


def _modules() -> Iterator[str]:
    left = LONGEST
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        if left > 0 and path.stat().st_size in MODULE:
            text = path.read_text(encoding="utf-8")
            left -= len(text)
            yield text
