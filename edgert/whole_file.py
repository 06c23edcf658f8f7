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
    disk: an error, Ctrl-C or a crash leaves either the old file or the new one, and on Linux nothing else.
    A device or a pipe is written to as it is. Raises OSError."""
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:  # /dev/null stays what it is, also for root
            stream.writelines(parts)
        return
    directory = os.open(path.parent, os.O_RDONLY)
    temporary = None
    try:
        nameless = _open_nameless(path.parent)
        if nameless is None:
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            temporary = Path(name)
        with os.fdopen(descriptor if nameless is None else nameless, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            if nameless is not None:
                # Only a rename takes a name from another file, so there must be one to rename. What a process
                # leaves that is killed between the two calls is removed here by the next one.
                between = path.with_name(f".{path.name}.edgert-new")
                between.unlink(missing_ok=True)
                os.link(
                    f"/proc/self/fd/{nameless}", between, src_dir_fd=directory
                )  # else: of the link itself
                temporary = between
        assert temporary is not None
        temporary.replace(path)
        temporary = None
        os.fsync(directory)  # makes the new name itself last
    finally:
        os.close(directory)
        if temporary:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _open_nameless(directory: Path) -> int | None:
    """A new file that goes with the process, however it ends; None where there are none."""
    if not hasattr(os, "O_TMPFILE") or not Path("/proc/self/fd").exists():
        return None
    try:
        return os.open(directory, os.O_TMPFILE | os.O_WRONLY, 0o600)
    except OSError:  # not every file system knows them
        return None
