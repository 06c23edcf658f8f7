"""A sequence that keeps its KV cache from one request to the next."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from .errors import EngineError, SessionFileError, UsageError
from .generate import Reply, Stream
from .sampling import make_options

if TYPE_CHECKING:
    from .engines.base import EngineSession, HeadSession, Ids, Logits
    from .engines.native import NativeSession
    from .model import Model

Prompt = str | Sequence[int]
Message = Mapping[str, Any]

PREFILL_CHUNK = 512  # tokens between two looks at whether the request was cancelled


class Session:
    """One conversation with a model.

    Every request brings its whole prompt; the part it shares with what the cache already holds is
    not computed again (``reply.stats.reused_tokens``). One request runs at a time: a new one ends
    the one before it as cancelled. Safe to call from several threads; two sessions of a model
    run side by side.

    Invariant: ``_tokens[: _sequence.length]`` is what the cache holds. Ids are written down before
    they are computed, so an interrupt or an error at any point leaves it true. What sparse steps left
    there as drafts of exact attention, from position ``_drafted`` on, is taken back before the next
    request or a save.
    """

    def __init__(self, model: Model, context: int) -> None:
        self.model = model
        self.context = context
        self.lock = threading.RLock()
        # Weak: with a cycle, an abandoned reply would keep its cache until the collector runs.
        self._stream: weakref.ref[Stream] | None = None
        self._sequence = model.engine.session(context)
        self._tokens: list[int] = []
        self._drafted: int | None = None
        self._closed = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids the cache holds, drafts left out."""
        with self.lock:
            length = self._open().length
            return tuple(self._tokens[: length if self._drafted is None else min(length, self._drafted)])

    def stream(self, prompt: Prompt, **options: Any) -> Stream:
        """The reply to ``prompt`` (text, or token ids) piece by piece. Options: ``sampling.Options``.

        Raises UsageError for options that make no sense or a prompt that does not fit."""
        return self.start(time.perf_counter(), self.model.encode(prompt), options)

    def generate(self, prompt: Prompt, **options: Any) -> Reply:
        """The reply to ``prompt`` when it is complete."""
        return finish(self.stream(prompt, **options))

    def chat_stream(self, messages: Sequence[Message], **options: Any) -> Stream:
        """The reply to a conversation ({"role": ..., "content": ...} each) piece by piece."""
        return self.start(time.perf_counter(), self.model.encode_chat(messages), options)

    def chat(self, messages: Sequence[Message], **options: Any) -> Reply:
        """The reply to a conversation when it is complete."""
        return finish(self.chat_stream(messages, **options))

    def cancel(self) -> None:
        """End the running reply, if any, before its next token. Callable from any thread."""
        stream = self._stream and self._stream()
        if stream:
            stream.cancel()

    def save(self, path: str | PathLike[str]) -> None:
        """Write the cache to ``path``, whole or not at all."""
        from . import session_file

        with self.lock:
            if self._drafted is not None:
                self.rewind(self._drafted)
            state = self._open().snapshot()
            session_file.write(path, self.model.identity(), self.tokens, state)

    def restore(self, path: str | PathLike[str]) -> None:
        """Replace the cache by a saved one.

        Raises SessionFileError when the file is damaged or of another model, UsageError when it is
        longer than this session's context. The session is then as it was before."""
        from . import session_file

        tokens, state = session_file.read(path, self.model.identity())
        if len(tokens) > self.context:
            raise UsageError(
                f"{path} holds {len(tokens)} tokens and this session {self.context}: "
                f"load the model with context={len(tokens)} or more"
            )
        with self.lock:
            old = self._open()
            new = self.model.engine.session(self.context)
            try:
                new.restore(state)
                if new.length != len(tokens):
                    raise EngineError(f"expected {len(tokens)} positions, found {new.length}")
            except EngineError as error:
                new.close()
                raise SessionFileError(f"{path} does not fit this model: {error}", str(path)) from error
            self._stream = None
            self._sequence, self._tokens, self._drafted = new, tokens, None
            old.close()

    def close(self) -> None:
        """Free the cache. The session cannot be used any more."""
        with self.lock:
            if not self._closed:
                self._closed = True
                self._stream = None
                self._sequence.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def serves(self, stream: Stream) -> bool:
        """Whether ``stream`` is the request in work, not one that a later one ended."""
        return self._stream is not None and self._stream() is stream

    def prefill(self, prompt: Sequence[int], cancelled: Callable[[], bool]) -> tuple[Logits | None, int]:
        """Make the cache hold ``prompt``. Returns the logits after it (None when ``cancelled`` said
        so on the way) and how many of its tokens were there already. Called by the stream."""
        sequence = self._open()
        if self._drafted is not None:
            sequence.rewind(self._drafted)
            self._drafted = None
        del self._tokens[sequence.length :]
        shared = 0
        # The last token is always computed: its logits are what the caller is after.
        for cached, wanted in zip(self._tokens, prompt[:-1], strict=False):
            if cached != wanted:
                break
            shared += 1
        try:
            kept = sequence.rewind(shared)
        except EngineError:  # pages that cannot be had back from the disk: all is computed again
            kept = sequence.rewind(0)
        self._tokens = list(prompt)
        logits = None
        for start in range(kept, len(prompt), PREFILL_CHUNK):
            if cancelled():
                return None, kept
            logits = sequence.prefill(prompt[start : start + PREFILL_CHUNK])
        return logits, kept

    def step(self, token: int) -> Logits:
        """Append a token and return the logits after it. Called by the stream."""
        sequence = self._open()
        self._note_draft()
        self._tokens.append(token)
        return sequence.step(token)

    # What a FlashHead needs; engines/base.py has the shapes.

    @property
    def length(self) -> int:
        return self._open().length

    def hidden(self, token: int) -> Logits:
        """Append a token and return the head's input after it, [dim]."""
        sequence = self._heads()
        self._note_draft()
        self._tokens.append(token)
        return sequence.hidden(token)

    def confirmed(self, earlier: Sequence[Logits], token: int) -> Logits:
        """Append a token. Returns the head's inputs ``earlier`` and that after the token, [n, dim], for the
        whole head to score."""
        sequence = self._heads()
        self._tokens.append(token)
        return sequence.confirmed(earlier, token)

    def states(self, tokens: Sequence[int]) -> Logits:
        """Append tokens in one pass over the full cache, and return the head's input after each, [n, dim]."""
        sequence = self._native()
        self._tokens.extend(tokens)
        return sequence.states(tokens)

    def flash(self, hidden: Logits, more: Sequence[int]) -> tuple[Ids, Logits]:
        """The tokens that the FlashHead scores after ``hidden``, those of ``more`` among them, and their
        logits."""
        return self._heads().flash(hidden, more)

    def among(self, hidden: Logits, ids: Sequence[int]) -> tuple[Ids, Logits]:
        """The tokens ``ids`` in another order, and their dense logits: only their rows are read."""
        return self._native().among(hidden, ids)

    def dense(self, hidden: Logits) -> Logits:
        """Logits of rows of head inputs by the whole head, [n, vocab]."""
        return self._heads().dense(hidden)

    def dense_rows(self, hidden: Logits) -> tuple[Ids | None, Logits]:
        """The tokens of the head's rows (None: in order), and their logits for rows of head inputs,
        [n, rows]."""
        return self._heads().dense_rows(hidden)

    def best(self, hidden: Logits) -> list[int]:
        """The likeliest token of rows of head inputs, by the whole head."""
        return self._heads().best(hidden)

    def rewind(self, length: int) -> None:
        """Forget positions from ``length`` on."""
        sequence = self._open()
        if sequence.rewind(length) != length:
            raise EngineError(f"the cache cannot go back to position {length}")
        del self._tokens[length:]
        if self._drafted is not None and length <= self._drafted:
            self._drafted = None

    def _note_draft(self) -> None:
        """Called before a step of one token: in exact attention it leaves a draft in the cache."""
        if self._drafted is None and self.model.attention == "exact":
            self._drafted = self._open().length

    @property
    def has_among(self) -> bool:
        """Whether :meth:`among` is there, for less than the whole head takes."""
        return hasattr(self._open(), "among")

    def _heads(self) -> HeadSession:
        sequence = self._open()
        if not hasattr(sequence, "flash"):
            raise EngineError(f"the {self.model.engine.name} engine has no FlashHead: use head='dense'")
        return cast("HeadSession", sequence)

    def _native(self) -> NativeSession:
        sequence = self._open()
        if not self.has_among:
            raise EngineError("this needs the native engine: use attention='full'")
        return cast("NativeSession", sequence)

    def _open(self) -> EngineSession:
        if self._closed:
            raise UsageError("this session is closed: open another one with model.session()")
        return self._sequence

    def start(
        self, began: float, prompt: list[int], given: Mapping[str, Any], *, owns_session: bool = False
    ) -> Stream:
        """The stream of a request that was made at ``began`` (perf_counter). One that
        ``owns_session`` closes it when it ends."""
        options = make_options(given, self.model.vocab_size)
        if not prompt:
            raise UsageError("the prompt is empty: give at least one token")
        if len(prompt) >= self.context:
            longest = self.model.trained_context
            remedy = (
                f"load the model with a larger context (up to {longest})"
                if self.context < longest
                else "the model was made for no more"
            )
            raise UsageError(
                f"the prompt has {len(prompt)} tokens and the context {self.context}, which must hold the "
                f"prompt and at least one token of the reply: shorten the prompt; {remedy}"
            )
        with self.lock:
            self._open()
            stream = Stream(self, prompt, options, began, owns_session=owns_session)
            self._stream = weakref.ref(stream)
        return stream


def finish(stream: Stream) -> Reply:
    """Run a stream to its end."""
    for _ in stream:
        pass
    return stream.reply
