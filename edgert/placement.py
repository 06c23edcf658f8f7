"""Where keys and values live: in memory while they fit, else partly on the disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError
from .locate import cache_dir

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

    _, low = case.sizes.tier(context, case.kv, case.chosen, 1)
    high = -(-context // PAGE)
    if low > high or tiered(low).needed(context) > room:
        return case
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tiered(middle).needed(context) <= room else (low, middle - 1)
    return tiered(low)


def page_directory(directory: str | PathLike[str] | None) -> str:
    """Where the files of pages are made: ``directory``, or one in edgert's cache."""
    return str(cache_dir() / "pages" if directory is None else Path(directory))
