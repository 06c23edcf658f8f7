"""Every error edgert raises on purpose. A message says what was expected, what was found and what
to change."""

from __future__ import annotations

from collections.abc import Sequence


class EdgertError(Exception):
    """Above all errors of this package."""


class ModelFileError(EdgertError):
    """A model file that cannot be used.

    ``offset`` is the byte where reading stopped (-1 when it is not tied to a place), ``field``
    what was being read there.
    """

    def __init__(self, message: str, path: str = "", offset: int = -1, field: str = "") -> None:
        super().__init__(message)
        self.path, self.offset, self.field = path, offset, field


class SessionFileError(EdgertError):
    """A saved session that cannot be written, read, or used with this model."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class UnsupportedModelError(EdgertError):
    """A well-formed model with something in it that edgert does not implement."""


class PlanError(EdgertError):
    """The run does not fit. ``needed`` and ``available`` are bytes; ``remedies`` are sentences."""

    def __init__(
        self, message: str, needed: int = 0, available: int = 0, remedies: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.needed, self.available, self.remedies = needed, available, tuple(remedies)


class TokenizerError(EdgertError):
    """A tokenizer or chat template that cannot be built or applied."""


class EngineError(EdgertError):
    """The engine was asked for something it cannot do, or failed while doing it."""


class UsageError(EdgertError):
    """An option or argument that makes no sense; the command line exits with 2."""


class DownloadError(EdgertError):
    """A model that could not be fetched, or that arrived damaged."""
