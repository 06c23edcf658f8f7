"""edgert and llama.cpp behind the few calls a measurement needs, each by its shortest way from Python."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from edgert import _native
from edgert.cost import kv_bytes
from edgert.engines import llamacpp
from edgert.engines.base import Logits
from edgert.exact import Exact, make_exact
from edgert.model import load

if TYPE_CHECKING:
    from edgert.engines.native import NativeEngine
    from edgert.engines.onnx import OnnxEngine
    from edgert.session import Session


class Runner(Protocol):
    """Greedy throughout. ``label`` names the engine in diagnostics."""

    label: str

    def prefill(self, tokens: Sequence[int]) -> int:
        """Append ``tokens``; returns the likeliest next one."""
        ...

    def step(self, token: int) -> int: ...

    def generate(self, token: int, n: int) -> list[int]:
        """The ``n`` tokens that follow ``token``, which is not in the cache yet."""
        ...

    def clear(self) -> None: ...

    def mark(self) -> None:
        """Remember this point of the sequence for :meth:`back`."""
        ...

    def back(self) -> bool:
        """False where the engine has forgotten that point; the cache must then be filled and marked again
        (see :func:`back_to`)."""
        ...

    def step_bytes(self) -> int | None:
        """Bytes of weights, keys and values that a token costs at this length; None when unknown."""
        ...

    def about(self) -> dict[str, Any]:
        """``engine_version``, ``isa`` and whatever else tells one build from another."""
        ...

    def close(self) -> None: ...


def back_to(runner: Runner, tokens: Sequence[int]) -> None:
    """Make the cache hold ``tokens``, what it held when they were marked."""
    if not runner.back():
        runner.clear()
        runner.prefill(tokens)
        runner.mark()


class Stepper:
    """:meth:`Runner.generate` for an engine that takes one token at a time."""

    def step(self, token: int) -> int:
        raise NotImplementedError

    def generate(self, token: int, n: int) -> list[int]:
        tokens: list[int] = []
        for _ in range(n):
            token = self.step(token)
            tokens.append(token)
        return tokens


class Native(Stepper):
    """One session of the native engine, with one of its heads and modes of attention, or of the onnx one."""

    def __init__(
        self,
        path: Path,
        threads: int,
        context: int,
        head: str = "dense",
        kv: str = "f16",
        attention: str = "full",
        heads: str = "none",
        engine: str = "native",
    ) -> None:
        self.label = "edgert" if engine == "native" else f"edgert {engine}"
        # With the tokenizer, so that the memory of the process is that of a program that answers.
        self._model = load(
            path,
            engine=engine,
            threads=threads,
            context=max(context, 2),
            kv=kv,
            head=head,
            attention=attention,
            heads=heads,
        )
        self.engine = cast("NativeEngine | OnnxEngine", self._model.engine)
        self.session = self.engine.session(context)
        self._head, self._attention = head, attention
        self._exact: Exact | None = None
        self._forgets, self._state = False, cast("bytes | None", None)

    def prefill(self, tokens: Sequence[int]) -> int:
        return int(self.session.prefill(tokens).argmax())

    def step(self, token: int) -> int:
        if self._head == "flash":
            ids, logits = self.session.flash(self.session.hidden(token), ())
            return int(ids[logits == logits.max()].min())
        return int(self.session.step(token).argmax())

    def generate(self, token: int, n: int) -> list[int]:
        sampler = _native.Sampler(self.engine.vocab_size)
        # Of a session the exact modes use what the engine's own offers too.
        session = cast("Session", self.session)
        self._exact = exact = make_exact(session, sampler, attention=self._attention, head=self._head)
        if exact is None:
            return super().generate(token, n)
        tokens = [token]
        while len(tokens) <= n:
            left = n + 1 - len(tokens)
            block = exact.block(tokens[-1], self.session.length + 1, left, (), lambda: False)
            tokens += [chosen for chosen, _ in block]
        return tokens[1:]

    def clear(self) -> None:
        self.session.rewind(0)

    def mark(self) -> None:
        self._length = self.session.length
        self._state = self.session.snapshot() if self._forgets else None

    def back(self) -> bool:
        if self.session.rewind(self._length) == self._length:
            return True
        if self._state is None:  # a window has moved on; a snapshot is as large as the cache
            self._forgets = True
            return False
        self.session.restore(self._state)
        return True

    def step_bytes(self) -> int:
        """Of the exact modes: the weights that the tokens of the last :meth:`generate` cost on average, and
        of exact attention its keys and values. Those of an exact head alone are counted once a token."""
        described, step = self.engine.describe(), self.session.step_bytes
        weights = described["flash_bytes_per_step" if self._head == "flash" else "weight_bytes_per_step"]
        if self._exact and (counts := self._exact.counts).tokens:
            weights = self._exact.bytes_per_token(described)
            if self._attention == "exact":
                whole = kv_bytes(self.engine.spec, self.session.length, self._model.kv)
                step = round((counts.drafts * step + counts.passes * whole) / counts.tokens)
        return int(weights) + step

    def about(self) -> dict[str, Any]:
        described = self.engine.describe()
        return {"engine_version": described.get("version", version("edgert")), "isa": described.get("isa")}

    def close(self) -> None:
        self.session.close()
        self._model.close()


class LlamaCpp(Stepper):
    """One llama_context, driven by llama_decode itself, so that no Python of ours is charged to it."""

    def __init__(self, path: Path, threads: int, context: int, flash_attn: bool) -> None:
        self.label = f"llama.cpp, flash attention {'on' if flash_attn else 'off'}"
        self.engine = llamacpp.open(path, threads=threads, flash_attn=flash_attn)
        self._session = self.engine.session(context)
        self._api, self._ctx = self.engine.api, self._session.context
        self._memory = self._api.llama_get_memory(self._ctx)
        self._n_batch: int = self._api.llama_n_batch(self._ctx)
        self._token = (ctypes.c_int32 * 1)()
        self._single = self._batch(self._token)

    def prefill(self, tokens: Sequence[int]) -> int:
        for at in range(0, len(tokens), self._n_batch):
            part = tokens[at : at + self._n_batch]
            self._decode(self._batch((ctypes.c_int32 * len(part))(*part)))
        return int(self._logits().argmax())

    def step(self, token: int) -> int:
        self._token[0] = token
        self._decode(self._single)
        return int(self._logits().argmax())

    def clear(self) -> None:
        self._api.llama_memory_clear(self._memory, False)

    def mark(self) -> None:
        self._length = self._api.llama_memory_seq_pos_max(self._memory, 0) + 1

    def back(self) -> bool:
        removed = self._api.llama_memory_seq_rm(self._memory, 0, self._length, -1)
        # Windows of llama.cpp are wider by a batch, so the steps of a sample can be taken back, but not
        # always a prompt.
        first = self._api.llama_memory_seq_pos_min(self._memory, 0)
        window = self.engine.window
        return bool(removed) and 0 <= first <= (max(0, self._length - window + 1) if window else 0)

    def step_bytes(self) -> None:
        return None

    def about(self) -> dict[str, Any]:
        described = self.engine.describe()
        return {"engine_version": described["version"], "isa": described["isa"]}

    def close(self) -> None:
        self.engine.close()

    def _batch(self, ids: ctypes.Array[ctypes.c_int32]) -> Any:
        return self._api.llama_batch(len(ids), ids, None, None, None, None, None)

    def _decode(self, batch: Any) -> None:
        status = self._api.llama_decode(self._ctx, batch)
        assert status == 0, f"llama_decode failed with status {status}"

    def _logits(self) -> Logits:
        pointer = self._api.llama_get_logits(self._ctx)
        logits: Logits = np.ctypeslib.as_array(pointer, (self.engine.vocab_size,))
        return logits
