"""What a chat template may cost: a budget of steps, sizes checked before text or lists grow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .chat_text import UserText, joined

# A step is about a microsecond of work (on a fast machine): a call, or 64 characters read or written.
MAX_STEPS = 400_000
MAX_TEXT = 4 * 1024 * 1024  # characters of one string
MAX_DEPTH = 64  # of lists and dicts in one another
_CHARS_A_STEP = 64

# Widths of a format string that are long, come from a value, or hide behind a nested key.
_WIDE_FORMAT = re.compile(r"%\([^()]*\(|%(\([^()]*\))?[^a-zA-Z%]*(\*|\d{4})")


class LimitError(Exception):
    """The template asked for more than it may use."""


class Budget:
    """The steps left for one rendering. Every method raises LimitError when they run out."""

    def __init__(self) -> None:
        self._left = MAX_STEPS
        # By identity: the weight of a container and whether it holds user text. The container is
        # kept so that its identity stays taken; a template cannot change one.
        self._known: dict[int, tuple[Any, int, bool]] = {}

    def spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise LimitError(f"it takes more than {MAX_STEPS} steps")

    def touch(self, value: Any) -> None:
        """Spend what an operation costs that reads a string, or walks the top level of a container."""
        if isinstance(value, str):
            self.spend(1 + len(value) // _CHARS_A_STEP)
        elif isinstance(value, (list, tuple, dict)):
            self.spend(1 + len(value))
        else:
            self.spend(1)

    def walk(self, value: Any) -> bool:
        """Spend what an operation costs that visits all of ``value``: a comparison, a hash. Returns
        whether there is user text in it."""
        weight, user = self._measure(value, MAX_DEPTH)
        self.spend(weight)
        return user

    def _measure(self, value: Any, depth: int) -> tuple[int, bool]:
        if isinstance(value, str):
            return 1 + len(value) // _CHARS_A_STEP, isinstance(value, UserText) and bool(value.spans)
        if not isinstance(value, (list, tuple, dict)):
            return 1, False
        known = self._known.get(id(value))
        if known is None:
            if depth == 0:
                raise LimitError(f"it nests lists deeper than {MAX_DEPTH}")
            self.spend(1 + len(value))
            weight, user = 1, False
            parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            for part in parts:
                part_weight, part_user = self._measure(part, depth - 1)
                # A list that holds another one twice weighs it twice: that is what printing it costs.
                weight += part_weight
                user = user or part_user
            known = self._known[id(value)] = (value, weight, user)
        return known[1], known[2]

    def walk_for_text(self, *values: Any) -> tuple[int, bool]:
        """:meth:`walk` for values about to be turned into text. Returns roughly how many characters that
        makes, and whether there is user text in them."""
        weight, user = self._measure(values, MAX_DEPTH)
        self.room(weight * _CHARS_A_STEP)
        self.spend(weight)
        return weight * _CHARS_A_STEP, user

    def text(self, value: Any) -> str:
        """``str(value)``, within the size limit and with its user text marked."""
        if isinstance(value, str):
            self.touch(value)
            return value
        _, user = self.walk_for_text(value)
        return str(self.settled(str(value), user))

    def room(self, characters: int) -> None:
        """Check a length before it is made."""
        if characters > MAX_TEXT:
            raise LimitError(f"it makes a text longer than {MAX_TEXT} characters")

    def join(self, parts: Iterable[Any], separator: str = "") -> str:
        texts: list[str] = []
        length = 0
        for part in parts:
            texts.append(self.text(part))
            length += len(texts[-1]) + len(separator)
            self.room(length)
        self.spend(length // _CHARS_A_STEP)
        return joined(texts, separator)

    def replace(self, text: str, old: str, new: str, count: int = -1) -> str:
        user = any([self.walk(part) for part in (text, old, new)])
        found = text.count(old) if count < 0 else min(text.count(old), count)
        self.room(len(text) + found * (len(new) - len(old)))
        return str(self.settled(str.replace(text, old, new, count), user))

    def format(self, pattern: str, values: Any) -> str:
        """``pattern % values`` without widths that are long or come from a value."""
        if _WIDE_FORMAT.search(pattern):
            raise LimitError(f"it formats with the width in {pattern[:40]!r}")
        length, user = self.walk_for_text(pattern, values)
        self.room(length + pattern.count("%") * (length + 1000))
        return str(self.settled(str.__mod__(pattern, values), user))

    def settled(self, result: Any, user: bool) -> Any:
        """The result of an operation: paid for, not too large, and if ``user`` text went in, all text
        in it that does not know better marked as the user's."""
        if isinstance(result, str):
            self.room(len(result))
        elif isinstance(result, int) and abs(result) >= 1 << 64:
            raise LimitError("it computes with integers of more than 64 bits")
        self.touch(result)
        if user:
            if type(result) is str:
                return UserText(result)
            if isinstance(result, (list, tuple)):
                return type(result)(UserText(r) if type(r) is str else r for r in result)
        return result


class Counted:
    """The items of a lazy filter, a step each. ``source`` is what the filter reads; filters on
    filters go no deeper than lists do."""

    def __init__(self, items: Iterator[Any], source: Any, budget: Budget) -> None:
        self._items, self._budget = items, budget
        self._depth: int = source._depth + 1 if isinstance(source, Counted) else 1
        if self._depth > MAX_DEPTH:
            raise LimitError(f"it nests filters deeper than {MAX_DEPTH}")

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._budget.spend(1)
        return next(self._items)


def marked(value: Any, depth: int = MAX_DEPTH) -> Any:
    """A copy of a JSON-like value with every string marked as the user's.

    Raises TypeError for values no template could have been written for."""
    if depth == 0:
        raise TypeError(f"lists in one another deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        return UserText(str(value))
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {marked(k, depth - 1): marked(v, depth - 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [marked(v, depth - 1) for v in value]
    raise TypeError(f"a value of type {type(value).__name__}")
