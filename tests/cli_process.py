"""Running the `edgert` command as a user does: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

COMMAND = [sys.executable, "-m", "edgert"]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what would steer edgert, plus ``changes``."""
    steering = ("EDGERT_ISA", "EDGERT_CACHE", "HF_ENDPOINT", "HF_TOKEN", "PIP_INDEX_URL")
    kept = {key: value for key, value in os.environ.items() if key not in steering}
    return {**kept, "no_proxy": "127.0.0.1,localhost", **changes}


def edgert(
    *arguments: object,
    stdin: str = "",
    command: Sequence[str] = COMMAND,
    timeout: float = 120,
    **changes: str,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        env=environment(**changes),
        timeout=timeout,
    )


def start(*arguments: object, **changes: str) -> subprocess.Popen[str]:
    """The command with pipes, in a process group of its own."""
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)], text=True, env=environment(**changes), **options
    )
