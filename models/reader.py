"""Typed reading of model descriptions.

A key is read with its type and a default or as required. What nobody has read when the reader is
finished is refused by name, so a key that changes what a model computes is never passed over.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .errors import BadModelMetadata, UnsupportedArchitecture

INT_MAX = 2**31 - 1
FLOAT_MAX = sys.float_info.max


class Reader:
    """Reads ``values[prefix + name]``; a value of None counts as absent.

    Keys that do not start with ``prefix`` are not this reader's business.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = {
            key[len(prefix) :]: value
            for key, value in values.items()
            if key.startswith(prefix) and value is not None
        }
        self._prefix = prefix
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def key(self, name: str) -> str:
        """The full key of ``name``, for messages."""
        return self._prefix + name

    def _get(self, name: str, types: tuple[type, ...], wanted: str, default: Any) -> Any:
        self._read.add(name)
        if name not in self._values:
            if default is None:
                raise BadModelMetadata(f"{self.key(name)} is missing; expected {wanted}")
            return default
        value = self._values[name]
        # bool is a subclass of int in Python but a different type in a file.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise BadModelMetadata(f"{self.key(name)}: expected {wanted}, found {_show(value)}")
        return value

    def integer(self, name: str, default: int | None = None, low: int = 1, high: int = INT_MAX) -> int:
        """An integer in [low, high]; required when ``default`` is None."""
        wanted = f"an integer between {low} and {high}"
        value = self._get(name, (int,), wanted, default)
        if not low <= value <= high:
            raise BadModelMetadata(f"{self.key(name)}: expected {wanted}, found {value}")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number; required when ``default`` is None."""
        value = self._get(name, (int, float), "a number", default)
        # The comparison is one that NaN fails and an integer too large for a float survives.
        if not -FLOAT_MAX <= value <= FLOAT_MAX:
            raise BadModelMetadata(f"{self.key(name)}: expected a finite number, found {_show(value)}")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above zero; required when ``default`` is None."""
        value = self.number(name, default)
        if value <= 0:
            raise BadModelMetadata(f"{self.key(name)}: expected a number above zero, found {value}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        return str(self._get(name, (str,), "a string", default))

    def flag(self, name: str, default: bool | None = None) -> bool:
        return bool(self._get(name, (bool,), "true or false", default))

    def mapping(self, name: str) -> Mapping[str, Any]:
        """A table; empty when absent."""
        value: Mapping[str, Any] = self._get(name, (dict,), "a table", {})
        return value

    def array(self, name: str, item: type, length: int) -> list[Any]:
        """A required array of exactly ``length`` values of type ``item``."""
        wanted = f"an array of {length} values of type {item.__name__}"
        value = self._get(name, (list, tuple), wanted, None)
        if len(value) != length or any(type(v) is not item for v in value):
            raise BadModelMetadata(f"{self.key(name)}: expected {wanted}, found {_show(value)}")
        return list(value)

    def integers(self, name: str) -> list[int]:
        """A required array of integers of any length."""
        value = self._get(name, (list, tuple), "an array of integers", None)
        if any(type(v) is not int for v in value):
            raise BadModelMetadata(f"{self.key(name)}: expected an array of integers, found {_show(value)}")
        return list(value)

    def is_array(self, name: str) -> bool:
        return isinstance(self._values.get(name), (list, tuple))

    def per_layer(self, name: str, n_layers: int, default: int | None = None, low: int = 1) -> list[int]:
        """One integer a layer; the file gives either an array of them or one for all."""
        if not self.is_array(name):
            return [self.integer(name, default, low)] * n_layers
        values = self.array(name, int, n_layers)
        for value in values:
            if not low <= value <= INT_MAX:
                raise BadModelMetadata(
                    f"{self.key(name)}: expected integers between {low} and {INT_MAX}, found {value}"
                )
        return values

    def uniform(self, name: str, n_layers: int, default: int | None = None, low: int = 1) -> int:
        """As :meth:`per_layer`, for what must be the same in every layer."""
        values = self.per_layer(name, n_layers, default, low)
        if len(set(values)) > 1:
            raise UnsupportedArchitecture(
                f"{self.key(name)} differs between layers ({_show(values)}); "
                "only one value for all layers is implemented"
            )
        return values[0]

    def pick(self, *names: str) -> str:
        """Which of several names of the same thing the file uses (the first when it uses none)."""
        present = [name for name in names if name in self._values]
        if len(present) > 1:
            raise BadModelMetadata(
                f"{' and '.join(self.key(n) for n in present)} say the same thing; expected one of them"
            )
        return present[0] if present else names[0]

    def expect(self, name: str, *implemented: Any) -> None:
        """Refuses any value of ``name`` that is not among ``implemented``; absent is fine."""
        self._read.add(name)
        if name in self._values and self._values[name] not in implemented:
            raise UnsupportedArchitecture(
                f"{self.key(name)} = {_show(self._values[name])} is not implemented; "
                f"only {' or '.join(_show(v) for v in implemented)} is"
            )

    def no_effect(self, *names: str) -> None:
        """Accepts keys that change nothing in what the model computes."""
        self._read.update(names)

    def finish(self, no_effect: Collection[str] = ()) -> None:
        """Refuses by name every key that was not read and is not in ``no_effect``."""
        unknown = sorted(set(self._values) - self._read - set(no_effect))
        if unknown:
            found = ", ".join(f"{self.key(name)} = {_show(self._values[name])}" for name in unknown)
            raise UnsupportedArchitecture(f"not implemented: {found}")


def _show(value: Any) -> str:
    """A value for a message, cut to a length a terminal line can hold."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 8:
        head = ", ".join(repr(v) for v in value[:8])
        return f"[{head}, … {len(value)} values]"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
