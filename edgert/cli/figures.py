"""Figures of matplotlib, which is imported here alone, and the places they are written to."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from edgert.errors import EngineError, UsageError


def figures() -> Any:
    """matplotlib's figures, without a window system. Raises EngineError when it is not installed."""
    try:
        return import_module("matplotlib.figure")
    except ImportError as error:
        raise EngineError(
            "plots need matplotlib, which is not installed: pip install 'edgert[bench]'"
        ) from error


def check_png(path: Path) -> None:
    """Raises, before anything is measured, what :func:`write_png` would raise after it."""
    figures()
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot writes PNG: give a name that ends in .png, not {path.name!r}")
    try:
        with path.open("ab"):
            pass
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        raise UsageError(f"--plot: cannot write {path}: {error.strerror}") from error
