"""What the exporters raise."""

from __future__ import annotations

from edgert.errors import EdgertError


class ExportError(EdgertError):
    """An export that cannot be made or written."""
