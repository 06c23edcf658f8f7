"""Everything that must be equal for two figures to be compared, as plain values for every row."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgert.bench.sensors import ROOT, text
from edgert.platforms.detect import detect
from edgert.platforms.state import detect_clocks, detect_l4t, detect_mode, detect_power

from edgert import _native
from edgert.download import file_sha256
from edgert.locate import cache_dir
from edgert.whole_file import write_whole


def context(model: Path) -> dict[str, Any]:
    """What does not change between the rows of a run. Sizes in bytes."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "model": model.name,
        "model_bytes": model.stat().st_size,
        "model_sha256": model_sha256(model),
        "edgert": version("edgert"),
        "edgert_build": build(),
        "edgert_isa": _native.isa_selected(),
        "python": platform.python_version(),
        **machine(),
    }


def machine(root: Path = ROOT) -> dict[str, Any]:
    """Clocks in Hz; what the machine does not say is None."""
    found, clocks = detect(root), detect_clocks(root)
    return {
        "cpu": found.cpu.model,
        "arch": found.cpu.arch,
        "cores": found.cpu.cores,
        "usable_processors": found.cpu.usable,
        "memory": found.memory.total,
        "kernel": found.system,
        "governor": clocks.governor,
        "max_clock": clocks.cpu_allowed,
        "memory_clock": clocks.memory,
        "on_battery": detect_power(root).on_battery,
        "board": text(root / "proc/device-tree/model") or None,
        "l4t": detect_l4t(root),
        "power_mode": detect_mode(root),
    }


@cache
def build() -> str:
    """Names the compiled core: the beginning of the SHA-256 of its file."""
    return hashlib.sha256(Path(_native.__file__).read_bytes()).hexdigest()[:12]


def model_sha256(path: Path) -> str:
    """Kept in the cache by size and time of change: a large file takes half a minute to read."""
    kept = cache_dir() / "sha256.json"
    status = path.stat()
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        known = dict(json.loads(kept.read_text(encoding="utf-8")))
    if key not in known:
        known[key] = file_sha256(path)
        with contextlib.suppress(OSError):  # a cache that cannot be written is no error
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(kept, [json.dumps(known).encode()])
    return known[key]
