"""What can be wrong with a model's description."""

from __future__ import annotations


class UnsupportedArchitecture(ValueError):
    """The model is well formed, but it is of a kind, or uses something, that is not implemented."""


class BadModelMetadata(ValueError):
    """The description of the model is incomplete, contradicts itself or does not fit its tensors."""
