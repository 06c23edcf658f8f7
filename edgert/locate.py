"""Where files are: the cache, and a model named by its path. Imports little: every start comes by."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError

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
    """:func:`edgert.hub.resolve`, without its imports for a file that is there; a directory is the one model
    in it. ``progress`` makes what is told of a download."""
    path = Path(os.fspath(name_or_path))
    if path.suffix == ".gguf" and not str(path).startswith("hf:") and path.is_file():
        return path
    directory = path.expanduser()
    if directory.is_dir():
        from .models.catalogue import find

        if not (isinstance(name_or_path, str) and find(name_or_path)):
            return model_in(directory)
    from . import hub

    return hub.resolve(name_or_path, progress() if progress else None)


def onnx_export(name_or_path: str | os.PathLike[str]) -> Path | None:
    """The directory of an ONNX export that is meant; None for any other model."""
    path = Path(os.fspath(name_or_path)).expanduser()
    if not (path / "model.onnx").exists():
        return None
    from .models.catalogue import find

    return None if isinstance(name_or_path, str) and find(name_or_path) else path


def model_in(directory: Path) -> Path:
    """The one model file in ``directory``, the first part of a split one; sidecars do not count. UsageError
    when there is none or more than one."""
    if (directory / "model.onnx").exists():
        raise UsageError(
            f"{directory} is an ONNX export, which edgert runs and chats with; here give a .gguf file"
        )
    files = [p for p in directory.glob("*.gguf") if not p.name.endswith(SIDECAR_SUFFIX)]
    found = sorted(p for p in files if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", p.name))
    if len(found) == 1:
        return found[0]
    if found:
        hint = f"give the file itself, such as {found[0]}"
    elif (directory / "config.json").exists():
        hint = f"give a .gguf file; `edgert export {directory}` makes one of the model in it"
    else:
        hint = "give a .gguf file; `edgert export DIR` makes one of a Hugging Face model directory"
    raise UsageError(f"{directory} is a directory; {hint}")
