"""Where keys and values live: in memory while they fit, else partly on the disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from .errors import UsageError
from .locate import cache_dir
from .tier import IN_MEMORY, Tier

if TYPE_CHECKING:
    from os import PathLike

    from .plan_time import Step
    from .planner import Plan
    from .rates import Rates

PAGE = 16  # tokens
UNSURE = 1 / 32  # of the memory: what a plan may be wrong by, kept free where there is a choice


class Placeable(Protocol):
    """What places are found for, a dataclass: a model, and the options that change what it costs. ``chosen``
    are the past tokens that a step sees, ``slots`` the pages of keys and values in memory; 0: all."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def chosen(self) -> int: ...

    @property
    def slots(self) -> int: ...

    def needed(self, context: int) -> int:
        """Bytes at the peak of a process with one session of ``context`` tokens."""
        ...

    def fewest_pages(self, context: int) -> int:
        """That must lie in memory where others are on the disk; 0: none can be there."""
        ...

    def decode(self, rates: Rates, length: int) -> tuple[Step, ...]:
        """The parts of a step with ``length`` tokens in the cache."""
        ...

    def plan_as_placed(
        self,
        context: int,
        rates: Rates,
        available: int,
        limit: str,
        max_context: int,
        regimes: tuple[Regime, ...] = (),
    ) -> Plan:
        """With keys and values where the case has them."""
        ...


AnyCase = TypeVar("AnyCase", bound=Placeable)


def check_memory(memory: int | None, engine: str) -> None:
    """Raises UsageError for a limit of memory that makes no sense."""
    if memory is None:
        return
    if isinstance(memory, bool) or not isinstance(memory, int) or memory <= 0:
        raise UsageError(f"memory must be a number of bytes above 0, not {memory!r}")
    if engine == "llamacpp":
        raise UsageError("a limit of memory needs the native engine; drop engine='llamacpp'")


def place(case: AnyCase, context: int, available: int) -> AnyCase:
    """The case with as many pages of keys and values in memory as ``available`` bytes allow, and the others
    on the disk. The case as it is when all fit, and when not even the fewest pages do that a step needs;
    also with full attention, which reads everything at every step."""
    if not case.chosen or case.needed(context) <= available:
        return case
    room = available - int(UNSURE * available)

    def tiered(slots: int) -> AnyCase:
        return replace(case, slots=slots)

    low, high = case.fewest_pages(context), -(-context // PAGE)
    if not low or low > high or tiered(low).needed(context) > room:
        return case
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tiered(middle).needed(context) <= room else (low, middle - 1)
    return tiered(low)


def longest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n from 2 to ``most`` that fits, 0 when none does; what fits must fit when shorter."""
    if not fits(2):
        return 0
    low, high = 2, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def longest_placed(case: Placeable, most: int, available: int) -> int:
    """The longest context of at most ``most`` tokens that fits with pages on the disk, 0 when none does."""
    return longest(most, lambda n: place(case, n, available).needed(n) <= available)


@dataclass(frozen=True)
class Regime:
    """Where keys and values lie while a sequence has ``start`` to ``end`` tokens: all in memory (``slots``
    0), or as many pages as there are ``slots`` and the others on the disk. ``seconds`` are a step's at
    ``end`` tokens, which reads ``disk_bytes`` from the disk. ``context`` is what the model must be loaded
    with."""

    start: int
    end: int
    slots: int
    context: int
    seconds: float
    disk_bytes: int


def regimes(case: Placeable, context: int, most: int, available: int, rates: Rates) -> tuple[Regime, ...]:
    """What holds at which length, up to ``most`` tokens: of a session of ``context`` tokens first, then of
    longer ones, up to the longest that is not refused. The thresholds are those of SpeContext (arXiv
    2512.00722, algorithm 2) for pages instead of layers, from sizes that are exact: nothing goes to the disk
    while it fits into the slots that the whole context leaves room for, then one page at a time."""
    found: list[Regime] = []

    def add(end: int, slots: int, context: int) -> None:
        start = found[-1].end + 1 if found else 1
        if end < start:
            return
        steps = replace(case, slots=slots).decode(rates, end)
        read = sum(step.bytes for step in steps if step.limit == "disk")
        found.append(Regime(start, end, slots, context, sum(step.seconds for step in steps), read))

    end = longest_placed(case, most, available)
    slots = place(case, context, available).slots if context <= end else 0
    if slots:
        add(min(slots * PAGE, context), 0, context)
        add(context, slots, context)
    else:
        in_memory = longest(end, lambda n: case.needed(n) <= available) if end else 0
        add(in_memory, 0, max(context, in_memory))
    add(end, place(case, end, available).slots if end else 0, end)
    return tuple(found)


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


def plan_session(
    case: Placeable, context: int, most: int, rates: Rates, available: int, limit: str, to_disk: bool
) -> Plan:
    """The plan of a session of ``context`` tokens, of a model made for ``most``. ``to_disk``: keys and values
    that do not fit ``available`` bytes may go to the disk."""
    if not to_disk or not case.chosen:
        fitting = longest(most, lambda n: case.needed(n) <= available)
        return case.plan_as_placed(context, rates, available, limit, fitting)
    fitting, found = longest_placed(case, most, available), regimes(case, context, most, available, rates)
    placed = place(case, context, available)
    return placed.plan_as_placed(context, rates, available, limit, fitting, found)
