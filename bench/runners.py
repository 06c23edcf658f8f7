"""The two engines behind the few calls a measurement needs, each by its shortest way from Python."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgert.engines import llamacpp, open_engine
from edgert.engines.base import Logits


class Runner(Protocol):
    label: str

    def prefill(self, tokens: Sequence[int]) -> int:
        """Append ``tokens``; returns the likeliest next one."""
        ...

    def step(self, token: int) -> int: ...

    def clear(self) -> None: ...

    def mark(self) -> None:
        """Remember this point of the sequence for :meth:`back`."""
        ...

    def back(self) -> None: ...

    def close(self) -> None: ...


class Native:
    """One session of the native engine."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        self.label = "edgert"
        self.engine = open_engine(path, "native", threads=threads)
        self.session = self.engine.session(context)

    def prefill(self, tokens: Sequence[int]) -> int:
        return int(self.session.prefill(tokens).argmax())

    def step(self, token: int) -> int:
        return int(self.session.step(token).argmax())

    def clear(self) -> None:
        self.session.rewind(0)

    def mark(self) -> None:
        self._length, self._state = self.session.length, self.session.snapshot()

    def back(self) -> None:
        if self.session.rewind(self._length) != self._length:  # a window has moved on
            self.session.restore(self._state)

    def step_bytes(self) -> int:
        """Bytes of weights, keys and values that the next step reads."""
        cache: Any = self.session
        return int(self.engine.describe()["weight_bytes_per_step"]) + int(cache.step_bytes)

    def close(self) -> None:
        self.session.close()
        self.engine.close()


class LlamaCpp:
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

    def back(self) -> None:
        # Windows of llama.cpp are wider by a batch, so the few steps of a sample can be taken back.
        assert self._api.llama_memory_seq_rm(self._memory, 0, self._length, -1)

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
