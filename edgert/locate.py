"""Where files are: the cache, and a model named by its path. Imports little: every start comes by."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .download import Reporter


def cache_dir() -> Path:
    """EDGERT_CACHE, else XDG_CACHE_HOME/edgert, else what this system uses for caches. It may not exist."""
    own = os.environ.get("EDGERT_CACHE")
    if own:
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    if xdg and Path(xdg).is_absolute():
        return Path(xdg) / "edgert"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "edgert"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "edgert" / "Cache"
    return Path.home() / ".cache" / "edgert"


def model_path(name_or_path: str | os.PathLike[str], progress: Reporter | None = None) -> Path:
    """:func:`edgert.hub.resolve`, without its imports for a file that is there."""
    path = Path(os.fspath(name_or_path))
    if path.suffix == ".gguf" and not str(path).startswith("hf:") and path.is_file():
        return path
    from . import hub

    return hub.resolve(name_or_path, progress)
