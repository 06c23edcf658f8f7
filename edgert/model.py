"""A loaded model: its engine, its tokenizer, and what can be asked of them."""

from __future__ import annotations

import contextlib
import operator
import threading
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import _native
from .attention import choose_budget
from .engines import check_file, check_options, engine_for
from .engines.base import Engine
from .errors import ModelFileError, UnsupportedModelError, UsageError
from .generate import Reply, Stream
from .head_classes import ALL_INDEXED, check_heads
from .heads import check_head, choose_retrieval, choose_sidecar
from .locate import model_path, onnx_export
from .placement import check_memory, make_tier
from .planner import Case, check_context, choose_context
from .session import Message, Prompt, Session, finish

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


def load(
    name_or_path: str | PathLike[str],
    *,
    engine: str = "auto",
    provider: str = "cpu",
    threads: int = 0,
    context: int | None = None,
    kv: str = "f16",
    head: str = "auto",
    probes: int = 0,
    attention: str = "full",
    budget: int = 0,
    heads: str | PathLike[str] = "none",
    memory: int | None = None,
    page_directory: str | PathLike[str] | None = None,
    page_limit: int | None = None,
) -> Model:
    """Load a model.

    ``name_or_path``: a name of the catalogue, a GGUF file, the directory of an ONNX export, or
    ``hf:owner/repo/file.gguf``.
    ``engine``: "native", "llamacpp", "onnx", or "auto", which is native for what native knows and onnx for an
    ONNX export. ``provider``: what onnx computes on, "cpu", "cuda" or "tensorrt".
    ``threads``: 0 takes as many as the machine has cores. ``context``: positions a session may
    hold; None is what the model was made for, or what memory allows when that is less (it is only
    taken as a session grows).
    ``kv``: type of the cached keys and values, "f16" or "q8" (int8, half the memory). ``head``: "dense";
    "flash", which scores the likely clusters of the vocabulary alone; "exact", which drafts with those and
    gives the dense head's tokens; or "auto", flash where the model has a sidecar (``edgert export``), else
    dense; of an ONNX export flash where the plan expects it to be faster.
    ``probes``: clusters that flash scores (0: the sidecar's number). ``attention``: "full", or "sparse", in
    which a decode step reads ``budget`` past tokens for each KV head (0: the default), those that a small
    index finds worth it, beside the first and the latest ones; prompts are read in full; or "exact", which
    drafts with such steps and gives the tokens of full attention. On an ONNX export a step of sparse
    attention sees ``budget`` tokens in all, the same pages for all heads, and there is no "exact".
    ``heads``: what each KV head keeps and reads under sparse attention: "none", all choose; "sidecar", as
    ``edgert heads`` found; or the path of a pattern file; some heads then see the first and the latest
    tokens alone, in prompts too. ``memory``: the most bytes the process may take with one session, whatever
    its context; with sparse or exact attention keys and values that do not fit go to a file in
    ``page_directory`` (None: in edgert's cache) of at most ``page_limit`` bytes (None: as many as it takes),
    and a step chooses among those in memory, which change with what the tokens before it looked for, and
    with a retrieval head in the sidecar (``edgert export --retrieval-head``) with what the next one is going
    to look for. Raises UsageError, ModelFileError, UnsupportedModelError, TokenizerError or EngineError;
    PlanError, before anything is allocated, when the model with a session of ``context`` does not fit the
    memory there is.
    """
    check_head(head, probes)
    check_options(engine, threads, kv)
    export = onnx_export(name_or_path)
    if export:
        from .model_onnx import load_export

        others = {
            "kv": kv,
            "probes": probes,
            "attention": attention,
            "budget": budget,
            "heads": heads,
            "memory": memory,
            "page_directory": page_directory,
            "page_limit": page_limit,
        }
        return load_export(export, engine, provider, threads, context, head, others)
    check_file(name_or_path, engine, provider)
    check_memory(memory, engine)
    chosen = choose_budget(attention, budget, engine)
    check_heads(heads, attention)
    file = _native.GgufFile(str(model_path(name_or_path)))
    trained = _trained_context(file)
    check_context(context, trained)
    sidecar = choose_sidecar(file.path, head, engine)
    retrieval = choose_retrieval(file.path, chosen, memory)
    slots, classes = 0, ALL_INDEXED
    if engine != "llamacpp":
        with contextlib.suppress(UnsupportedModelError):  # the choice of an engine says what to do
            case = Case.read(file, sidecar, 0, threads, kv, head, probes, chosen, attention, heads, retrieval)
            context, slots = choose_context(case, context, memory)
            classes = case.heads
            del case
    context = context or trained
    metadata = file.metadata
    tokenizer = _TokenizerLoader(metadata)
    tokenizer.start()
    tier = make_tier(slots, page_directory, page_limit)
    loaded = engine_for(
        file, metadata, engine, threads, kv, context, sidecar, probes, chosen, tier, classes, retrieval
    )
    if head == "auto":
        head = "flash" if sidecar and loaded.name == "native" else "dense"
    return Model(
        loaded,
        tokenizer.result(),
        path=file.path,
        context=context,
        trained_context=trained,
        kv=kv,
        head=head,
        probes=probes,
        attention=attention,
        chosen=chosen,
        memory_limit=memory,
    )


class _TokenizerLoader(threading.Thread):
    """Makes the tokenizer while the engine reads the weights: a third of the time to load."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        super().__init__(daemon=True)
        self._metadata = metadata
        self._result: Tokenizer | Exception | None = None

    def run(self) -> None:
        try:
            from .tokenizer import Tokenizer

            self._result = Tokenizer.from_gguf(self._metadata)
        except Exception as error:
            self._result = error

    def result(self) -> Tokenizer:
        self.join()
        if isinstance(self._result, Exception):
            raise self._result
        assert self._result is not None
        return self._result


class Model:
    """A model in memory; :func:`load` makes one. Safe to use from several threads; a context
    manager.

    ``context`` is what a session may hold, ``trained_context`` what the model was made for, ``head``
    "dense", "flash" or "exact", ``probes`` the clusters asked for (0: the sidecar's number), ``attention``
    "full", "sparse" or "exact", ``chosen`` the past tokens that a step chooses for each KV head (0: it reads
    all), ``memory_limit`` the bytes it was loaded with leave to take (None: what there is), ``fingerprint``
    what names the model (empty: that of the file at ``path``).
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        path: str,
        context: int,
        trained_context: int,
        kv: str,
        head: str = "dense",
        probes: int = 0,
        attention: str = "full",
        chosen: int = 0,
        memory_limit: int | None = None,
        fingerprint: str = "",
    ) -> None:
        self.engine, self.tokenizer, self.head, self.probes = engine, tokenizer, head, probes
        self.path, self.context, self.trained_context, self.kv = path, context, trained_context, kv
        self.attention, self.chosen, self.memory_limit = attention, chosen, memory_limit
        self.vocab_size = engine.vocab_size
        self._fingerprint = fingerprint
        self._closed = False

    def stream(self, prompt: Prompt, **options: Any) -> Stream:
        """The reply to ``prompt`` (text, or token ids) piece by piece. Options:
        :class:`edgert.sampling.Options`.

        Raises UsageError for options that make no sense or a prompt that does not fit."""
        return self._start(time.perf_counter(), self.encode(prompt), options)

    def generate(self, prompt: Prompt, **options: Any) -> Reply:
        """The reply to ``prompt`` when it is complete."""
        return finish(self.stream(prompt, **options))

    def chat_stream(self, messages: Sequence[Message], **options: Any) -> Stream:
        """The reply to a conversation ({"role": ..., "content": ...} each) piece by piece."""
        return self._start(time.perf_counter(), self.encode_chat(messages), options)

    def chat(self, messages: Sequence[Message], **options: Any) -> Reply:
        """The reply to a conversation when it is complete."""
        return finish(self.chat_stream(messages, **options))

    def session(self) -> Session:
        """A new session: it keeps its cache from one request to the next. A context manager."""
        if self._closed:
            raise UsageError("this model is closed: load it again")
        return Session(self, self.context)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, with the special tokens the model wants around it."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        given: Any = [None] if isinstance(prompt, bytes) else prompt  # bytes would pass as ids
        try:
            ids = [operator.index(token) for token in given]
        except TypeError:
            raise UsageError(
                f"a prompt is text or a list of token ids, not {prompt!r:.80}; for messages use chat()"
            ) from None
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise UsageError(f"token id {token} is outside the vocabulary (0 to {self.vocab_size - 1})")
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins."""
        if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
            raise UsageError('messages must be a list such as [{"role": "user", "content": "..."}]')
        for message in messages:
            if not isinstance(message, Mapping) or not all(
                isinstance(message.get(key), str) for key in ("role", "content")
            ):
                raise UsageError(f'a message must have the strings "role" and "content": found {message!r}')
        if not self.tokenizer.has_chat_template:
            raise UsageError(
                f"{self.path} has no chat template (it is a base model): use generate() or stream()"
            )
        return self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)

    def head_note(self) -> str:
        """One line on the head in use: what it scores and how often it agrees with the dense head."""
        note = getattr(self.engine, "flash_note", None)
        return "dense head" if note is None or self.head == "dense" else f"{self.head} head {note}"

    def memory(self) -> dict[str, int]:
        """Bytes by part, as the engine counts them."""
        return self.engine.memory()

    def identity(self) -> dict[str, str]:
        """What a saved session is bound to. Reads a part of the model file on first use."""
        from .session_file import fingerprint

        self._fingerprint = self._fingerprint or fingerprint(self.path)
        # A cache with an index is laid out in another way, and sparse steps leave other keys and values.
        kind = {} if self.attention == "full" else {"attention": self.attention}
        heads = getattr(self.engine, "heads", ALL_INDEXED)
        if heads.classes:
            kind["heads"] = heads.digest
        return {"model": self._fingerprint, "engine": self.engine.name, "kv": self.kv, **kind}

    def close(self) -> None:
        """Free the model. Close its sessions first: they keep it in memory."""
        if not self._closed:
            self._closed = True
            self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, began: float, prompt: list[int], options: Mapping[str, Any]) -> Stream:
        session = self.session()
        try:
            return session.start(began, prompt, options, owns_session=True)
        except BaseException:
            session.close()
            raise


def _trained_context(file: _native.GgufFile) -> int:
    key = f"{file.get('general.architecture')}.context_length"
    length = file.get(key)
    if not isinstance(length, int) or length < 2:
        raise ModelFileError(
            f"{file.path}: expected a number of positions in {key}, found {length!r}", file.path, -1, key
        )
    return length
