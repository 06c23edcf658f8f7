"""Sparse keys and values for a graph of ONNX Runtime, after SpeContext (arXiv 2512.00722).

The graph sees the slots of its caches, whatever positions they hold (export/onnx_model.py). So its caches may
be small: they hold a *working set* of pages of 16 tokens, one set for all layers, while everything is in a
store in memory or partly on a disk (native/slot_store.h). Shapes never change. Always in the set are the
first page and the last 128 tokens, with what has no index yet (up to 255 more); of the pages between those
that are worth most. A page is worth the votes of the queries of the last step, or nine tenths of what it was
worth before where that is more, as in the native engine's tier. Between two steps the difference alone is
copied.

A pass over several tokens sees everything: where not all of it is in the slots, it gets caches of its own, as
large as the sequence, which are filled from the store and dropped afterwards. The working set's are dropped
before, so that no more memory is taken than full attention's, and filled anew by the next step.

What is in the set depends on the tokens alone, so a store on a disk gives the same ones. The set of the next
step is chosen as soon as a step has voted: pages on the disk are read while its logits are used. The store
keeps float16: a page that left and came back is rounded where the graph's caches are float32.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert import _native
from edgert.engines.onnx_caches import DTYPES, Buffer
from edgert.errors import EngineError, UsageError
from edgert.models import LayerSpec, ModelSpec
from edgert.tier import IN_MEMORY, Tier

PAGE = 16  # tokens
RECENT = 24  # pages at most that have no index and stay
ENTERING = 8  # pages at most that a step lets in
VOTERS = 8  # last tokens of a prompt whose queries vote
FADE = np.float32(0.9)
LEAST_SLOTS = PAGE * (1 + RECENT + ENTERING)
_NONE = -1
_SAVED = struct.Struct("<QQ?")  # pages with an index, places in use, whether any number of pages may enter

Array = npt.NDArray[np.float32]


def full_layers(spec: ModelSpec) -> list[int]:
    """The attention layers that see everything."""
    return [i for i, layer in enumerate(spec.layers) if layer.kind == "attention" and not layer.window]


def check_slots(slots: int) -> None:
    """Raises UsageError for a working set that is too small or is not of whole pages."""
    if slots < LEAST_SLOTS or slots % PAGE:
        raise UsageError(
            f"a working set has a multiple of {PAGE} slots, at least {LEAST_SLOTS}, not {slots}: "
            f"{PAGE * RECENT} recent tokens and the first {PAGE} are always in it"
        )


def _row_bytes(spec: ModelSpec, kv: str) -> int:
    """Of a slot of all caches together."""
    heads = sum(spec.layers[i].n_kv_heads for i in full_layers(spec))
    return 2 * np.dtype(DTYPES[kv]).itemsize * heads * spec.head_dim


def seeing_all(spec: ModelSpec) -> ModelSpec:
    """With those layers alone that see everything."""
    return replace(spec, layers=tuple(spec.layers[i] for i in full_layers(spec)))


class WorkingSet:
    """``slots`` of the caches, of type ``kv``, of one sequence of at most ``context`` positions, and the
    store behind them.

    ``buffers``: the graph's caches at present, of the layers of :func:`full_layers`; they have one slot more,
    :attr:`spare`. ``threads`` count votes. Raises UsageError and EngineError.
    """

    def __init__(
        self,
        runtime: Any,
        spec: ModelSpec,
        kv: str,
        context: int,
        slots: int,
        threads: int,
        tier: Tier = IN_MEMORY,
    ) -> None:
        check_slots(slots)
        self._runtime, self._spec, self._kv, self._layers = runtime, spec, kv, full_layers(spec)
        self._places, self.spare = slots // PAGE, slots
        self._store = _native.SlotStore(seeing_all(spec).as_dict(), context, threads, *tier)
        self._worth = np.zeros(0, np.float32)
        self.copied_pages = 0  # from the store into slots
        self.buffers: dict[str, Buffer] = {}
        self._slots: Any = None  # _native.Slots of these buffers
        self._make(slots + 1)

    def _make(self, slots: int) -> None:
        """Empty caches of ``slots`` slots in place of those that there are, whose memory goes first."""
        spec = self._spec
        self.buffers, self._slots = {}, None
        self._larger = slots > self.spare + 1
        self._pages: list[int] = []  # by place; _NONE: nothing of use
        self._fresh = True  # any number of pages may enter
        self._coming: list[int] | None = None  # pages of the next step, where they are chosen already

        def cache(layer: LayerSpec) -> Buffer:
            shape = 1, layer.n_kv_heads, slots, spec.head_dim
            return Buffer(self._runtime, shape, "cpu", self._kv)

        self.buffers = {f"{c}.{i}": cache(spec.layers[i]) for c in "kv" for i in self._layers}
        keys, values = ([self.buffers[f"{c}.{i}"].read() for i in self._layers] for c in "kv")
        self._slots = _native.Slots(self._store, keys, values)

    @property
    def length(self) -> int:
        return self._store.length

    @property
    def query_width(self) -> int:
        """Floats of the graph's output ``queries`` for a token."""
        return len(self._layers) * self._spec.n_heads * self._spec.head_dim

    @property
    def row_bytes(self) -> int:
        """Of a slot of all caches together."""
        return _row_bytes(self._spec, self._kv)

    @property
    def copied_bytes(self) -> int:
        """Copied from the store into the slots of the working set."""
        return PAGE * self.row_bytes * self.copied_pages

    @property
    def filled(self) -> int:
        """Slots of the working set in use."""
        return min(self._store.length, PAGE * self._places)

    @property
    def nbytes(self) -> int:
        """Of the slots in use and of the store."""
        return self.row_bytes * self.filled + self._store.nbytes

    @property
    def pages(self) -> list[int]:
        """The pages in the slots, sorted."""
        return sorted(page for page in self._pages if page != _NONE)

    @property
    def worth(self) -> Array:
        """Of the pages with an index, [pages]."""
        return self._known_worth(self._store.indexed_pages)

    @property
    def tier(self) -> dict[str, float] | None:
        """What the store's disk tier holds and did; None when all of it is in memory."""
        return self._store.tier

    def step(self) -> int:
        """Makes a slot for one token, with the set of pages that it sees in front of it; returns how many
        slots are filled. Raises EngineError when a page cannot be read; the sequence is what it was then."""
        length = self._store.length
        last = length // PAGE
        self._arrange(self._coming or self._choose(last + 1), last)
        self._fresh, self._coming = False, None
        return (len(self._pages) - 1) * PAGE + length % PAGE

    def whole(self, n: int) -> int:
        """Makes ``buffers`` hold everything, with slots for ``n`` more tokens; returns how many are filled.
        :meth:`back` must follow when these have been appended. Raises EngineError."""
        length, self._coming = self._store.length, None
        pages = _pages(length)
        if _pages(length + n) <= self._places:
            if self._pages[:pages] != list(range(pages)):
                self._arrange(list(range(pages)), pages - 1)
            self._pages = list(range(_pages(length + n)))
            return length
        try:
            self._make(PAGE * _pages(length + n))
            self._store.read(list(range(pages)), self._slots, list(range(pages)))
        except BaseException:
            self.back()
            raise
        return length

    def back(self) -> None:
        """``buffers`` are those of the working set again."""
        if self._larger:
            self._make(self.spare + 1)

    def parts(self, length: int) -> Iterator[tuple[Buffer, tuple[int, ...]]]:
        """What of the buffers :meth:`save` does not have: nothing."""
        return iter(())

    def clear(self) -> None:
        """Forget everything; there is no next token."""
        self.buffers.clear()

    def append(self, first: int, n: int, queries: Array) -> None:
        """The tokens in the ``n`` slots from ``first`` on are the next ones of the sequence. ``queries``: the
        graph's output for the last of them, [rows, …], of which there may be none. Raises EngineError."""
        self._coming = None
        votes = self._store.append(self._slots, first, n, queries if len(queries) else None)
        if n > 1:
            self._fresh = True
        if not len(queries):
            return
        worth = self._known_worth(len(votes))
        self._worth = np.maximum(worth * FADE, votes)
        if n == 1:  # those on the disk are on their way while the token is sampled
            self._coming = self._choose(self._store.length // PAGE + 1)
            self._store.expect(sorted(set(self._coming[:-1]).difference(self._pages)))

    def rewind(self, length: int) -> int:
        """Forgets what comes after ``length`` tokens; returns how many are left. Raises EngineError."""
        kept = self._store.rewind(length)
        left = _pages(kept)
        self._pages = [page if page < left else _NONE for page in self._pages]
        self._worth = self._worth[: self._store.indexed_pages]
        self._fresh, self._coming = True, None
        return kept

    def save(self) -> bytes:
        """Of the sequence, the set and what pages are worth; see :meth:`load`."""
        worth = self.worth
        pages = np.array(self._pages, np.int32)
        head = _SAVED.pack(len(worth), len(pages), self._fresh)
        return b"".join([head, worth.tobytes(), pages.tobytes(), self._store.save()])

    def load(self, state: bytes) -> None:
        """Goes on where :meth:`save` was called. Raises EngineError for what it did not give; the sequence is
        empty then."""
        self._pages, self._worth, self._coming = [], self._worth[:0], None
        self._store.rewind(0)
        if len(state) < _SAVED.size:
            raise EngineError("the saved session is shorter than it says")
        count, places, fresh = _SAVED.unpack_from(state)
        middle = _SAVED.size + 4 * count
        end = middle + 4 * places
        if len(state) < end:
            raise EngineError("the saved session is shorter than it says")
        self._store.load(state[end:])
        pages = np.frombuffer(state, np.int32, places, middle).tolist()
        known = [page for page in pages if page != _NONE]
        if count != self._store.indexed_pages or not all(
            0 <= page < _pages(self._store.length) for page in known
        ):
            self._store.rewind(0)
            raise EngineError("the saved session says of other pages than its own that they are in slots")
        self._worth = np.frombuffer(state, np.float32, count, _SAVED.size).copy()
        self._fresh = fresh or len(pages) > self._places or len(set(known)) < len(known)
        if not self._fresh:
            self._pages = [_NONE] * len(pages)
            self._read({page: place for place, page in enumerate(pages) if page != _NONE})

    def _known_worth(self, pages: int) -> Array:
        """What pages with an index are worth; new ones as much as the others on average."""
        worth = self._worth[:pages]
        average = worth.mean() if len(worth) else 0.0
        return np.concatenate([worth, np.full(pages - len(worth), average, np.float32)])

    def _choose(self, pages: int) -> list[int]:
        """Of the first ``pages``, which are all, those that the set is to have."""
        if pages <= self._places:
            return list(range(pages))
        indexed = self._store.indexed_pages
        worth = self._known_worth(indexed)
        # Of equals the later one.
        order = np.lexsort((-np.arange(indexed), -worth))
        order = order[order > 0]
        inside = np.zeros(indexed, bool)
        inside[[page for page in self._pages if 0 <= page < indexed]] = True
        room = self._places - 1 - (pages - indexed)
        best = order[:room]
        entering = best[~inside[best]]
        if not self._fresh:
            entering = entering[:ENTERING]
        staying = order[inside[order]][: room - len(entering)]
        return [0, *staying.tolist(), *entering.tolist(), *range(indexed, pages)]

    def _arrange(self, wanted: Sequence[int], last: int) -> None:
        """Puts the pages ``wanted`` into the first places, ``last`` at their end, with the fewest copies. Of
        a page behind the store's tokens there is nothing to copy."""
        end, keep = len(wanted) - 1, set(wanted) - {last}
        pages = self._pages
        pages += [_NONE] * (end + 1 - len(pages))
        missing = sorted(keep.difference(pages))
        self._store.expect(missing)  # on their way while pages leave
        leaving = {page: place for place, page in enumerate(pages) if 0 <= page < last and page not in keep}
        self._store.keep(list(leaving), self._slots, list(leaving.values()))
        holes = [place for place in range(end) if pages[place] not in keep]
        known = last * PAGE < self._store.length
        if known and last in pages[:end]:  # gone back into it: its rounded copy is as good
            pages[pages.index(last)] = _NONE
        for place in range(end, len(pages)):
            if pages[place] in keep:
                hole = holes.pop()
                pages[hole] = _NONE
                self._store.move(self._slots, place, hole)
                pages[hole], pages[place] = pages[place], _NONE
        reads = {page: holes.pop() for page in missing}
        if known and pages[end] != last:
            reads[last] = end
        self._read(reads)
        pages[end] = last
        del pages[end + 1 :]

    def _read(self, places: Mapping[int, int]) -> None:
        """Copies pages from the store to their places."""
        for place in places.values():
            self._pages[place] = _NONE
        self._store.read(list(places), self._slots, list(places.values()))
        for page, place in places.items():
            self._pages[place] = page
        self.copied_pages += len(places)


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE)
