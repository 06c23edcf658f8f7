"""This machine as the planner sees it: what `edgert doctor` measured here, and which board it is."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EngineError, UsageError
from .locate import cache_dir

if TYPE_CHECKING:
    from .platforms.board import Platform

VERSION = 2  # of the file; raise it when kernels or probes change so much that older figures mislead
# What reading a file raises that `store` did not write.
_NOT_OURS = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
BUSY_BELOW = 0.9  # share of the processors' time that a measurement worth keeping had


@dataclass(frozen=True)
class DiskRead:
    """Bytes a second of random reads of ``request`` bytes with ``depth`` of them in flight."""

    request: int
    depth: int
    rate: float


@dataclass(frozen=True)
class Measured:
    """What the doctor measured. Rates are a second; those a thread are the mean while ``threads`` run.

    ``read``: threads -> bytes that they read together from memory.
    ``matmul``: GGML type -> tokens at once -> weights that a thread handles, each for all these tokens,
    tiles in its L2. Empty where the engine refuses to run, as is ``attend``; ``fp32`` is 0 there.
    ``attend``: :func:`attend_key` -> query heads x positions that a thread attends to in decoding.
    ``fp32``: multiply-adds in float32 of a thread.
    ``disk``: empty when it could not be measured; ``disk_note`` is the sentence that says why, or what
    is special about the figures.
    ``share``: of the processors' time that the measurement was given. Below 1, others were busy.
    """

    read: Mapping[int, float]
    matmul: Mapping[str, Mapping[int, float]]
    attend: Mapping[str, float]
    fp32: float
    disk: tuple[DiskRead, ...]
    disk_note: str
    isa: str
    threads: int
    share: float
    measured: int  # seconds since 1970
    machine: str  # machine_key() of then


def attend_key(kv: str, head_dim: int, group: int) -> str:
    """How ``Measured.attend`` names heads of ``head_dim``, of which ``group`` share keys and values of the
    type ``kv``."""
    return f"{kv} {head_dim}x{group}"


def measured_file() -> Path:
    """Where `edgert doctor` leaves what it measured."""
    return cache_dir() / "machine.json"


def machine_key() -> str:
    """Changes when a measurement of another time no longer tells about this machine."""
    from .platforms.detect import detect_cpu
    from .platforms.state import detect_mode

    cpu, mode = detect_cpu(), detect_mode()
    return f"{cpu.model}, {cpu.usable} of {cpu.logical} processors" + (f", {mode}" if mode else "")


def engine_refuses() -> bool:
    """Whether this machine has no vector kernels and EDGERT_ISA does not ask for those it has."""
    from . import _native

    return _native.isa_levels() == ["scalar"] and not os.environ.get("EDGERT_ISA")


def isa() -> str:
    """The level in use, "scalar" also where the engine refuses to start. Raises EngineError when EDGERT_ISA
    names a level this machine lacks."""
    from . import _native

    return "scalar" if engine_refuses() else _native.isa_selected()


def store(measured: Measured) -> str | None:
    """Keep it for the planner and for later runs; None, or why that was not done."""
    if measured.share < BUSY_BELOW:
        return f"other processes took {1 - measured.share:.0%} of the processors' time"
    from .whole_file import write_whole

    path = measured_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, [json.dumps({"version": VERSION, **asdict(measured)}).encode()])
    except OSError as error:
        return f"{path.parent} cannot be written ({error.strerror})"
    return None


def load_measured() -> Measured | None:
    """What was stored; None when there is nothing, or nothing usable, about this machine as it is now."""
    try:
        content = json.loads(measured_file().read_text(encoding="utf-8"))
        if content.pop("version") != VERSION:
            return None
        measured = _measured(content)
        return measured if (measured.machine, measured.isa) == (machine_key(), isa()) else None
    except (OSError, EngineError, *_NOT_OURS):
        return None


def _measured(content: dict[str, Any]) -> Measured:
    """Raises one of _NOT_OURS for what `store` cannot have written."""

    def rates(table: Mapping[str, Any]) -> dict[int, float]:
        return {int(n): _rate(rate) for n, rate in table.items()}

    measured = Measured(
        read=rates(content["read"]),
        matmul={name: rates(table) for name, table in content["matmul"].items()},
        attend={name: _rate(rate) for name, rate in content["attend"].items()},
        fp32=float(content["fp32"]),
        disk=tuple(DiskRead(int(d["request"]), int(d["depth"]), _rate(d["rate"])) for d in content["disk"]),
        disk_note=str(content["disk_note"]),
        isa=str(content["isa"]),
        threads=int(content["threads"]),
        share=float(content["share"]),
        measured=int(content["measured"]),
        machine=str(content["machine"]),
    )
    if not measured.read or measured.threads < 1:
        raise ValueError("nothing measured")
    return measured


def _rate(value: Any) -> float:
    rate = float(value)
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError("not a rate")
    return rate


def board(name: str | None = None) -> Platform | None:
    """The board of that name, alias or .toml file, in the power mode it boots in; None means this machine,
    in its present power mode where that is one the board's file describes, and gives None when it is none
    that edgert knows. Raises UsageError."""
    from .platforms.fields import PlatformError

    try:
        if name is None:
            from .platforms.recognise import detect_platform

            here = detect_platform()
            return in_mode_if_known(here.platform, here.mode) if here.platform else None
        from .platforms.board_file import load_platform, read_platform

        platform = read_platform(name) if name.endswith(".toml") else load_platform(name)
        return platform.in_mode(platform.default_mode) if platform.default_mode else platform
    except PlatformError as error:
        raise UsageError(str(error)) from error


def in_mode_if_known(platform: Platform, mode: str | None) -> Platform:
    """``platform`` clamped to ``mode``, or as it is when its file does not describe that mode."""
    from .platforms.fields import PlatformError

    try:
        return platform.in_mode(mode) if mode else platform
    except PlatformError:
        return platform
