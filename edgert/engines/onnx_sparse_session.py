"""A sequence on ONNX Runtime whose steps see a working set of slots (onnx_sparse.py) and not everything."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgert.engines.base import Logits
from edgert.engines.onnx import OnnxSession
from edgert.engines.onnx_caches import Caches
from edgert.engines.onnx_pass import Outputs
from edgert.engines.onnx_sparse import VOTERS, WorkingSet
from edgert.errors import EngineError

if TYPE_CHECKING:
    from edgert.engines.onnx import OnnxEngine

_SIZE = struct.Struct("<Q")  # in front of a snapshot: the bytes of its working set


class SparseSession(OnnxSession):
    """Steps see the working set; a prompt, and what is scored, sees everything. Of layers with a window, of
    convolutions and of the protocol see OnnxSession."""

    def __init__(self, engine: OnnxEngine, context: int) -> None:
        self._set: WorkingSet
        super().__init__(engine, context)
        self._queries = self._set.query_width
        self._reading = False  # everything is in the slots
        if (self.tier or {}).get("in_memory"):
            raise EngineError(
                f"{engine.tier.directory} lies in memory (tmpfs), not on a disk, so that pages there save "
                "none: choose another page_directory"
            )

    def _full_caches(self) -> Caches:
        engine = self._engine
        self._set = WorkingSet(
            engine.runtime,
            engine.spec,
            engine.directory.kv,
            self._context,
            engine.slots,
            engine.threads,
            engine.tier,
        )
        return self._set

    @property
    def nbytes(self) -> int:
        """Bytes of the slots in use, of windowed layers' keys and values, and of the store."""
        windows = self._windows
        return self._set.nbytes + windows.row_bytes * (self._length - windows.start)

    @property
    def tier(self) -> dict[str, Any] | None:
        """What the disk tier holds and did, None when all keys and values are in memory."""
        return self._set.tier

    @property
    def working_set(self) -> WorkingSet:
        """What steps see."""
        return self._set

    @property
    def copied_bytes(self) -> int:
        """Bytes copied from the store into slots since the session began."""
        return self._set.copied_bytes

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self._check(tokens)
        with self._everything(len(tokens)):
            return super().prefill(tokens)

    def score(self, tokens: Sequence[int]) -> Logits:
        self._check(tokens)
        with self._everything(len(tokens)):
            return super().score(tokens)

    def rewind(self, length: int) -> int:
        kept = super().rewind(length)
        self._set.rewind(kept)
        return kept

    def snapshot(self) -> bytes:
        of_set = self._set.save()
        return b"".join([_SIZE.pack(len(of_set)), of_set, super().snapshot()])

    def restore(self, state: bytes) -> None:
        end = _SIZE.size + (_SIZE.unpack_from(state)[0] if len(state) >= _SIZE.size else len(state))
        super().restore(state[end:])
        try:
            self._set.load(state[_SIZE.size : end])
            if self._set.length != self._length:
                raise EngineError(
                    f"the snapshot is damaged: expected {self._length} positions, found {self._set.length}"
                )
        except BaseException:
            self.rewind(0)
            raise

    @contextmanager
    def _everything(self, n: int) -> Iterator[None]:
        """Passes within see all positions and append ``n``."""
        self._steps.clear()  # bound to the slots of the working set, whose memory may go
        self._set.whole(n)
        self._reading = True
        try:
            yield
        finally:
            self._steps.clear()
            self._set.back()
            self._reading = False

    def _pass(
        self,
        tokens: Sequence[int],
        rows: Sequence[int],
        *,
        more: Sequence[Logits] = (),
        flash: bool = False,
        keep: bool = True,
    ) -> Outputs:
        before, asked = self._length, len(rows)
        if self._reading:
            self._filled = before
            if asked == 1:  # the last one: its neighbours vote too
                rows = range(max(0, len(tokens) - VOTERS), len(tokens))
        else:
            self._filled = self._set.step() if keep else self._set.spare
        found = super()._pass(tokens, rows, more=more, flash=flash, keep=keep)
        if keep:
            try:
                self._set.append(self._filled, len(tokens), found.queries[-VOTERS:])
            except BaseException:
                self.rewind(before)
                raise
        extra = len(rows) - asked
        if not extra:
            return found
        ids = None if found.ids is None else found.ids[extra:]
        return found._replace(hidden=found.hidden[extra:], logits=found.logits[extra:], ids=ids)
