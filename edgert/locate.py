"""Where files are: the cache, and a model named by its path. Imports little: every start comes by."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
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


SIDECAR_SUFFIX = ".edgert.gguf"


def sidecar_path(base: Path) -> Path:
    """Where the sidecar of ``base`` is written: beside it."""
    return base.with_name(base.name.removesuffix(".gguf") + SIDECAR_SUFFIX)


def find_sidecar(base: Path) -> Path | None:
    """The sidecar beside ``base``, else the one of that name in edgert's cache, else None."""
    beside = sidecar_path(base)
    places = (beside, cache_dir() / "sidecars" / beside.name)
    return next((place for place in places if place.exists()), None)


def model_path(name_or_path: str | os.PathLike[str], progress: Callable[[], Reporter] | None = None) -> Path:
    """:func:`edgert.hub.resolve`, without its imports for a file that is there. ``progress`` makes what is
    told of a download."""
    path = Path(os.fspath(name_or_path))
    if path.suffix == ".gguf" and not str(path).startswith("hf:") and path.is_file():
        return path
    from . import hub

    return hub.resolve(name_or_path, progress() if progress else None)
