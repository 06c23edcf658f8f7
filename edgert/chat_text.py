"""Strings that remember which of their characters the caller supplied.

A chat template mixes its own text with the user's. Only its own may become control tokens, so
the user's strings travel through the template as :class:`UserText`, which equals the plain string
in everything a template can ask and carries the ranges along.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import SupportsIndex

Spans = tuple[tuple[int, int], ...]


class UserText(str):
    """A string with ``spans``, the sorted ranges of its characters that came from the caller."""

    spans: Spans

    def __new__(cls, text: str, spans: Spans | None = None) -> UserText:
        self = super().__new__(cls, text)
        self.spans = ((0, len(text)),) if spans is None else spans
        return self

    def __str__(self) -> str:
        return self

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._between(start, max(start, stop))
            return UserText(str.__getitem__(self, key))
        at = key.__index__()
        if not -len(self) <= at < len(self):
            raise IndexError("string index out of range")
        at %= len(self)
        return self._between(at, at + 1)

    def strip(self, chars: str | None = None, /) -> str:
        start, stop = len(self) - len(str.lstrip(self, chars)), len(str.rstrip(self, chars))
        return self._between(start, max(start, stop))

    def lstrip(self, chars: str | None = None, /) -> str:
        return self._between(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        return self._between(0, len(str.rstrip(self, chars)))

    def _between(self, start: int, stop: int) -> UserText:
        spans = (
            (max(a, start) - start, min(b, stop) - start) for a, b in self.spans if a < stop and b > start
        )
        return UserText(str.__getitem__(self, slice(start, stop)), tuple(spans))


def joined(parts: Iterable[str], separator: str = "") -> str:
    """``separator.join(parts)`` with the ranges of the parts."""
    texts: list[str] = []
    spans: list[tuple[int, int]] = []
    length = 0
    for part in parts:
        for text in (separator, part) if texts else (part,):
            if isinstance(text, UserText):
                for start, stop in text.spans:
                    if spans and spans[-1][1] == length + start:
                        spans[-1] = (spans[-1][0], length + stop)
                    else:
                        spans.append((length + start, length + stop))
            texts.append(text)
            length += len(text)
    plain = "".join(texts)
    return UserText(plain, tuple(spans)) if spans else plain
