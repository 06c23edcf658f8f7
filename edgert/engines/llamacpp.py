"""The llamacpp engine: any GGUF architecture the native engine does not know, through
llama-cpp-python. It is dense: heads, sparse KV and placement of this project do not apply to it.
It is also the peer of the benchmarks and the referee of the tests on real weights.

Written against the low-level API of llama-cpp-python 0.3.36, which is imported on first use.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import struct
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgert.engines.base import Logits
from edgert.errors import EngineError, ModelFileError

_REMEDY = "install it with: pip install 'edgert[llamacpp]'"
_SCORE_BATCH = 64  # llama.cpp keeps [batch, vocab] floats; 64 rows of 262,144 are 64 MB
_SNAPSHOT = struct.Struct("<8s32sQ")  # magic, fingerprint of the model, number of tokens
_MAGIC = b"EDGELCP1"

_LOG_ERROR = 4  # enum ggml_log_level
_KV_TYPES = {"f16": 1, "q8": 8}  # enum ggml_type: F16, Q8_0

_log_lines: deque[str] = deque(maxlen=20)
_api: Any = None
_log_callback: Any = None  # ctypes does not keep a callback alive


def _load_api() -> Any:
    """llama_cpp.llama_cpp with its logging turned to ``_log_lines``, or EngineError."""
    global _api, _log_callback
    if _api is not None:
        return _api
    try:
        api = importlib.import_module("llama_cpp.llama_cpp")
    except ImportError as e:
        raise EngineError(f"the llamacpp engine needs llama-cpp-python, which is missing; {_REMEDY}") from e
    except (OSError, RuntimeError) as e:  # the package is there, its shared library does not load
        raise EngineError(f"llama-cpp-python is installed but does not load ({e}); re{_REMEDY}") from e
    debug = bool(os.environ.get("EDGERT_DEBUG"))

    def log(level: int, text: bytes, _user: Any) -> None:
        line = text.decode("utf-8", "replace")
        if debug:
            sys.stderr.write(line)
        if level == _LOG_ERROR and line.strip():
            _log_lines.append(line.strip())

    _log_callback = api.llama_log_callback(log)
    api.llama_log_set(_log_callback, ctypes.c_void_p(0))
    api.llama_backend_init()
    _api = api
    return api


def _reason() -> str:
    """What llama.cpp logged first as an error since the lines were cleared: the root of the others."""
    return f": {_log_lines[0]}" if _log_lines else ""


def open(  # the protocol's name for every backend
    path: str | Path,
    threads: int = 0,
    context: int | None = None,
    flash_attn: bool | None = None,
    kv: str = "f16",
) -> LlamaCppEngine:
    """Load a GGUF file.

    ``threads``: 0 takes the CPUs this process may run on. ``context``: the longest session that
    may be asked for, at most what the model was made for (None). ``flash_attn``: None leaves the
    choice to llama.cpp, except with ``kv`` "q8", which needs it. Raises EngineError without
    llama-cpp-python or when llama.cpp refuses the model, ModelFileError when there is no such file.
    """
    return LlamaCppEngine(Path(path), threads, context, flash_attn, kv)


class LlamaCppEngine:
    """A model in llama.cpp; see :func:`open`."""

    name = "llamacpp"

    def __init__(
        self, path: Path, threads: int, context: int | None, flash_attn: bool | None, kv: str
    ) -> None:
        self.api = _load_api()
        if not path.is_file():
            raise ModelFileError(f"expected a GGUF file at {path}, found none; check the path", str(path))
        if threads < 0:
            raise EngineError(f"expected a number of threads of 0 (automatic) or more, found {threads}")
        if threads == 0:
            affinity = getattr(os, "sched_getaffinity", None)
            threads = len(affinity(0)) if affinity else os.cpu_count() or 1
        self.threads, self.kv = threads, kv
        self.flash_attn = True if flash_attn is None and kv != "f16" else flash_attn
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0
        _log_lines.clear()
        self._model: Any = self.api.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise EngineError(f"llama.cpp cannot load {path}{_reason()}")
        self._sessions: weakref.WeakSet[LlamaCppSession] = weakref.WeakSet()
        trained: int = self.api.llama_model_n_ctx_train(self._model)
        if context is not None and context < 1:
            raise EngineError(f"expected a context of at least 1 position, found {context}")
        self._context = min(context or trained, trained)
        self._vocab: int = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self._model))

    @property
    def model(self) -> Any:
        """The llama_model pointer, while the engine is open."""
        if not self._model:
            raise EngineError("the engine is closed; open the model again")
        return self._model

    @property
    def vocab_size(self) -> int:
        return self._vocab

    @property
    def context_length(self) -> int:
        return self._context

    @property
    def window(self) -> int:
        """Width of the sliding-window layers, 0 when there are none."""
        return int(self.api.llama_model_n_swa(self.model))

    @property
    def fingerprint(self) -> bytes:
        """32 bytes over what llama.cpp says of the model; snapshots carry it."""
        text = ctypes.create_string_buffer(256)
        self.api.llama_model_desc(self.model, text, len(text))
        sizes = (self.api.llama_model_size(self.model), self.api.llama_model_n_params(self.model))
        return hashlib.sha256(repr((text.value, *sizes, self._vocab)).encode()).digest()

    def session(self, context: int) -> LlamaCppSession:
        """A new empty sequence. llama.cpp reserves all of ``context`` here."""
        if not 1 <= context <= self._context:
            raise EngineError(f"expected a context of 1 to {self._context} positions, found {context}")
        session = LlamaCppSession(self, context)
        self._sessions.add(session)
        return session

    def memory(self) -> dict[str, int]:
        """Weights, and the KV cache in use by open sessions (what is reserved is more)."""
        kv = sum(session.state_bytes() for session in self._sessions)
        return {"weights": int(self.api.llama_model_size(self.model)), "kv": kv}

    def describe(self) -> dict[str, Any]:
        info = self.api.llama_print_system_info().decode()
        flash = {None: "auto", True: "on", False: "off"}[self.flash_attn]
        return {
            "engine": self.name,
            "dense": True,
            "version": importlib.import_module("llama_cpp").__version__,
            "isa": " ".join(f.split("=")[0].strip() for f in info.split(":", 1)[-1].split("|") if "= 1" in f),
            "threads": self.threads,
            "kv": self.kv,
            "flash_attn": flash,
        }

    def close(self) -> None:
        for session in list(self._sessions):
            session.close()
        if self._model:
            self.api.llama_model_free(self._model)
            self._model = None


class LlamaCppSession:
    """One llama_context with one sequence (number 0) in it."""

    def __init__(self, engine: LlamaCppEngine, context: int) -> None:
        self._engine, self._api, self._capacity = engine, engine.api, context
        params = self._api.llama_context_default_params()
        params.n_ctx = context
        params.n_threads = params.n_threads_batch = engine.threads
        params.n_outputs_max = _SCORE_BATCH
        params.type_k = params.type_v = _KV_TYPES[engine.kv]
        # Window layers keep their window; the default of the bindings is a full cache for them.
        params.swa_full = False
        if engine.flash_attn is not None:
            params.flash_attn_type = int(engine.flash_attn)
        _log_lines.clear()
        self._ctx: Any = self._api.llama_init_from_model(engine.model, params)
        if not self._ctx:
            raise EngineError(f"llama.cpp cannot make a context of {context} positions{_reason()}")
        self._batch: int = self._api.llama_n_batch(self._ctx)
        self._window = engine.window
        self._tokens: list[int] = []  # what is in the cache; needed where partial removal fails

    @property
    def context(self) -> Any:
        """The llama_context pointer, while the session is open."""
        if not self._ctx:
            raise EngineError("the session is closed; open a new one")
        return self._ctx

    @property
    def length(self) -> int:
        return len(self._tokens)

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self._check(tokens)
        for start in range(0, len(tokens), self._batch):
            self._decode(tokens[start : start + self._batch], every=False)
        last: Logits = self._rows(1)[0]
        return last

    def step(self, token: int) -> Logits:
        return self.prefill((token,))

    def score(self, tokens: Sequence[int]) -> Logits:
        self._check(tokens)
        out = np.empty((len(tokens), self._engine.vocab_size), np.float32)
        for start in range(0, len(tokens), _SCORE_BATCH):
            part = tokens[start : start + _SCORE_BATCH]
            self._decode(part, every=True)
            out[start : start + len(part)] = self._rows(len(part))
        return out

    def rewind(self, length: int) -> int:
        """Forget positions from ``length`` on. Always keeps ``length``: what llama.cpp cannot
        remove in part (recurrent state, an overwritten window) is evaluated again."""
        if not 0 <= length <= self.length:
            raise EngineError(f"expected a length of 0 to {self.length} to rewind to, found {length}")
        if length == self.length:
            return length
        memory = self._api.llama_get_memory(self.context)
        kept = self._tokens[:length]
        removed = self._api.llama_memory_seq_rm(memory, 0, length, -1)
        first = self._api.llama_memory_seq_pos_min(memory, 0)
        needed = max(0, length - self._window + 1) if self._window else 0
        if removed and (length == 0 or 0 <= first <= needed):
            self._tokens = kept
            return length
        self._api.llama_memory_clear(memory, False)
        self._tokens = []
        if kept:
            self.prefill(kept)
        return length

    def snapshot(self) -> bytes:
        size = self.state_bytes()
        buffer = (ctypes.c_uint8 * size)()
        written = self._api.llama_state_seq_get_data(self.context, buffer, size, 0)
        if written != size:
            raise EngineError(f"llama.cpp wrote {written} of {size} bytes of its state{_reason()}")
        header = _SNAPSHOT.pack(_MAGIC, self._engine.fingerprint, self.length)
        return header + np.asarray(self._tokens, "<i4").tobytes() + bytes(buffer)

    def restore(self, state: bytes) -> None:
        """Replace the cache. Raises EngineError, and leaves the session empty when llama.cpp itself
        refuses the state."""
        if len(state) < _SNAPSHOT.size or state[:8] != _MAGIC:
            raise EngineError("expected a snapshot of the llamacpp engine, found other bytes")
        _, fingerprint, count = _SNAPSHOT.unpack_from(state)
        if fingerprint != self._engine.fingerprint:
            raise EngineError("the snapshot is of another model; restore it with the model it came from")
        if count > self._capacity:
            raise EngineError(
                f"the snapshot holds {count} positions, the session {self._capacity}; open a longer session"
            )
        start = _SNAPSHOT.size + 4 * count
        if len(state) <= start:
            raise EngineError(
                f"expected over {start} bytes in the snapshot, found {len(state)}: it is cut off"
            )
        data = (ctypes.c_uint8 * (len(state) - start)).from_buffer_copy(state, start)
        memory = self._api.llama_get_memory(self.context)
        self._api.llama_memory_clear(memory, False)
        self._tokens = []
        _log_lines.clear()
        if self._api.llama_state_seq_set_data(self.context, data, len(data), 0) != len(data):
            self._api.llama_memory_clear(memory, False)
            raise EngineError(f"llama.cpp refuses the snapshot{_reason()}")
        self._tokens = np.frombuffer(state, "<i4", count, _SNAPSHOT.size).tolist()

    def state_bytes(self) -> int:
        """Bytes of the cache in use."""
        return int(self._api.llama_state_seq_get_size(self.context, 0)) if self._ctx else 0

    def close(self) -> None:
        if self._ctx:
            self._api.llama_free(self._ctx)
            self._ctx = None

    def __del__(self) -> None:
        if getattr(self, "_ctx", None) and sys and not sys.is_finalizing():
            self.close()

    def _check(self, tokens: Sequence[int]) -> None:
        if not len(tokens):
            raise EngineError("expected at least one token, found none")
        if self.length + len(tokens) > self._capacity:
            raise EngineError(
                f"{self.length} + {len(tokens)} tokens do not fit the context of {self._capacity} positions; "
                "open a longer session or shorten the prompt"
            )
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= self._engine.vocab_size:
            raise EngineError(
                f"expected token ids of 0 to {self._engine.vocab_size - 1}, found {low if low < 0 else high}"
            )

    def _decode(self, tokens: Sequence[int], every: bool) -> None:
        n = len(tokens)
        ids = (ctypes.c_int32 * n)(*tokens)
        # Without positions and sequence numbers llama.cpp continues sequence 0; without flags only
        # the last token gives logits.
        flags = (ctypes.c_int8 * n)(*([1] * n)) if every else None
        batch = self._api.llama_batch(n, ids, None, None, None, None, flags)
        _log_lines.clear()
        status = self._api.llama_decode(self.context, batch)
        if status != 0:
            # What a failed batch left behind must not outlive the list of tokens.
            self._api.llama_memory_seq_rm(self._api.llama_get_memory(self.context), 0, self.length, -1)
            raise EngineError(f"llama.cpp failed with status {status} at position {self.length}{_reason()}")
        self._tokens.extend(tokens)

    def _rows(self, n: int) -> Logits:
        """The logits of the last batch, [n, vocab]. A copy: llama.cpp frees its own with the context."""
        pointer = self._api.llama_get_logits(self.context)
        rows: Logits = np.ctypeslib.as_array(pointer, (n, self._engine.vocab_size)).copy()
        return rows
