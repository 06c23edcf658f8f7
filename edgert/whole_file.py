"""A file that is written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_whole(path: Path, parts: Iterable[Any]) -> None:
    """Write ``parts`` (buffers of bytes), one after the other. ``path`` is replaced only once all is on the
    disk: an error, Ctrl-C or a crash leaves either the old file or the new one. Raises OSError."""
    temporary = None
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        temporary = None
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # makes the new name itself last
        finally:
            os.close(directory)
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                temporary.unlink()
