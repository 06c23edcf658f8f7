"""Where keys and values live: in memory while they fit, else partly on the disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError
from .head_classes import INDEXED
from .locate import cache_dir
from .tier import IN_MEMORY, Tier

if TYPE_CHECKING:
    from os import PathLike

    from .planner import Case

PAGE = 16  # tokens
UNSURE = 1 / 32  # of the memory: what a plan may be wrong by, kept free where there is a choice


def check_memory(memory: int | None, engine: str) -> None:
    """Raises UsageError for a limit of memory that makes no sense."""
    if memory is None:
        return
    if isinstance(memory, bool) or not isinstance(memory, int) or memory <= 0:
        raise UsageError(f"memory must be a number of bytes above 0, not {memory!r}")
    if engine == "llamacpp":
        raise UsageError("a limit of memory needs the native engine; drop engine='llamacpp'")


def place(case: Case, context: int, available: int) -> Case:
    """The case with as many pages of keys and values in memory as ``available`` bytes allow, and the others
    on the disk. The case as it is when all fit, and when not even the fewest pages do that a step needs;
    also with full attention, which reads everything at every step."""
    if not case.chosen or case.needed(context) <= available:
        return case
    room = available - int(UNSURE * available)

    def tiered(slots: int) -> Case:
        return replace(case, slots=slots)

    if case.heads.classes and not case.heads.count(INDEXED):
        return case  # no head chooses what it reads
    _, low = case.sizes.tier(context, case.kv, case.chosen, 1, case.heads)
    high = -(-context // PAGE)
    if low > high or tiered(low).needed(context) > room:
        return case
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tiered(middle).needed(context) <= room else (low, middle - 1)
    return tiered(low)


def make_tier(slots: int, directory: str | PathLike[str] | None, limit: int | None) -> Tier:
    """Where keys and values lie: ``slots`` pages (0: all) in memory, the others in a file of at most
    ``limit`` bytes (None: as many as it takes) in ``directory`` (None: one in edgert's cache). Raises
    UsageError for a bad limit."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit <= 0):
        raise UsageError(f"page_limit must be a number of bytes above 0, not {limit!r}")
    if not slots:
        return IN_MEMORY
    place = cache_dir() / "pages" if directory is None else Path(directory)
    return Tier(slots, str(place), IN_MEMORY.disk_bytes if limit is None else limit)
