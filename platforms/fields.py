"""Reading TOML tables strictly: every key is wanted, every quantity has its unit, every figure its source.

A figure is a plain value in a table that has `source`, or `{ value = ..., source = "..." }`. A source
is a key of the file's `[sources]`, or text that begins with "derived: " or "estimate: ".
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
_PREFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z/]+)")
OWN_WORDS = ("derived: ", "estimate: ")  # sources that are no document


class PlatformError(ValueError):
    """A platform that is not known, or a platform file with something wrong in it.

    ``path`` is the file ("" when it is about a name), ``field`` the place in it, as "memory.peak".
    """

    def __init__(self, message: str, path: str = "", field: str = "") -> None:
        where = ": ".join(part for part in (path, field) if part)
        super().__init__(f"{where}: {message}" if where else message)
        self.path, self.field = path, field


def nearest(word: str, known: Iterable[str]) -> str:
    """A clause naming the likeliest of ``known``, "" when none is near."""
    found = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


@dataclass(frozen=True)
class Unit:
    """What a quantity measures: its base unit, an example, and the range that is not absurd."""

    what: str
    base: str
    example: str
    least: float
    most: float

    def __call__(self, value: object) -> int:
        """The quantity in base units. Raises ValueError with what was expected and found."""
        found = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
        factor = _scale(found[2], self.base) if found else None
        if found is None or factor is None:
            raise ValueError(f"expected {self.what} such as {self.example!r}, found {value!r}")
        amount = round(float(found[1]) * factor)
        if not self.least <= amount <= self.most:
            raise ValueError(f"{value!r} is absurd for {self.what}")
        return amount


def _scale(unit: str, base: str) -> int | None:
    prefix = unit[: -len(base)]
    if not unit.endswith(base):
        return None
    return _BINARY.get(prefix) if base[0] == "B" and prefix in _BINARY else _PREFIXES.get(prefix)


SIZE = Unit("a size", "B", "8 GiB", 1, 1 << 42)
RATE = Unit("a rate", "B/s", "25.6 GB/s", 1e4, 1e13)
CLOCK = Unit("a frequency", "Hz", "1.5 GHz", 1e6, 1e10)


def text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected text, found {value!r}")
    return value


def texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a list of text, found {value!r}")
    return tuple(text(item) for item in value)


def flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, found {value!r}")
    return value


def count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"expected a whole number, found {value!r}")
    if not 1 <= value <= 4096:
        raise ValueError(f"{value} is absurd for a count")
    return value


def per_cycle(value: object) -> float:
    """Operations one core finishes in a clock cycle."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a number, found {value!r}")
    if not math.isfinite(value) or not 0 < value <= 65536:
        raise ValueError(f"{value} is absurd for operations in a cycle")
    return float(value)


@dataclass
class Table:
    """One table of a platform file while it is read: values are asked for by key, then `done` refuses
    whatever was not asked for. ``figures`` collects the source of every figure by its place."""

    path: str
    data: Mapping[str, object]
    documents: Mapping[str, str]
    place: str = ""
    source: str | None = None
    figures: dict[str, str] = field(default_factory=dict)
    asked: set[str] = field(default_factory=lambda: {"source"})

    def __post_init__(self) -> None:
        if "source" in self.data:
            self.source = self._resolve(self.data["source"], self.at("source"))

    def at(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def error(self, key: str, message: str) -> PlatformError:
        return PlatformError(message, self.path, self.at(key))

    def value(self, key: str, read: Callable[[object], T]) -> T:
        """A value that is no figure, such as a name."""
        self.asked.add(key)
        if key not in self.data:
            raise self.error(key, "missing")
        return self._read(key, self.data[key], read)

    def figure(self, key: str, read: Callable[[object], T]) -> T:
        self.asked.add(key)
        if key not in self.data:
            raise self.error(key, "missing")
        raw, source = self.data[key], self.source
        if isinstance(raw, dict):
            extra = sorted(set(raw) - {"value", "source"})
            if extra or len(raw) < 2:
                raise self.error(key, "a figure is a value, or { value = ..., source = ... }")
            source = self._resolve(raw["source"], self.at(key))
            raw = raw["value"]
        result = self._read(key, raw, read)
        if source is None:
            raise self.error(key, "no source for this figure, nor for its table")
        self.figures[self.at(key)] = source
        return result

    def has(self, key: str) -> bool:
        self.asked.add(key)
        return key in self.data

    def table(self, key: str) -> Table:
        self.asked.add(key)
        if not isinstance(self.data.get(key), dict):
            raise self.error(key, f"expected a table, found {self.data.get(key, 'nothing')!r}")
        return self._inner(self.at(key), self.data[key])

    def tables(self, key: str, least: int = 0) -> list[Table]:
        self.asked.add(key)
        rows = self.data.get(key, [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise self.error(key, "expected a list of tables")
        if len(rows) < least:
            raise self.error(key, "missing")
        return [self._inner(f"{self.at(key)}[{i}]", row) for i, row in enumerate(rows)]

    def done(self) -> None:
        for key in self.data:
            if key not in self.asked:
                raise self.error(key, f"unknown key{nearest(key, self.asked)}")

    def _inner(self, place: str, data: object) -> Table:
        assert isinstance(data, dict)  # both callers looked
        return Table(self.path, data, self.documents, place, self.source, self.figures)

    def _read(self, key: str, raw: object, read: Callable[[object], T]) -> T:
        try:
            return read(raw)
        except ValueError as error:
            raise self.error(key, str(error)) from None

    def _resolve(self, source: object, place: str) -> str:
        if isinstance(source, str):
            if source in self.documents:
                return self.documents[source]
            if source.startswith(OWN_WORDS) and source.split(": ", 1)[1].strip():
                return source
        raise PlatformError(
            f"source {source!r} is no key of [sources] and begins with neither 'derived: ' nor "
            f"'estimate: '{nearest(str(source), self.documents)}",
            self.path,
            place,
        )
