"""The onnx engine: directories that ``edgert export --format onnx`` wrote, on ONNX Runtime.

Written against ONNX Runtime 1.24 to 1.32, which is imported on first use. A pass is one run of the graph;
``export/onnx_model.py`` describes its inputs and outputs. A step by a FlashHead in the graph is one pass too.
"""

from __future__ import annotations

import math
import struct
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgert.cost import kv_bytes
from edgert.engines.base import Ids, Logits
from edgert.engines.onnx_caches import Caches, Slots, States
from edgert.engines.onnx_pass import Outputs, Pass
from edgert.engines.onnx_providers import Loaded, check_kernels, load_graph, load_runtime
from edgert.errors import EngineError
from edgert.onnx_interface import INTEGERS
from edgert.onnx_preflight import preflight
from edgert.platforms.detect import detect_threads
from edgert.tier import IN_MEMORY, Tier

if TYPE_CHECKING:
    from edgert.onnx_directory import OnnxDirectory
    from edgert.onnx_wire import Graph

# Tokens of one pass: short enough that Ctrl-C is answered while a long prompt runs.
CHUNK = 256
SCORED = 64  # rows of logits of one pass: 64 of 262,144 are 64 MB
_SNAPSHOT = struct.Struct("<8s32sII")  # magic, the export's hash, positions, first one in windowed layers
_MAGIC = b"EDGEORT1"
_FLOAT16 = 10  # TensorProto.DataType


class OnnxEngine:
    """The model in a directory. ``threads`` 0: one for each core. ``slots``: of the working set of keys and
    values that steps see, 0: they see everything; ``tier``: where everything lies then. ``graph``: as
    pre-flight found it; None: pre-flight is made now. Raises ModelFileError and UnsupportedModelError for a
    directory that is damaged or not edgert's, EngineError when ONNX Runtime is missing, lacks the provider or
    cannot load the graph."""

    name = "onnx"

    def __init__(
        self,
        directory: OnnxDirectory,
        provider: str = "cpu",
        threads: int = 0,
        slots: int = 0,
        tier: Tier = IN_MEMORY,
        graph: Graph | None = None,
    ) -> None:
        self.runtime = load_runtime(provider)
        graph = graph or preflight(directory).graph
        check_kernels(graph, directory.path, provider)
        self.directory, self.spec, self.provider = directory, directory.spec, provider
        self.threads, self.slots, self.tier = threads or detect_threads(), slots, tier
        self._step_bytes = bytes_of_a_step(graph, directory)
        self._loaded: Loaded | None = load_graph(
            # Between two sparse steps the core counts votes.
            directory.graph,
            provider,
            self.threads,
            rest=slots > 0,
            constants=_constants(graph, provider),
        )
        self._sessions: weakref.WeakSet[OnnxSession] = weakref.WeakSet()

    @property
    def loaded(self) -> Loaded:
        if self._loaded is None:
            raise EngineError("the engine is closed; load the model again")
        return self._loaded

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    @property
    def context_length(self) -> int:
        return self.spec.context_length

    def session(self, context: int) -> OnnxSession:
        if self.slots:
            from edgert.engines.onnx_sparse_session import SparseSession

            session: OnnxSession = SparseSession(self, context)
        else:
            session = OnnxSession(self, context)
        self._sessions.add(session)
        return session

    @property
    def flash_note(self) -> str | None:
        """What the FlashHead scores and how often it agrees with the dense head; None without one."""
        head = self.directory.flash_head
        if head is None:
            return None
        note, agreement = f"in the graph, {head['tokens']} tokens", head["quality"].get("agreement")
        if not isinstance(agreement, float):
            return note
        return f"{note}, {agreement:.2%} of the dense head's as its sidecar was measured"

    def memory(self) -> dict[str, int]:
        """Weights as they lie in the file, and the caches of open sessions, as far as they are in use."""
        return {"weights": self.directory.weight_bytes, "kv": sum(s.nbytes for s in self._sessions)}

    def describe(self) -> dict[str, Any]:
        body, dense, flash = self._step_bytes
        described = {
            "engine": self.name,
            "version": self.runtime.__version__,
            "provider": self.provider,
            "nodes": dict(self.loaded.nodes),
            "threads": self.threads,
            "quant": self.directory.quant,
            "kv": self.directory.kv,
            "weight_bytes_per_step": body + dense,
            "body_bytes_per_step": body,
        }
        if self.directory.flash_head:
            described["flash_bytes_per_step"] = body + flash
            described["flash_tokens"] = self.directory.flash_head["tokens"]
        if self.slots:
            described["slots"], described["pages_chosen_by"] = self.slots, "votes"
        if self.tier.slots:
            described["pages_in_memory"], described["page_directory"] = self.tier[:2]
        return described

    def close(self) -> None:
        for session in list(self._sessions):
            session.close()
        self._loaded = None


def _constants(graph: Graph, provider: str) -> dict[str, Any]:
    """Initializers that are others for ``provider``: a FlashHead multiplies integers on the CPU alone."""
    if provider != "cpu" and any(tensor.name == INTEGERS for tensor in graph.initializers):
        return {INTEGERS: np.array(0, np.uint8)}
    return {}


def bytes_of_a_step(graph: Graph, directory: OnnxDirectory) -> tuple[int, int, int]:
    """Bytes of weights that a step reads for the layers, for the dense head, and for the FlashHead (0: there
    is none). Of tables that rows or clusters are taken of it is these, and nothing of tables of ids."""
    spec, sizes = directory.spec, dict[tuple[str, str], int]()
    for tensor in graph.initializers:
        if tensor.external:  # under several names where operators want several shapes
            # float16 is made float32 when it is loaded.
            size = int(tensor.external["length"]) * (2 if tensor.dtype == _FLOAT16 else 1)
            sizes[tensor.name.partition(".weight")[0], tensor.external["offset"]] = size
    table, head = "token_embd", "token_embd" if spec.tied_head else "output"

    def total(chosen: Callable[[str], bool]) -> int:
        return sum(size for (name, _), size in sizes.items() if chosen(name))

    of_flash = ("head.", "flash.")
    layers = total(lambda name: name not in (table, head) and not name.startswith(of_flash))
    dense, flash = total(lambda name: name == head), 0
    if found := directory.flash_head:
        flash = total(lambda name: name.startswith("head.") or name == "flash.common")
        flash += dense * found["rare"] // spec.vocab_size
        flash += chosen_row_bytes(graph, directory)
    return layers, dense, flash


def chosen_row_bytes(graph: Graph, directory: OnnxDirectory) -> int:
    """Bytes of the low-rank rows of the clusters that a FlashHead chooses in a step; 0 without such rows."""
    for tensor in graph.initializers:
        if tensor.name == "flash.rows" and tensor.external and directory.flash_head:
            clusters: int = directory.flash_head["clusters"]
            return int(tensor.external["length"]) * clusters // tensor.dims[0]
    return 0


def _row(rows: Logits) -> Logits:
    row: Logits = rows[0]
    return row


class OnnxSession:
    """One sequence. See :class:`edgert.engines.base.EngineSession`.

    Invariant: the caches hold the first :attr:`length` positions whatever interrupts a pass, since that
    writes to slots and states that count once it is through.
    """

    _filled = -1  # slots in use before a pass; -1: one for each position
    _queries = 0  # floats of a row of the output of queries, where a pass is to have it

    def __init__(self, engine: OnnxEngine, context: int) -> None:
        if not 1 <= context <= engine.context_length:
            raise EngineError(
                f"expected a context of 1 to {engine.context_length} positions, found {context}"
            )
        self._engine, self._context, self._length = engine, context, 0
        self._full = self._full_caches()
        self._windows = self._slots(True)
        self._states = States(engine.runtime, engine.spec, engine.loaded.device)
        self._steps: dict[bool, Pass] = {}  # passes of one token, by whether the FlashHead scores it
        # What the last pass found of these very states.
        self._flash: tuple[Logits, Outputs] | None = None
        self._dense: tuple[Logits, Logits] | None = None

    def _full_caches(self) -> Caches:
        return self._slots(False)

    def _slots(self, windowed: bool) -> Slots:
        # One slot more than the context: of a pass whose token does not count, see dense().
        engine = self._engine
        kv, device = engine.directory.kv, engine.loaded.device
        return Slots(engine.runtime, engine.spec, kv, windowed, self._context + 1, CHUNK, device)

    @property
    def length(self) -> int:
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in use."""
        full, windows = self._full, self._windows
        return full.row_bytes * self._length + windows.row_bytes * (self._length - windows.start)

    @property
    def step_bytes(self) -> int:
        """Bytes of keys and values the next step reads."""
        return round(kv_bytes(self._engine.spec, self._length, self._engine.directory.kv))

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self._check(tokens)
        for at in range(0, len(tokens), CHUNK):
            last = at + CHUNK >= len(tokens)
            found = self._pass(tokens[at : at + CHUNK], [-1] if last else [])
        return _row(found.logits)

    def step(self, token: int) -> Logits:
        self._check([token])
        return _row(self._pass([token], [-1]).logits)

    def score(self, tokens: Sequence[int]) -> Logits:
        self._check(tokens)
        pieces = [tokens[at : at + SCORED] for at in range(0, len(tokens), SCORED)]
        rows: Logits = np.concatenate([self._pass(piece, range(len(piece))).logits for piece in pieces])
        return rows

    def hidden(self, token: int) -> Logits:
        """Append a token and return the head's input after it, [dim]. The FlashHead's scores of it come with
        the same pass."""
        self._check([token])
        found = self._pass([token], [-1], flash=True)
        state: Logits = _row(found.hidden).copy()
        self._flash = (state, found)
        return state

    def confirmed(self, earlier: Sequence[Logits], token: int) -> Logits:
        """Append a token. Returns the head's inputs ``earlier`` and that after the token, [n, dim]; the dense
        head's logits of all of them come with the same pass."""
        self._check([token])
        found = self._pass([token], [-1], more=earlier)
        states = np.stack([*earlier, found.hidden[0]])
        self._dense = (states, np.concatenate([found.logits[1:], found.logits[:1]]))
        return states

    def flash(self, hidden: Logits, more: Sequence[int]) -> tuple[Ids, Logits]:
        known = self._flash is not None and self._flash[0] is hidden
        found = self._flash[1] if self._flash and known else self._score([hidden], flash=True)
        assert found.ids is not None
        ids, logits = found.ids[0].astype(np.uint32), found.logits[0]
        there = logits > -np.inf  # a place that a cluster does not fill has the id 0
        if not there.all():
            ids, logits = ids[there], logits[there]
        if len(more):
            wanted = np.unique(np.asarray(more, np.uint32))
            missing = wanted[~np.isin(wanted, ids, kind="table")]  # sorting them all takes 1.5 ms
            if len(missing):
                dense = self.dense(hidden[None])[0]
                ids, logits = np.concatenate([ids, missing]), np.concatenate([logits, dense[missing]])
        return ids, logits

    def dense(self, hidden: Logits) -> Logits:
        """Logits of rows of head inputs by the whole head, [n, vocab]. Where no pass has them yet it takes
        one, of a token that is forgotten again."""
        if self._dense is not None and self._dense[0] is hidden:
            return self._dense[1]
        return self._score(list(hidden)).logits

    def dense_rows(self, hidden: Logits) -> tuple[Ids | None, Logits]:
        return None, self.dense(hidden)

    def best(self, hidden: Logits) -> list[int]:
        return [int(token) for token in self.dense(hidden).argmax(axis=1)]

    def rewind(self, length: int) -> int:
        if length >= self._length:
            return self._length
        self._flash = self._dense = None
        kept = self._states.rewind(length)
        if not self._windows.reaches(kept):
            kept = self._states.rewind(0)
        self._length = kept
        if kept == 0:
            self._windows.start = 0
        return kept

    def snapshot(self) -> bytes:
        head = _SNAPSHOT.pack(_MAGIC, self._identity(), self._length, self._windows.start)
        parts = [
            np.ascontiguousarray(buffer.read()[0, :, : shape[1]]).tobytes()
            for slots in (self._full, self._windows)
            for buffer, shape in slots.parts(self._length)
        ]
        states = [buffer.read().tobytes() for buffer in self._states.read(self._length).values()]
        return b"".join([head, *parts, *states])

    def restore(self, state: bytes) -> None:
        if len(state) < _SNAPSHOT.size or not state.startswith(_MAGIC):
            raise EngineError("expected a snapshot of the onnx engine, found other bytes")
        _, identity, length, start = _SNAPSHOT.unpack_from(state)
        if identity != self._identity():
            raise EngineError("the snapshot is of another export; restore it with the one it came from")
        if length > self._context:
            raise EngineError(
                f"the snapshot holds {length} positions, the session {self._context}; open a longer session"
            )
        if start > length or length - start > self._windows.slots:
            raise EngineError(f"the snapshot has windows from {start} to {length}, which cannot be")
        self.rewind(0)
        self._windows.start = start
        found = [(buffer, shape) for s in (self._full, self._windows) for buffer, shape in s.parts(length)]
        self._states.read(0)
        states = self._states.write().values()
        expected = _SNAPSHOT.size + sum(buffer.dtype.itemsize * math.prod(shape) for buffer, shape in found)
        expected += sum(buffer.read().nbytes for buffer in states)
        if len(state) != expected:
            self._windows.start = 0
            raise EngineError(f"the snapshot is damaged: expected {expected} bytes, found {len(state)}")
        at = _SNAPSHOT.size
        for buffer, shape in found:
            rows = buffer.read()
            rows[0, :, : shape[1]] = np.frombuffer(state, buffer.dtype, math.prod(shape), at).reshape(shape)
            buffer.write(rows)
            at += buffer.dtype.itemsize * math.prod(shape)
        for buffer in states:
            rows = buffer.read()
            rows[...] = np.frombuffer(state, buffer.dtype, rows.size, at).reshape(rows.shape)
            buffer.write(rows)
            at += rows.nbytes
        self._states.keep(length)
        self._length = length

    def close(self) -> None:
        self.rewind(0)
        self._steps.clear()
        for caches in (self._full, self._windows, self._states):
            caches.clear()

    def _identity(self) -> bytes:
        return bytes.fromhex(self._engine.directory.sha256)

    def _check(self, tokens: Sequence[int]) -> None:
        if not len(tokens):
            raise EngineError("expected at least one token, found none")
        total, vocab = self._length + len(tokens), self._engine.vocab_size
        if total > self._context:
            raise EngineError(
                f"the sequence would be {total} tokens, the context holds {self._context}: shorten the "
                "prompt or load with a larger context"
            )
        for token in tokens:
            if not 0 <= token < vocab:
                raise EngineError(f"expected token ids of 0 to {vocab - 1}, found {token}")

    def _score(self, states: Sequence[Logits], flash: bool = False) -> Outputs:
        """The heads' scores of ``states`` alone, by a pass of any token to a slot that is not in use."""
        return self._pass([0], [], more=states, flash=flash, keep=False)

    def _pass(
        self,
        tokens: Sequence[int],
        rows: Sequence[int],
        *,
        more: Sequence[Logits] = (),
        flash: bool = False,
        keep: bool = True,
    ) -> Outputs:
        """Run the graph on ``tokens``. Scored are their ``rows`` and then the states ``more``, by the
        FlashHead or the dense head. Unless ``keep``, the tokens are forgotten again."""
        length = self._length
        self._flash = self._dense = None
        try:
            self._windows.make_room(length, len(tokens))
        except BaseException:  # half moved
            self.rewind(0)
            raise
        found = self._ready(len(tokens), rows, len(more), flash).run(
            tokens, length, self._windows.start, more, self._filled
        )
        if keep:
            length += len(tokens)
            self._states.keep(length)
            self._length = length
        return found

    def _ready(self, length: int, rows: Sequence[int], more: int, flash: bool) -> Pass:
        """A pass of such a size, with all caches bound."""
        step = length == len(rows) == 1 and not more
        ready = self._steps.get(flash) if step else None
        reads, writes = self._states.read(self._length).items(), self._states.write().items()
        if ready:
            ready.bind(reads, writes)
            return ready
        engine, head = self._engine, self._engine.directory.flash_head
        ready = Pass(
            engine.runtime,
            engine.loaded.session,
            dim=engine.spec.dim,
            length=length,
            rows=rows,
            more=more,
            flash=None if head is None else flash,
            scored=head["tokens"] if head and flash else engine.vocab_size,
            windowed=bool(self._windows.buffers),
            queries=self._queries,
        )
        for buffers in (self._full.buffers, self._windows.buffers):
            ready.bind(buffers.items(), buffers.items())
        ready.bind(reads, writes)
        if step:
            self._steps[flash] = ready
        return ready
